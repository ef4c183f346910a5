"""What can go wrong on the way back. One tree, so that a caller can catch all of it; each error survives pickling,
as processes hand their last error to the supervisor that way. Raised by every module of this folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncrl.weight_sync.report import SyncReport, TransactionReport


class WeightSyncError(RuntimeError):
    """Base. The first argument is the message; further ones are facts, kept as attributes by the subclasses."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class SharedMemoryError(WeightSyncError):
    """The shared memory of a version cannot be made, mapped or trusted."""


class DeviceMemoryError(WeightSyncError):
    """Memory of a GPU cannot be had, shared with another process, or opened."""


class ChecksumError(WeightSyncError):
    """The bytes of a bucket are not those that the learner wrote; nothing of this version was applied."""

    def __init__(self, version: int, bucket: int, expected: int, got: int, location: str) -> None:
        super().__init__(version, bucket, expected, got, location)
        self.version = version
        self.bucket = bucket
        self.expected = expected
        self.got = got
        self.location = location

    def __str__(self) -> str:
        return (
            f"version {self.version}, bucket {self.bucket} in {self.location}: expected checksum "
            f"{self.expected:#018x}, got {self.got:#018x}. The bytes changed after the learner wrote them; the old "
            f"version stays live. Look for another writer of this file, or for bad memory."
        )


class IncompleteWeights(WeightSyncError):
    """An offer and the engine's model do not match parameter by parameter."""


class MalformedDelta(WeightSyncError, ValueError):
    """The bytes are no delta, or none of the range that they are to change; nothing was written."""


class GroupBroken(WeightSyncError):
    """The group over which weights travel no longer works; that says nothing of the process in which it shows."""


class EnginesMissing(WeightSyncError):
    """Engines that were waited for did not join in time."""

    def __init__(self, message: str, missing: frozenset[str]) -> None:
        super().__init__(message, missing)
        self.missing = missing


class SyncAborted(WeightSyncError):
    """The version was given to nobody, for a fault on the learner's side; the old one stays live."""

    def __init__(self, message: str, report: TransactionReport) -> None:
        super().__init__(message, report)
        self.report = report


class Dismissed(WeightSyncError):
    """The publisher put this engine out of service; it must be started again."""


class ProbeMismatch(WeightSyncError):
    """An engine applied the version and computes other logprobs than the learner does. `report`: at the publisher, where no
    engine is left that runs the version; `failed` engines computed otherwise, `engine` the farthest off. `answer`: at the engine, all its
    logprobs."""

    def __init__(
        self,
        engine: str,
        version: int,
        position: int,
        expected: float,
        got: float,
        failed: int = 1,
        report: SyncReport | None = None,
        answer: tuple[float, ...] = (),
    ) -> None:
        super().__init__(engine, version, position, expected, got, failed, report, answer)
        self.engine = engine
        self.version = version
        self.position = position
        self.expected = expected
        self.got = got
        self.failed = failed
        self.report = report
        self.answer = answer

    def __str__(self) -> str:
        all_failed = (
            f"all {self.failed} engines that were probed failed, so the fault is one that they share: another model or dtype "
            f"than the learner's, or weight_sync.verify_tolerance is too small. The farthest off: "
        )
        return (
            f"{all_failed if self.report is not None and self.failed > 1 else ''}engine {self.engine} at version "
            f"{self.version}, probe logprob {self.position} (of token {self.position + 1}): the learner has "
            f"{self.expected:.6g}, the engine {self.got:.6g}, difference {abs(self.expected - self.got):.3g}. The engine runs "
            f"other weights or other arithmetic than the learner; if it only computes in a shorter float, raise "
            f"weight_sync.verify_tolerance."
        )


class VersionTimeout(WeightSyncError):
    """An engine waited for a version that did not come in time."""
