"""Scores answers in worker processes, off the event loop. Called by the dispatcher, from one event loop.

    score() --free seat--> thread of the seat --socket--> worker process --> Score, or RewardFailed

Invariants:
- At most `config.workers` scores are in flight; further callers wait for a free seat, in order.
- A function that hangs past `timeout_s`, or whose process dies, costs that process and that score. The seat's next
  score starts a new process; the other seats go on.
- After `close()` no worker process is left. Workers also end by themselves when this process dies.

Why own processes and not multiprocessing's: its spawn runs the parent's `__main__` again in each worker, which in a
Ray actor imports Ray; its fork copies a process full of threads; and both pickle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from asyncrl.generators.config import RewardsConfig
from asyncrl.generators.reward_worker import Ask, Hello, Raised, Ready, Values, receive, send
from asyncrl.generators.rewards import RewardError

logger = logging.getLogger(__name__)

_START_TIMEOUT_S: Final = 120.0
"""A worker imports its functions in that time; generous, as a cold disk under load is slow."""
_EXIT_TIMEOUT_S: Final = 5.0
"""A killed process is gone in that time; a worker that closed its socket ends by itself in that time."""


class Score(msgspec.Struct, frozen=True):
    """What an answer is worth."""

    reward: float
    """Sum of weight * value over the terms."""
    parts: dict[str, float]
    """Value of each term by its function's name, before weighting; further numbers of a function as `name/key`."""


class RewardFailed(RuntimeError):
    """One answer could not be scored; its rollout fails with this reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Worker:
    """One worker process and the socket to it. Used by one thread at a time, but for `kill`."""

    def __init__(self, functions: list[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "asyncrl.generators.reward_worker", str(theirs.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._connection, self._functions = ours, functions

    def greet(self) -> None:
        """Wait until its functions are loaded. Raises `RewardError` where one cannot be."""
        self._connection.settimeout(_START_TIMEOUT_S)
        try:
            send(self._connection, Hello(functions=self._functions, sys_path=[p for p in sys.path if p]))
            reply = receive(self._connection)
        except (EOFError, OSError) as error:
            raise RewardError(
                f"a reward worker did not come up with {self._functions} ({self.end()} after {error!r}); "
                "what it printed above says why"
            ) from error
        assert isinstance(reply, Ready)
        if reply.problem:
            self.end()
            raise RewardError(reply.problem)

    def ask(self, ask: Ask, deadline: float) -> Values | Raised:
        """Raises TimeoutError at `deadline` (monotonic), EOFError or OSError where the process is gone."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        send(self._connection, ask)
        reply = receive(self._connection)
        assert isinstance(reply, Values | Raised)
        return reply

    def kill(self) -> None:
        """From any thread: whoever waits for the process gets EOFError."""
        self.process.kill()

    def end(self) -> str:
        """Make sure that it is gone, and say how it went. A process that is dying is left to die of its own cause."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        try:
            code = self.process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait(_EXIT_TIMEOUT_S)
        return f"exit code {code}" if code >= 0 else f"signal {-code}"


class _Seat:
    """Where one worker sits: an empty seat gets a new one at the next score."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None


class RewardPool:
    """Scores answers by the weighted sum of `config.terms`."""

    def __init__(self, config: RewardsConfig) -> None:
        """Starts the workers and waits until they have loaded every function (about a second).

        Raises `RewardError` for a function that is not there, naming the way out.
        """
        names = [term.function for term in config.terms]
        if not names:
            raise RewardError("[rewards] has no terms; add [[rewards.terms]] with a function")
        if len(set(names)) < len(names):
            raise RewardError(f"a reward function is listed twice: {names}; add up its weights in one term")
        self._config, self._names = config, names
        self._closed, self._lock = False, threading.Lock()
        self._seats = [_Seat() for _ in range(config.workers)]
        self._free: asyncio.Queue[_Seat] = asyncio.Queue(maxsize=config.workers)
        for seat in self._seats:
            self._free.put_nowait(seat)
        self._threads = ThreadPoolExecutor(config.workers, thread_name_prefix="reward")
        try:
            for seat in self._seats:  # all start at once; then each is waited for
                seat.worker = _Worker(names)
            for seat in self._seats:
                if seat.worker:
                    seat.worker.greet()
        except (RewardError, OSError):
            self._end()
            raise

    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        return [seat.worker.process.pid for seat in self._seats if seat.worker]

    async def score(self, answer_text: str, payload: str) -> Score:
        """What `answer_text` is worth; `payload` is the prompt's JSON object. Raises `RewardFailed`.

        Waits for a free seat, which each score ahead gives back within `timeout_s` (and the start of a worker).
        """
        seat = await self._free.get()
        loop = asyncio.get_running_loop()
        try:
            future = loop.run_in_executor(self._threads, self._score, seat, answer_text, payload)
        except RuntimeError as error:  # the executor takes no more: closed
            self._free.put_nowait(seat)
            raise RewardFailed("the reward pool is closed") from error
        # By callback and not in `finally`: where the caller is cancelled, the seat is busy until its thread is done.
        future.add_done_callback(lambda done: self._give_back(seat, done))
        return await asyncio.shield(future)

    def _give_back(self, seat: _Seat, done: asyncio.Future[Score]) -> None:
        done.exception()  # seen, so that a score whose caller was cancelled is not logged as forgotten
        self._free.put_nowait(seat)

    def _score(self, seat: _Seat, answer_text: str, payload: str) -> Score:
        """In the seat's thread. The deadline covers all terms; the start of a new worker is not counted."""
        worker = self._occupied(seat)
        deadline = time.monotonic() + self._config.timeout_s
        reward, parts = 0.0, {}
        for index, term in enumerate(self._config.terms):
            ask = Ask(
                function=index,
                answer_text=answer_text,
                payload=payload,
                timeout_s=self._config.timeout_s,
            )
            try:
                reply = worker.ask(ask, deadline)
            except TimeoutError:
                worker.kill()
                self._vacate(seat, worker)
                raise self._failure(
                    term.function,
                    payload,
                    f"no value within timeout_s = {self._config.timeout_s:g}; its process was killed",
                ) from None
            except (EOFError, OSError):
                how = self._vacate(seat, worker)
                cause = "the reward pool is closed" if self._closed else f"its process ended with {how}"
                raise self._failure(term.function, payload, cause) from None
            if isinstance(reply, Raised):
                raise self._failure(term.function, payload, reply.reason)
            reward += term.weight * reply.values["reward"]
            for key, value in reply.values.items():
                parts[term.function if key == "reward" else f"{term.function}/{key}"] = value
        return Score(reward=reward, parts=parts)

    def _occupied(self, seat: _Seat) -> _Worker:
        """The seat's worker, a new one where the last was lost."""
        if seat.worker is not None:
            return seat.worker
        with self._lock:
            if self._closed:
                raise RewardFailed("the reward pool is closed")
            worker = seat.worker = _Worker(self._names)
        try:
            worker.greet()
        except RewardError as error:
            self._vacate(seat, worker)
            raise RewardFailed(str(error)) from error
        logger.info("reward worker replaced pid=%d", worker.process.pid)
        return worker

    def _vacate(self, seat: _Seat, worker: _Worker) -> str:
        seat.worker = None
        return worker.end()

    def _failure(self, function: str, payload: str, cause: str) -> RewardFailed:
        return RewardFailed(f"reward function {function!r} on {_prompt_of(payload)}: {cause}")

    async def close(self) -> None:
        """Ends every worker; scores in flight fail. Safe to call twice."""
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        with self._lock:
            self._closed = True
            workers = [seat.worker for seat in self._seats if seat.worker]
        for worker in workers:
            worker.kill()
        # Ends within the exit timeout: the killed processes unblock the threads, which wait for nothing else.
        self._threads.shutdown(wait=True)
        for worker in workers:
            worker.end()


def check_functions(config: RewardsConfig) -> None:
    """Starts one worker, has it load every function, and ends it: for checks before launch. Raises `RewardError`."""
    RewardPool(msgspec.structs.replace(config, workers=1))._end()


def _prompt_of(payload: str) -> str:
    """A name of the prompt for an error: its id, or as much of the payload as a line holds."""
    try:
        prompt_id = msgspec.json.decode(payload, type=dict).get("prompt_id")
    except msgspec.DecodeError:
        prompt_id = None
    return f"prompt {prompt_id!r}" if prompt_id else f"prompt with payload {payload[:120]!r}"
