"""Runs users' code in worker processes, off the event loop. Called by `reward_pool` and `turns`, from one event loop.

    run() --free seat--> thread of the seat --socket--> worker process --> answers, or WorkFailed

Invariants:
- At most `workers` calls are in flight; further callers wait for a free seat, in order.
- A function that hangs past `timeout_s`, whose process dies or that runs out of `memory_bytes` costs that process and that
  call. The seat's next call starts a new process; the other seats go on.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import msgspec

from asyncrl.generators.functions import FunctionError
from asyncrl.generators.worker_messages import Answer, Ask, Hello, Raised, Ready, receive, send

logger = logging.getLogger(__name__)

_START_TIMEOUT_S: Final = 120.0
"""A worker imports its functions in that time; generous, as a cold disk under load is slow."""
_EXIT_TIMEOUT_S: Final = 5.0
"""A killed process is gone in that time; a worker that closed its socket ends by itself in that time."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers of a pool do."""

    what: str
    """For people: `reward` or `environment`."""
    make: str
    setup: bytes
    """See `worker_messages.Hello`."""
    timeout_s: float
    """For all questions of one call together."""
    memory_bytes: int


class WorkFailed(RuntimeError):
    """One call came to nothing; the pool goes on."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        """Of the question that failed."""
        self.reason = reason


class _Worker:
    """One worker process and the socket to it. Used by one thread at a time, but for `kill`."""

    def __init__(self, job: Job) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            module = "asyncrl.generators.worker_process"
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), job.what]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._connection, self._job = ours, job

    def greet(self) -> None:
        """Wait until it can answer. Raises `FunctionError` where it cannot."""
        job = self._job
        self._connection.settimeout(_START_TIMEOUT_S)
        try:
            path = [p for p in sys.path if p]
            send(
                self._connection,
                Hello(make=job.make, setup=job.setup, sys_path=path, memory_bytes=job.memory_bytes),
            )
            reply = receive(self._connection)
        except (EOFError, OSError) as error:
            raise FunctionError(
                f"a {job.what} worker did not come up ({self.end()} after {error!r}); what it printed above says why"
            ) from error
        assert isinstance(reply, Ready)
        if reply.problem:
            self.end()
            raise FunctionError(reply.problem)

    def ask(self, body: bytes, deadline: float) -> Answer | Raised:
        """Raises TimeoutError at `deadline` (monotonic), EOFError or OSError where the process is gone."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        send(self._connection, Ask(body=body, timeout_s=self._job.timeout_s))
        reply = receive(self._connection)
        assert isinstance(reply, Answer | Raised)
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
    """Where one worker sits: an empty seat gets a new one at the next call."""

    def __init__(self) -> None:
        self.worker: _Worker | None = None


class WorkerPool:
    """`workers` processes that do one job."""

    def __init__(self, job: Job, workers: int) -> None:
        """Starts the workers and waits until all can answer. Raises `FunctionError` where the job cannot be done."""
        self._job = job
        self._closed, self._lock = False, threading.Lock()
        self._seats = [_Seat() for _ in range(workers)]
        self._free: asyncio.Queue[_Seat] = asyncio.Queue(maxsize=workers)
        for seat in self._seats:
            self._free.put_nowait(seat)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=job.what)
        try:
            for seat in self._seats:  # all start at once; then each is waited for
                seat.worker = _Worker(job)
            for seat in self._seats:
                if seat.worker:
                    seat.worker.greet()
        except (FunctionError, OSError):
            self.end()
            raise

    def pids(self) -> list[int]:
        """Process ids of the present workers."""
        return [seat.worker.process.pid for seat in self._seats if seat.worker]

    async def run(self, bodies: Sequence[bytes]) -> list[bytes]:
        """The answers to these questions, asked one after the other, within `timeout_s` together. Raises `WorkFailed`.

        Waits for a free seat, which each call ahead gives back within `timeout_s` (and the start of a worker).
        """
        seat = await self._free.get()
        loop = asyncio.get_running_loop()
        try:
            future = loop.run_in_executor(self._threads, self._run, seat, bodies)
        except RuntimeError as error:  # the executor takes no more: closed
            self._free.put_nowait(seat)
            raise WorkFailed(0, self._closed_text) from error
        # By callback and not in `finally`: where the caller is cancelled, the seat is busy until its thread is done.
        future.add_done_callback(lambda done: self._give_back(seat, done))
        return await asyncio.shield(future)

    def _give_back(self, seat: _Seat, done: asyncio.Future[list[bytes]]) -> None:
        done.exception()  # seen, so that a call whose caller was cancelled is not logged as forgotten
        self._free.put_nowait(seat)

    @property
    def _closed_text(self) -> str:
        return f"the {self._job.what} pool is closed"

    def _run(self, seat: _Seat, bodies: Sequence[bytes]) -> list[bytes]:
        """In the seat's thread. The deadline covers all questions; the start of a new worker is not counted."""
        worker = self._occupied(seat)
        deadline = time.monotonic() + self._job.timeout_s
        answers = []
        for index, body in enumerate(bodies):
            try:
                reply = worker.ask(body, deadline)
            except TimeoutError:
                worker.kill()
                self._vacate(seat, worker)
                limit = f"timeout_s = {self._job.timeout_s:g}"
                raise WorkFailed(index, f"no answer within {limit}; its process was killed") from None
            except (EOFError, OSError):
                how = self._vacate(seat, worker)
                cause = self._closed_text if self._closed else f"its process ended with {how}"
                raise WorkFailed(index, cause) from None
            except ValueError as error:
                raise WorkFailed(index, f"it cannot be asked: {error}") from None
            if isinstance(reply, Raised):
                if reply.worn:
                    self._vacate(seat, worker)
                raise WorkFailed(index, reply.reason)
            answers.append(reply.body)
        return answers

    def _occupied(self, seat: _Seat) -> _Worker:
        """The seat's worker, a new one where the last was lost."""
        if seat.worker is not None:
            return seat.worker
        with self._lock:
            if self._closed:
                raise WorkFailed(0, self._closed_text)
            worker = seat.worker = _Worker(self._job)
        try:
            worker.greet()
        except FunctionError as error:
            self._vacate(seat, worker)
            raise WorkFailed(0, str(error)) from error
        logger.info("%s worker replaced pid=%d", self._job.what, worker.process.pid)
        return worker

    def _vacate(self, seat: _Seat, worker: _Worker) -> str:
        seat.worker = None
        return worker.end()

    async def close(self) -> None:
        """Ends every worker; calls in flight fail. Safe to call twice."""
        await asyncio.to_thread(self.end)

    def end(self) -> None:
        """`close` for a caller without an event loop; it waits."""
        with self._lock:
            self._closed = True
            workers = [seat.worker for seat in self._seats if seat.worker]
        for worker in workers:
            worker.kill()
        # Ends within the exit timeout: the killed processes unblock the threads, which wait for nothing else.
        self._threads.shutdown(wait=True)
        for worker in workers:
            worker.end()


def check(job: Job) -> None:
    """Starts one worker, has it load everything, and ends it: for checks before launch. Raises `FunctionError`."""
    WorkerPool(job, 1).end()


def prompt_named(payload: str) -> str:
    """A name of the prompt for an error: its id, or as much of the payload as a line holds."""
    try:
        prompt_id = msgspec.json.decode(payload, type=dict).get("prompt_id")
    except msgspec.DecodeError:
        prompt_id = None
    return f"prompt {prompt_id!r}" if prompt_id else f"prompt with payload {payload[:120]!r}"
