"""Awaits the parts of a run: their short calls with a deadline, their long calls until the first of them ends.

Whatever ends by itself ends the phase that is under way, with its own error; nothing is waited for in vain. One event loop.
Called by the supervisor, the fleet and `buffer_watch`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any

import ray

from asyncrl.runtime.part_log import tail
from asyncrl.runtime.run_folder import RunFolder


class PartFailed(RuntimeError):
    """A part of the run broke or died: which, its traceback, the end of its log."""

    def __init__(
        self,
        report: str,
        *,
        part: str = "",
        cause: str = "",
        process_died: bool = False,
        raised: BaseException | None = None,
    ) -> None:
        super().__init__(report)
        self.part = part
        """Which one, where it is one alone."""
        self.cause = cause or _first_line(report)
        """In one line."""
        self.process_died = process_died
        """The process is gone, which says nothing against what it ran: it may be started again."""
        self.raised = raised
        """What was raised where the call ran, where something was."""


class Stopped(Exception):
    """Somebody asked the run to end."""


class Watch:
    """`watched` are the calls that last as long as the run, by the name of their part."""

    def __init__(self, folder: RunFolder, stop: asyncio.Event) -> None:
        self.folder = folder
        self._stop = stop
        self._watched: dict[str, asyncio.Task[Any]] = {}

    def add(self, part: str, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """From now on no phase goes on after the end of `work`."""
        task = self._watched[part] = asyncio.create_task(work, name=part)
        return task

    def remove(self, part: str) -> asyncio.Task[Any] | None:
        """It may end now."""
        return self._watched.pop(part, None)

    async def outcome(self, part: str, reference: Any) -> Any:
        """Waits for a part's call, however long; raises PartFailed with its traceback."""
        try:
            return await reference
        except ray.exceptions.RayError as error:
            died = isinstance(error, ray.exceptions.RayActorError)
            report = self.report(part, str(error))
            raised = getattr(error, "cause", None)
            cause = _cause(error)
            raise PartFailed(report, part=part, cause=cause, process_died=died, raised=raised) from error

    async def call(self, part: str, reference: Any, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self.outcome(part, reference)
        except TimeoutError:
            log = tail(self.folder.log(part))
            raise PartFailed(
                f"{part} gave no answer within {timeout_s:.0f} s. The end of its log:\n{log}"
            ) from None

    async def guarded(self, work: Awaitable[None]) -> None:
        """Awaits `work`; ends it with the error of whatever part ends first, or with `Stopped`."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            # Waits for the phase; unblocked by it, by any watched part that ends, or by a stop.
            while not task.done():
                await asyncio.wait(
                    {task, stopping, *self._watched.values()}, return_when=asyncio.FIRST_COMPLETED
                )
                if self._stop.is_set():
                    raise Stopped
                self._raise_ended(task)
            await task
        finally:
            stopping.cancel()
            task.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)

    def _raise_ended(self, task: asyncio.Future[None]) -> None:
        for part, watched in list(self._watched.items()):
            if watched.done() and not task.done():
                watched.result()
                raise PartFailed(
                    f"{part} ended by itself before the run was over; see {self.folder.log(part)}"
                )

    def failed(self, part: str, why: str) -> PartFailed:
        """For a part that is found to be of no use while its calls go on."""
        return PartFailed(self.report(part, why), cause=_first_line(why))

    def report(self, part: str, error: str) -> str:
        """The part's own traceback is within Ray's error text; the log's tail shows what its children said."""
        log = tail(self.folder.log(part))
        return f"{part} failed: {error}\n--- the end of its log ({self.folder.logs}) ---\n{log}"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _cause(error: ray.exceptions.RayError) -> str:
    """One line: what was raised where the call ran; a process that is gone raised nothing."""
    cause = getattr(error, "cause", None) or error
    text = _first_line(str(cause))
    return text if cause is error else f"{type(cause).__name__}: {text}"
