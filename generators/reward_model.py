"""A reward model in a process of its own, asked by all rollouts of one engine. Called by `reward_pool`, from one event loop.

    score() --number, text--> process (`reward_model_process`): batches of what waits --number, value--> score()

Each engine's process has one beside it, not the run: a machine that is lost takes along only its own, what scores grows with
what samples, and no answer crosses the network. The price is memory: one copy of the weights for each engine (`preflight`
counts them).

Invariants:
- Every answer has a deadline, `timeout_s` from when it is asked about, whatever happens meanwhile.
- A process that dies is started again and asked again what it had not answered. An answer that was there at two deaths fails:
  it may be their cause. More than `MOST_DEATHS` within `DEATHS_WITHIN_S` raise `RewardModelDead`, which ends the engine.
- One that lets an answer's deadline pass and has said nothing since it was asked is stuck, and is killed.
- At most `_MOST_ASKED` answers are with it; further callers wait in line.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

from asyncrl.generators.config import RewardModelConfig
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_child import CHUNK_BYTES, RewardChild
from asyncrl.generators.reward_messages import Found, Frames, Message, Read, Refused, frame
from asyncrl.generators.score import RewardFailed
from asyncrl.generators.worker_pool import prompt_named

logger = logging.getLogger(__name__)

MOST_DEATHS: Final = 3
DEATHS_WITHIN_S: Final = 600.0
_MOST_ASKED: Final = 1024


class RewardModelDead(RuntimeError):
    """The model's process cannot be kept alive: nothing can be scored beside this engine any more."""


@dataclass(slots=True, eq=False)
class _Asked:
    message: Read
    answered: asyncio.Future[float]
    since: float
    """When the present process was asked."""
    deaths: int = 0
    """Of processes that had it."""


class RewardModel:
    """`score` answers; `close` ends the process."""

    def __init__(self, folder: str, config: RewardModelConfig) -> None:
        """Starts the process and waits until it has loaded the model. Raises `FunctionError`."""
        self._folder, self._config = folder, config
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._seats = asyncio.Semaphore(_MOST_ASKED)
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS + 1)
        self._dead: RewardModelDead | None = None
        self._closed = False
        self._talking: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        """To the present process; None while there is none that can read."""
        self._process = RewardChild()
        self._process.load(folder, config)

    def pids(self) -> list[int]:
        """Of the present process, or of the last one."""
        return [self._process.pid]

    @property
    def reading(self) -> bool:
        """There is a process that has loaded the model and is asked."""
        return self._writer is not None

    async def score(self, answer_text: str, payload: str) -> float:
        """The model's number for the answer; `payload` is the prompt's JSON object. Raises `RewardFailed`, or RewardModelDead.

        Waits for a seat, then for the process, both until the answer's deadline.
        """
        message = Read(next(self._numbers), payload, answer_text)
        try:
            async with asyncio.timeout(self._config.timeout_s), self._seats:
                return await self._ask(message)
        except TimeoutError:
            self._end_if_stuck(message)
            cause = f"no answer within serving.timeout_s = {self._config.timeout_s:g}"
            raise self._failed(message, cause) from None
        finally:
            self._asked.pop(message.number, None)

    async def _ask(self, message: Read) -> float:
        if self._dead is not None:
            raise self._dead
        if self._closed:
            raise self._failed(message, "the reward model is closed")
        if self._talking is None:
            self._talking = asyncio.create_task(self._talk(), name=f"reward model {self._folder}")
        elif self._talking.done():
            self._talking.result()  # it ended by a fault of its own
        asked = _Asked(message, asyncio.get_running_loop().create_future(), time.monotonic())
        self._asked[message.number] = asked
        if self._writer is not None:
            self._send(asked, self._writer)
        return await asked.answered

    def _send(self, asked: _Asked, writer: asyncio.StreamWriter) -> None:
        asked.since = time.monotonic()
        try:
            writer.write(frame(asked.message))
        except ValueError as error:
            asked.answered.set_exception(self._failed(asked.message, str(error)))

    def _end_if_stuck(self, message: Read) -> None:
        asked = self._asked.get(message.number)
        if asked is not None and self._writer is not None and self._process.spoke < asked.since:
            logger.error("reward model %s is stuck and killed pid=%d", self._folder, self._process.pid)
            self._process.kill()

    def _failed(self, message: Read, cause: str) -> RewardFailed:
        return RewardFailed(f"reward model {self._folder!r} on {prompt_named(message.payload)}: {cause}")

    # ---- the process -------------------------------------------------------------------------------------------

    async def _talk(self) -> None:
        """Waits for what the process says, and starts it again when it dies. Ends closed, or with one death too many."""
        while not self._closed and self._dead is None:
            await self._listen()
            how = await asyncio.to_thread(self._process.end)
            if not self._closed:
                cause = f"its process ended with {how}"
                self._count_death(cause)
                await self._start_again(cause)
        gone = self._dead or "the reward model is closed"
        for asked in self._asked.values():
            self._give_up(asked, gone if isinstance(gone, Exception) else self._failed(asked.message, gone))

    async def _listen(self) -> None:
        """Ends when the process is gone, or talks nonsense."""
        reader, self._writer = await asyncio.open_connection(sock=self._process.connection)
        for asked in self._asked.values():
            self._send(asked, self._writer)
        frames = Frames()
        try:
            while data := await reader.read(CHUNK_BYTES):
                for message in frames.add(data):
                    self._take(message)
        except (EOFError, ConnectionError) as error:
            logger.error("reward model %s: %s", self._folder, error)
            self._process.kill()
        finally:
            writer, self._writer = self._writer, None
            writer.transport.abort()  # not `close`, which would wait for a dead process to read
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _take(self, message: Message) -> None:
        self._process.spoke = time.monotonic()
        assert isinstance(message, Found | Refused)
        asked = self._asked.get(message.number)
        if asked is None or asked.answered.done():
            return  # it was given up meanwhile
        if isinstance(message, Refused):
            asked.answered.set_exception(self._failed(asked.message, message.reason))
        elif math.isfinite(message.value):
            asked.answered.set_result(message.value)
        else:
            asked.answered.set_exception(
                self._failed(asked.message, f"it gave {message.value}, expected a finite number")
            )

    async def _start_again(self, cause: str) -> None:
        """Ends with a process that can read, with one death too many, or closed."""
        while not self._closed:
            now = time.monotonic()
            self._deaths.append(now)
            if len(self._deaths) > MOST_DEATHS and now - self._deaths[0] <= DEATHS_WITHIN_S:
                self._dead = RewardModelDead(
                    f"reward model {self._folder!r} died {len(self._deaths)} times within {DEATHS_WITHIN_S:g} s, the last time: "
                    f"{cause}. What it printed is in this engine's log"
                )
                return
            logger.error("reward model %s is started again: %s", self._folder, cause)
            self._process = RewardChild()
            try:
                await asyncio.to_thread(self._process.load, self._folder, self._config)
                return
            except FunctionError as error:
                cause = str(error)

    def _count_death(self, cause: str) -> None:
        for asked in self._asked.values():
            asked.deaths += 1
            if asked.deaths > 1:
                self._give_up(
                    asked,
                    self._failed(asked.message, f"{cause}, for the second time while it had this answer"),
                )

    @staticmethod
    def _give_up(asked: _Asked, error: Exception) -> None:
        if not asked.answered.done():
            asked.answered.set_exception(error)

    async def close(self) -> None:
        """Ends the process; scores in flight fail. Safe to call twice."""
        self._closed = True
        self._process.kill()
        if self._talking is not None:
            await self._talking
        else:
            await asyncio.to_thread(self.end)

    def end(self) -> None:
        """`close` for a caller without an event loop, before anything was scored; it waits."""
        self._closed = True
        self._process.kill()
        self._process.end()
