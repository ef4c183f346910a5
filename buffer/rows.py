"""Changes of state on their way to the log: packed as they happen, read as columns. Pure.

Six of them are made for each rollout of a run, so they are kept as bytes of one fixed layout and not as objects; the log
takes whole columns of them. Called by `book`, `log`, and tests.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from asyncrl.buffer.records import PUBLISHED, Rollout, Transition
from asyncrl.buffer.schema import State

STATE_NAMES = [*(state.name for state in State), PUBLISHED]
_PUBLISHED = len(State)
_LAYOUT = np.dtype(
    [
        ("rollout_id", "<i8"),
        ("group_id", "<i8"),
        ("lease_id", "<i8"),
        ("batch_id", "<i8"),
        ("version", "<i4"),
        ("attempts", "<i4"),
        ("engine", "<i4"),
        ("reason", "<i4"),
        ("reward", "<f4"),
        ("cost", "<f4"),
        ("state", "<i4"),
    ]
)
_FEW = 16
"""Rows from which numpy pays."""
_pack = struct.Struct("<qqqqiiiiffi").pack


class StateRows:
    """Rows since the log last took them. `engines` and `reasons` name what the rows hold by number."""

    __slots__ = ("_data", "engines", "reasons")

    def __init__(self) -> None:
        self._data = bytearray()
        self.engines: dict[str, int] = {"": 0}
        self.reasons: dict[str, int] = {"": 0}

    def __len__(self) -> int:
        return len(self._data) // _LAYOUT.itemsize

    def add(
        self,
        rollout_id: int,
        group_id: int,
        state: int,
        version: int,
        lease_id: int,
        attempts: int,
        batch_id: int,
        engine_id: str,
        reason: str,
        reward: float,
        cost: float,
    ) -> None:
        engine = self.engines.get(engine_id)
        if engine is None:
            engine = self.engines[engine_id] = len(self.engines)
        number = 0
        if reason:
            number = self.reasons.setdefault(reason, len(self.reasons))
        self._data += _pack(
            rollout_id, group_id, lease_id, batch_id, version, attempts, engine, number, reward, cost, state
        )

    def add_many(self, rollouts: Sequence[Rollout], version: int) -> None:
        """A row for each of the rollouts as they stand, without a reason; what is the same for all is written once."""
        if len(rollouts) < _FEW:
            for r in rollouts:
                group = r.group
                self.add(
                    r.rollout_id,
                    group.group_id,
                    r.state,
                    version,
                    r.lease_id,
                    r.attempts,
                    group.batch_id,
                    r.engine_id,
                    "",
                    0.0,
                    0.0,
                )
            return
        rows = np.zeros(len(rollouts), _LAYOUT)
        number = self.engines.setdefault
        rows["rollout_id"] = [r.rollout_id for r in rollouts]
        rows["group_id"] = [r.group.group_id for r in rollouts]
        rows["lease_id"] = [r.lease_id for r in rollouts]
        rows["batch_id"] = [r.group.batch_id for r in rollouts]
        rows["attempts"] = [r.attempts for r in rollouts]
        rows["engine"] = [number(r.engine_id, len(self.engines)) for r in rollouts]
        rows["state"] = rollouts[0].state
        rows["version"] = version
        self._data += rows.tobytes()

    def published(self, version: int) -> None:
        self.add(0, 0, _PUBLISHED, version, 0, 0, 0, "", "", 0.0, 0.0)

    def columns(self) -> np.ndarray:
        """Structured [rows]: the fields of `Transition`, with numbers for engine, reason and state."""
        return np.frombuffer(self._data, _LAYOUT)

    def __iter__(self) -> Iterator[Transition]:
        engines, reasons = list(self.engines), list(self.reasons)
        for row in self.columns().tolist():
            rollout, group, lease, batch, version, attempts = row[:6]
            engine, reason, reward, cost, state = row[6:]
            yield Transition(
                rollout,
                group,
                STATE_NAMES[state],
                version,
                lease,
                attempts,
                batch,
                engines[engine],
                reasons[reason],
                reward,
                cost,
            )
