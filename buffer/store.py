"""A shard's folder: which generation is written, when the next begins, what may be deleted, snapshots and restores.

A generation begins with a base (the whole state but the tokens) and goes on with its streams. A snapshot begins a new one, so
that a checkpoint lies on the edge between two files; a restore begins a new one too, from the snapshot's base, and moves
what came after it aside (`abandoned-N/`). A file is deleted (`keep_log = "needed"`) when no live rollout has tokens in it and no
snapshot names it. Every step may be cut short by a crash: the base is written first, and the rest follows from it when the
folder is opened again. One process at a time has it open (`lock`). Called by `shard`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.buffer import base
from asyncrl.buffer.book import Book
from asyncrl.buffer.columns import Columns
from asyncrl.buffer.config import BufferConfig
from asyncrl.buffer.errors import BadRequest, DiskFull, FolderInUse
from asyncrl.buffer.journal import STREAMS
from asyncrl.buffer.log import Log, disk_full, file_of, journal_of
from asyncrl.buffer.records import LedgerSettings, Recovery
from asyncrl.buffer.recovery import Recovered, newest_base, recover
from asyncrl.buffer.schema import State
from asyncrl.buffer.token_files import TokenFiles

logger = logging.getLogger(__name__)


class SnapshotFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `snapshot-STEP.json` says."""

    step: int
    generation: int
    """Its base is the state."""
    needs: list[int]
    """Generations with tokens of rollouts that were live then."""
    version: int
    frontier: int


def snapshot_of(folder: Path, step: int) -> Path:
    """The file that says there is one. `folder` is a shard's."""
    return folder / f"snapshot-{step:08d}.json"


def lacks_of_snapshot(folder: Path, step: int) -> str:
    """What a shard's `restore(step)` would miss; empty where it is all there. For whoever looks at a run that is not up."""
    path = snapshot_of(folder, step)
    try:
        snapshot = msgspec.json.decode(path.read_bytes(), type=SnapshotFile)
    except FileNotFoundError:
        return f"{path} is not there"
    except msgspec.DecodeError as error:
        return f"{path} cannot be read: {error}"
    state = base.path_of(folder, snapshot.generation)
    if not state.is_file() or base.decode(state.read_bytes()) is None:
        return f"{state} is damaged or not there"
    gone = [
        generation for generation in snapshot.needs if not file_of(folder, "segments", generation).is_file()
    ]
    return f"tokens of generations {gone} are not there" if gone else ""


class Store:
    """`book` and `columns` are the state; `log` takes what changes it."""

    def __init__(
        self,
        folder: Path,
        settings: LedgerSettings,
        config: BufferConfig,
        clock: Callable[[], float],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._settings, self._config, self._clock = folder, settings, config, clock
        self._fsync = config.durability == "fsync"
        self.files = self._new_files()
        self.recovery: Recovery | None = None
        self._lock = _locked(folder)
        try:
            self._begin()
        except BaseException:
            self._unlock()
            raise

    def _begin(self) -> None:
        state = newest_base(self.folder)
        if state is not None:
            self._recover(state)
            return
        state = base.dump(Book(self._settings), Columns(self.files), 1, [], 0)
        base.write(base.path_of(self.folder, 1), base.encode(state))
        self._open(state)

    def _new_files(self) -> TokenFiles:
        budget = self._config.memory_bytes // self._settings.shards
        return TokenFiles(budget, lambda generation: file_of(self.folder, "segments", generation))

    def _recover(self, state: base.BaseState) -> None:
        found = self._open(state)
        self.recovery = Recovery(
            commits=found.commits,
            cut_bytes=found.cut_bytes,
            live_rollouts=len(self.book.rollouts),
            live_tokens=sum(r.length for r in self.book.rollouts.values()),
        )
        logger.info("recovered %s: %s", self.folder, self.recovery)

    def _open(self, state: base.BaseState) -> Recovered:
        self._set_aside(state)
        found = recover(self.folder, state, self._settings, self.files, self._clock)
        self.book, self.columns = found.book, found.columns
        self.history = state.history
        self.log = Log(
            self.folder, state.generation, fsync=self._fsync, next_seq=found.next_seq, last=found.last
        )
        return found

    def _set_aside(self, state: base.BaseState) -> None:
        """Moves away the files of generations that a restore abandoned, and forgets the snapshots that were taken in them."""
        past = {*state.history, state.generation}
        for snapshot in self.snapshots().values():
            then = base.decode(base.path_of(self.folder, snapshot.generation).read_bytes())
            if then is not None and not past.issuperset(then.history):
                self._snapshot_path(snapshot.step).unlink()
        for generation in self._generations():
            if generation in past or generation > state.generation:
                continue
            aside = self.folder / f"abandoned-{state.generation:06d}"
            aside.mkdir(exist_ok=True)
            for path in self._streams_of(generation):
                if path.exists():
                    path.rename(aside / path.name)

    def _generations(self) -> list[int]:
        return sorted(int(p.name.split("-")[1]) for p in self.folder.glob("journal-*"))

    def _streams_of(self, generation: int) -> list[Path]:
        streams = [file_of(self.folder, name, generation) for name in STREAMS]
        return [*streams, journal_of(self.folder, generation)]

    # ---- the next generation -----------------------------------------------------------------------------------

    @property
    def wants_rotation(self) -> bool:
        return self.log.segment_bytes >= self._config.rotate_bytes

    def rotate_log(self) -> None:
        """The log has grown enough. As durable as the log itself, and on the disk where it takes an older one's place."""
        self._rotate(fsync=self._fsync or self._config.keep_log == "needed")
        self._delete_unneeded()

    def _rotate(self, *, fsync: bool) -> int:
        """Begins the next generation with the present state, which must be committed; returns its number."""
        generation = self.log.generation + 1
        history = [*self.history, self.log.generation]
        state = base.dump(self.book, self.columns, generation, history, self.log.next_seq)
        try:
            base.write(base.path_of(self.folder, generation), base.encode(state), fsync=fsync)
            log = Log(self.folder, generation, fsync=self._fsync, next_seq=self.log.next_seq)
        except (DiskFull, OSError) as error:
            self._take_back(generation)
            raise disk_full(self.folder, error) from error
        self.log.close()
        self.log, self.history = log, history
        return generation

    def _delete_unneeded(self) -> None:
        if self._config.keep_log == "all":
            return
        needed = {self.log.generation, *self._live_generations()}
        for snapshot in self.snapshots().values():
            needed |= {snapshot.generation, *snapshot.needs}
        bases = {int(p.stem.split("-")[1]) for p in self.folder.glob("base-*.msgpack")}
        for generation in {*self._generations(), *bases} - needed:
            for path in (*self._streams_of(generation), base.path_of(self.folder, generation)):
                path.unlink(missing_ok=True)
            self.files.forget_file(generation)
        for path in self.folder.glob("abandoned-*"):
            shutil.rmtree(path)

    def _live_generations(self) -> set[int]:
        return {p.generation for pieces in self.columns.answers.values() for p in pieces}

    # ---- snapshots ---------------------------------------------------------------------------------------------

    def snapshots(self) -> dict[int, SnapshotFile]:
        found = (
            msgspec.json.decode(path.read_bytes(), type=SnapshotFile)
            for path in self.folder.glob("snapshot-*.json")
        )
        return {snapshot.step: snapshot for snapshot in found}

    def snapshot(self, step: int, keep: Sequence[int]) -> SnapshotFile:
        """Ties the present state, which must be committed, to `step`; then forgets snapshots not in `keep`."""
        needs = sorted(self._live_generations())
        snapshot = SnapshotFile(
            step=step,
            generation=self._rotate(fsync=True),
            needs=needs,
            version=self.book.version,
            frontier=self.book.frontier,
        )
        try:
            base.write(self._snapshot_path(step), msgspec.json.encode(snapshot))
        except OSError as error:
            base.remove(self._snapshot_path(step))
            raise disk_full(self.folder, error) from error
        for other in self.snapshots():
            if other not in keep and other != step:
                self._snapshot_path(other).unlink()
        self._delete_unneeded()
        return snapshot

    def _snapshot_path(self, step: int) -> Path:
        return snapshot_of(self.folder, step)

    def restore(self, step: int) -> SnapshotFile:
        """Goes back to the state at `step`. Leases are void, nothing goes out until its version is published again."""
        snapshot = self.snapshots().get(step)
        if snapshot is None:
            raise BadRequest(
                f"no snapshot of step {step} in {self.folder}; there are {sorted(self.snapshots())}"
            )
        state = base.decode(base.path_of(self.folder, snapshot.generation).read_bytes())
        if state is None:
            raise BadRequest(f"the base of snapshot {step} in {self.folder} is damaged")
        rewound = self._rewound(state)
        try:
            base.write(base.path_of(self.folder, rewound.generation), base.encode(rewound))
            # Its files are made before the present ones are left: where there is no room for them nothing has changed.
            Log(self.folder, rewound.generation, fsync=self._fsync, next_seq=rewound.next_seq).close()
        except (DiskFull, OSError) as error:
            self._take_back(rewound.generation)
            raise disk_full(self.folder, error) from error
        self.log.close()
        self.files = self._new_files()
        self._open(rewound)
        return snapshot

    def _take_back(self, generation: int) -> None:
        """Removes what there is of a generation that could not be begun: it would be the one to recover, and the present
        one still grows. The base goes last: streams without one would be in the way of the next try."""
        for path in self._streams_of(generation):
            path.unlink(missing_ok=True)
        base.remove(base.path_of(self.folder, generation))

    def _rewound(self, state: base.BaseState) -> base.BaseState:
        """The snapshot's state as the beginning of a new generation."""
        group, rollout, _, batch = state.next_ids
        return msgspec.structs.replace(
            state,
            generation=self.log.generation + 1,
            serving=False,
            # Leases of the abandoned time must not come again: their engines may still be sending.
            next_ids=(group, rollout, self.book.next_lease, batch),
            engines={},
            # A prompt that was found to be bad stays bad.
            quarantined={**state.quarantined, **self.book.quarantined},
            rollouts=_unleased(state.rollouts),
        )

    def close(self) -> None:
        self.log.close()
        self._unlock()

    def _unlock(self) -> None:
        # By name: a child that is just being started has this descriptor too, until it runs its program.
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)


def _locked(folder: Path) -> int:
    """The descriptor that holds the folder. The system lets go of it with the process, however that ends."""
    path = folder / "lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise FolderInUse(
            f"{folder} is open in another process, which holds {path}: expected one writer alone. End that run (`fuser {path}` "
            "names the process), or give this one another name"
        ) from error
    except OSError:
        os.close(lock)
        raise
    return lock


def _unleased(rollouts: base.RolloutColumns) -> base.RolloutColumns:
    held = [state in (State.LEASED, State.COMPLETE) for state in rollouts.states]

    def freed(column: list[Any], value: Any) -> list[Any]:
        return [value if is_held else field for field, is_held in zip(column, held, strict=True)]

    return msgspec.structs.replace(
        rollouts,
        states=freed(rollouts.states, int(State.QUEUED)),
        lease_ids=freed(rollouts.lease_ids, 0),
        engine_ids=freed(rollouts.engine_ids, ""),
    )
