"""The publisher where engines may be some versions behind each other (`max_lag_versions` of 1 or more): a version is live as
soon as its bytes are complete, and each engine takes it when it can.

    begin(v)    waits until nobody in service runs less than v - max_lag_versions
    commit()    returns at once; the version is proposed to whoever can take it
    welcome()   sees engines on their way; returns the report of one that has ended its update

Beside what `Publisher` promises
----------
- A slow engine holds up no other engine, and the learner only at the bound: then for `timeout_s` at the most, after which it is
  out of service.
- The bytes of a version are not written over while an engine that is to apply them may read them; if one that is to take a later
  one instead, or is no member any more, may still read them, they stay as they are and the next version gets new memory. That
  memory takes the file's name over: what a reader keeps from staging to applying is its mapping, or the inode, not the name.
- Engines start, join and come back on the one path of `rolling`; there is no other.
Called as `Publisher` is.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import torch

from asyncrl.weight_sync import wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.device_memory import DeviceSlots
from asyncrl.weight_sync.errors import ProbeMismatch, WeightSyncError
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.probe import Difference, Probe, largest_difference
from asyncrl.weight_sync.publisher import STAGING_SHARE, Publisher, never
from asyncrl.weight_sync.ranks import Ranks
from asyncrl.weight_sync.report import SyncReport
from asyncrl.weight_sync.rolling import Rolling
from asyncrl.weight_sync.rolling_exchange import LOOK_S, Ended, RollingExchange
from asyncrl.weight_sync.sockets import Secure
from asyncrl.weight_sync.version import Version

logger = logging.getLogger(__name__)

_KEPT: Final = 1000
"""Reports that are kept until `welcome` returns them; the oldest go first."""


class RollingPublisher(Publisher):
    """Sends versions of one model to engines that take them one by one."""

    def __init__(
        self,
        config: WeightSyncConfig,
        run_id: str,
        plan: Plan,
        host: str = "127.0.0.1",
        secure: Secure | None = None,
        *,
        max_lag_versions: int,
        device: DeviceSlots | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`max_lag_versions`: 1 or more. Takes `max(2, max_lag_versions)` times the plan's bytes of shared memory; or `device`, of
        two allocations: see `Publisher`. Raises `SharedMemoryError`, `ValueError`."""
        if device is not None and device.count < 2:
            raise ValueError(
                "max_lag_versions: expected 0 where the GPU has room for one version only, as the one before is gone when the next "
                f"is begun; got {max_lag_versions}"
            )
        self._rolling = Rolling(
            max_lag_versions,
            stage_s=STAGING_SHARE * config.timeout_s,
            apply_s=(1 - STAGING_SHARE) * config.timeout_s,
            attempts=itertools.count(1),
        )
        super().__init__(
            config, run_id, plan, host, secure, slots=max(2, max_lag_versions), device=device, ranks=ranks
        )
        self._exchange = RollingExchange(self._members, self._rolling, self, self._note)
        self._held: dict[int, Version] = {}
        """Versions whose bytes are still there."""
        self._reports: deque[SyncReport] = deque(maxlen=_KEPT)
        self._waited_s = 0.0
        self._failed_probe: set[str] = set()
        """Engines that computed other logprobs than the learner since one computed the same."""

    def write(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """See `Publisher`. Engines on their way go on between two buckets."""
        super().write(bucket, pieces)
        self._exchange.step(0.0)

    def commit(self, probe: Probe | None = None) -> SyncReport:
        """The version is live: it is proposed to every engine that is free to take it. The report is the learner's part.

        Raises `WeightSyncError` if buckets are missing.
        """
        draft = self._written()
        self._draft, draft.probe = None, probe
        self._make_live(draft)
        self._held[draft.number] = draft
        self._exchange.publish(draft.number)
        return SyncReport(
            version=draft.number,
            seconds=self._waited_s + time.monotonic() - draft.started,
            wait_s=self._waited_s,
            write_s=draft.write_s,
            transaction_s=0.0,
            total_bytes=self._plan.total_bytes,
            engines={},
            out_of_service={},
            probe_max_diff={},
            digest=draft.digest,
            ignored={},
        )

    def welcome(self, give_way: Callable[[], bool] = never) -> SyncReport | None:
        """The report of an engine whose update has ended, None if there is none.

        Returns with the first; with None once nobody is on the way, or `give_way` is true: all goes on at the next call, and what
        engines say meanwhile is heard then. What `give_way` raises ends it. Raises `ProbeMismatch` when the last engine that runs
        the version, or could, has failed its probe, and `WeightSyncError` when the version's bytes are not those written.
        """
        self._exchange.step(0.0)
        # Waits for: answers. Unblocked by: engines. Ends: one update has ended, which it does by its deadline, or given way.
        while not self._reports and self._rolling.waiting_for and not give_way():
            self._exchange.step(LOOK_S)
        return self._reports.popleft() if self._reports else None

    # ---- what the exchange asks -----------------------------------------------------------------------------------

    def offer(self, version: int, engine_id: str) -> wire.Offer:
        """See `Shelf`."""
        held = self._held[version]
        return held.offer(self._source(held, engine_id))

    def probe(self, version: int, engine_id: str) -> Probe | None:
        """See `Shelf`."""
        return self._members.roster.to_ask(engine_id, self._held[version].probe)

    def digest(self, version: int) -> str:
        """See `Shelf`."""
        return self._held[version].digest

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _make_room(self, version: int) -> None:
        """Waits for engines that are too far behind. Unblocked by: engines. Ends: nobody is, or `timeout_s` is over, after which
        those that were are out."""
        slot, started = self._slots.oldest, time.monotonic()
        number = next((number for number, held in self._held.items() if held.slot is slot), -1)
        replaced = -1 if slot.retired else number
        self._exchange.step(0.0)
        while not self._rolling.may_begin(version, replaced):
            left_s = started + self._timeout_s - time.monotonic()
            if left_s <= 0:
                self._exchange.give_up(version, replaced)
            else:
                self._exchange.step(left_s)
        if self._rolling.readers(replaced):
            slot.retire()
        self._held.pop(number, None)
        self._waited_s = time.monotonic() - started

    def _note(self, ended: Ended) -> None:
        settled, report = ended.settled, ended.settled.report
        for version in settled.reading:
            if version in self._held:
                self._held[version].slot.retire()
        held = self._held.get(settled.version)
        difference = largest_difference(ended.probe, ended.answer) if ended.probe and ended.answer else None
        self._reports.append(
            SyncReport(
                version=settled.version,
                seconds=settled.seconds,
                write_s=0.0,
                transaction_s=settled.seconds,
                total_bytes=self._plan.total_bytes,
                engines={settled.member: report},
                out_of_service={settled.member: settled.error} if settled.error else {},
                probe_max_diff={settled.member: difference.size} if difference else {},
                digest=held.digest if held else "",
                ignored=ended.ignored,
            )
        )
        if (
            held is not None
            and report.outcome == "failed"
            and not report.staged_after_s
            and not held.is_intact()
        ):
            raise WeightSyncError(
                f"{settled.member} could not stage version {held.number}: the bytes in {held.slot.path} are not those that were "
                f"written. Look for another writer of this file, or for bad memory.\n{settled.error}"
            )
        self._judge(ended, difference)

    def _judge(self, ended: Ended, difference: Difference | None) -> None:
        """A probe that fails is one engine's matter as long as another runs that version, or may come to."""
        settled = ended.settled
        if settled.report.outcome == "applied":
            self._failed_probe.clear()
            return
        if ended.probe is None or difference is None or difference.size <= ended.probe.tolerance:
            return
        self._failed_probe.add(settled.member)
        serving = any(version >= 0 for version in self._rolling.versions.values())
        if serving or self._rolling.waiting_for:
            return
        raise ProbeMismatch(
            settled.member,
            settled.version,
            difference.position,
            difference.expected,
            difference.got,
            len(self._failed_probe),
            self._reports[-1],
        )
