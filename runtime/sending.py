"""How one learner rank sends a version: it gathers bucket after bucket while the one before is written, and agrees with the other
ranks on how that went.

    gather 0 | gather 1 | gather 2 | ...        this thread, a collective where one rank sends
             | write 0  | write 1  | ...        the pipeline's thread, where this rank sends

Invariants
----------
- Every rank makes the same collectives, whichever of them cannot begin or write: no rank is left waiting, and all raise.
- A version is committed only if every rank wrote its share of it.
- A gather that fails where all ranks take part in it is raised at once, as the others are no longer in step.
Called by `learner_part`, from one thread, while the welcomer is paused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from asyncrl.learner.step import Learner
from asyncrl.weight_sync.collective_publisher import CollectivePublisher
from asyncrl.weight_sync.collective_share import CollectiveShare
from asyncrl.weight_sync.errors import SyncAborted, WeightSyncError
from asyncrl.weight_sync.pipeline import Pipeline
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.report import SyncReport

logger = logging.getLogger(__name__)


class Writer(Protocol):
    """A publisher, or another rank's part in one."""

    def begin(self, version: int) -> None: ...

    def write(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None: ...

    def abandon(self) -> None: ...

    def commit(self, probe: Probe | None) -> SyncReport | None: ...


class Sender:
    """One rank's."""

    def __init__(
        self, learner: Learner, plan: Plan, writer: Writer | None, timeout_s: float, attempts: int = 1
    ) -> None:
        """`writer`: None on a rank that only gives its rows. `timeout_s`: of one attempt's writing. `attempts`: how often a version
        is tried that was called off before anyone had it."""
        self._learner, self._plan, self._writer = learner, plan, writer
        self._timeout_s, self._attempts = timeout_s, attempts
        self._ranks = learner.ranks
        self._everyones = plan.senders == 1
        """Whether a gather is a collective."""
        self._buckets = plan.buckets if self._everyones else plan.of(self._ranks.rank)

    def send(self, version: int, probe: Probe | None, *, again: bool = False) -> SyncReport | None:
        """Sends the present weights as `version`. A collective; the report is rank 0's. `again`: it was committed, and is for the
        engines that came since.

        Raises what this rank's writer raised, or `WeightSyncError` where another rank's did; `SyncAborted` after the last attempt.
        """
        # Ends: with a version that is committed, or after `attempts`.
        for left in reversed(range(self._attempts)):
            self._write(version, again)
            try:
                report = self._writer.commit(probe) if self._writer is not None else None
            except SyncAborted as error:
                if not self._again(left > 0):
                    raise
                logger.warning("version %d is sent again: %s", version, error)
                continue
            except Exception:
                self._again(False)
                raise
            if not self._again(False):
                return report
        raise WeightSyncError(f"version {version} was called off {self._attempts} times")

    def _again(self, wanted: bool) -> bool:
        """What rank 0 decided. A collective where there is more than one attempt."""
        return self._attempts > 1 and bool(int(self._ranks.share(b"1" if wanted else b"0")))

    def _write(self, version: int, again: bool) -> None:
        """Everything that this rank has to do before the commit, and that all others have done theirs. A collective."""
        writer = self._writer
        fault = _fault_of(lambda: _begin(writer, version, again)) if writer is not None else None
        if self._everyones:
            fault = self._put(fault)
        elif fault is None:
            found: list[Exception | None] = []
            fault = _fault_of(lambda: found.append(self._put(None))) or found[0]
        self._agree(version, fault)

    def _put(self, fault: Exception | None) -> Exception | None:
        """Gathers every bucket and, until there is a fault, writes it; returns the first one. Raises what gathering raises."""
        deadline = time.monotonic() + self._timeout_s
        with Pipeline(self._work) as pipeline:
            for bucket in self._buckets:
                pieces = self._learner.gather(self._plan, bucket)
                if fault is None and self._writer is not None:
                    fault = _fault_of(partial(pipeline.put, (bucket, pieces), deadline))
                del pieces  # the pipeline's now: it is to be free when its work is done
            return fault or _fault_of(partial(pipeline.finish, deadline))

    def _work(self, item: tuple[Bucket, list[torch.Tensor]]) -> None:
        assert self._writer is not None
        self._writer.write(*item)

    def _agree(self, version: int, fault: Exception | None) -> None:
        """Raises on every rank if there is a fault on one. A collective."""
        mine = f"{type(fault).__name__}: {fault}" if fault is not None else ""
        words = [word.decode() for word in self._ranks.collect(mine.encode())]
        if not any(words):
            return
        if self._writer is not None:
            self._writer.abandon()
        if fault is not None:
            raise fault
        told = "; ".join(f"learner rank {rank}: {word}" for rank, word in enumerate(words) if word)
        raise WeightSyncError(f"version {version} was not sent, as not every rank could do its part. {told}")


def _begin(writer: Writer, version: int, again: bool) -> None:
    if not again:
        writer.begin(version)
    elif isinstance(writer, CollectivePublisher | CollectiveShare):
        writer.resend(version)
    else:
        raise WeightSyncError(f"version {version}: only what is broadcast is sent again")


def _fault_of(call: Callable[[], None]) -> Exception | None:
    """What `call` raises: raised here too, but only once the other ranks know of it."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - `_agree` raises it
        return error
    return None
