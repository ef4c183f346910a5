"""Checkpoints of the learner: written in the background while training goes on, restored onto any number of ranks.

    write: wait for the one before -> copy this rank's shards to the host -> training goes on
           in a thread: file to the disk -> all ranks' files are there -> rank 0: manifest, rename -> all ranks know

Invariants:
- What is written is the state at `write`: the copy on the host is this module's own, and it is not touched before it is written.
- A checkpoint has its name only when it is whole (`checkpoint_folder`); a rank that fails or dies leaves a `.partial-` folder.
- All ranks come to the same end: each of them raises `CheckpointFailed` where one did, at the next `write` or `finished`.
- The ranks talk over a group of their own (gloo), with a deadline, in tensors: DCP's own talk between ranks would be pickles.
Called by `step`, on every rank, from one thread.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from asyncrl.learner import checkpoint_folder
from asyncrl.learner.checkpoint_folder import (
    SUFFIX,
    BrokenCheckpoint,
    FileEntry,
    Manifest,
    check,
    newest,
    partial_of,
    whole,
)
from asyncrl.learner.checkpoint_state import load_trained, own_shards
from asyncrl.learner.shard_file import Shard, write_shards
from asyncrl.learner.trained import Trained

__all__ = ["BrokenCheckpoint", "CheckpointFailed", "Checkpoints", "newest", "whole"]

logger = logging.getLogger(__name__)


class CheckpointFailed(RuntimeError):
    """A checkpoint was not written, on any rank; the ones before are as they were."""


class Checkpoints:
    """Of one rank. `write`, `restore` are collectives; `finished` and `close` are not."""

    def __init__(
        self, trained: Mapping[str, Trained], rank: int, ranks: int, device: torch.device, timeout_s: float
    ) -> None:
        """`device`: where the learner's collectives run. `timeout_s`: for the ranks to meet after a file was written, and for a
        checkpoint that is under way when the next one begins."""
        self._trained, self._rank, self._ranks, self._device = trained, rank, ranks, device
        self._timeout_s = timeout_s
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._group: dist.ProcessGroup | None = None
        self._host: dict[str, torch.Tensor] = {}
        """By name: the copies that are being written, reused from one checkpoint to the next."""
        self._writing: tuple[Path, concurrent.futures.Future[None]] | None = None
        self._last: Path | None = None

    def write(self, folder: Path, extra: Mapping[str, Any]) -> None:
        """Returns when the state is copied; `folder`, which must not be there, appears when it is whole. A collective.

        Waits for the checkpoint before, and raises `CheckpointFailed` if that failed, or if this one cannot begin. `extra` goes
        into the manifest: what JSON has.
        """
        error = self._begin(folder)
        if not self._all_well(error is None):
            raise error or CheckpointFailed(f"checkpoint {folder} cannot begin: see the other ranks")
        if self._ranks > 1 and self._group is None:
            timeout = datetime.timedelta(seconds=self._timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        shards = self._copied(own_shards(self._trained, self._rank))
        manifest = Manifest(
            format=checkpoint_folder.FORMAT,
            ranks=self._ranks,
            steps_taken={name: one.steps_taken for name, one in self._trained.items()},
            gradient_norms={name: list(one.norms.recent) for name, one in self._trained.items()},
            extra=dict(extra),
            files=[],
        )
        self._writing = folder, self._writer.submit(self._write, folder, shards, manifest)

    def finished(self, timeout_s: float) -> Path | None:
        """The last checkpoint that is whole, after waiting up to `timeout_s` for the one under way. On any rank, by itself.

        Raises `CheckpointFailed` once for one that failed.
        """
        if self._writing is not None and concurrent.futures.wait([self._writing[1]], timeout_s).done:
            (folder, done), self._writing = self._writing, None
            try:
                done.result()
            except (OSError, RuntimeError) as error:  # of the latter also gloo's, when a rank does not come
                raise CheckpointFailed(f"checkpoint {folder} was not written: {error}") from error
            self._last = folder
        return self._last

    def restore(self, folder: Path) -> dict[str, Any]:
        """Puts everything back that `write` took, whatever the number of ranks was. A collective. Returns `extra`.

        Every byte is checked before the first weight changes. Raises `BrokenCheckpoint`, on every rank.
        """
        wrong, manifest = "", None
        try:
            manifest = check(folder, self._rank, self._ranks)
            if manifest.steps_taken.keys() != self._trained.keys():
                wrong = (
                    f"checkpoint {folder} has {', '.join(manifest.steps_taken)}, the recipe trains {', '.join(self._trained)}: "
                    "use the objective that it was written with"
                )
        except (BrokenCheckpoint, OSError) as error:
            wrong = str(error)
        if not self._all_well(not wrong) or manifest is None:
            raise BrokenCheckpoint(wrong or f"checkpoint {folder} is broken, another rank found")
        load_trained(folder, self._trained, self._rank)
        for name, one in self._trained.items():
            one.take_up(manifest.steps_taken[name], manifest.gradient_norms[name])
        logger.info("restored checkpoint folder=%s ranks_then=%d", folder, manifest.ranks)
        return manifest.extra

    def close(self) -> None:
        """Waits for the checkpoint under way, as long as it takes to meet its deadlines; an error of it is only logged."""
        try:
            self.finished(self._timeout_s)
        except CheckpointFailed as error:
            logger.error("last checkpoint failed error=%s", error)
        self._writer.shutdown(wait=False)

    def _begin(self, folder: Path) -> CheckpointFailed | None:
        """Why this rank cannot."""
        try:
            self.finished(self._timeout_s)
            if self._writing is not None:
                return CheckpointFailed(
                    f"checkpoint {folder} cannot begin: the one before is still being written after {self._timeout_s:g} s. "
                    "Is the disk that slow?"
                )
            if self._rank == 0:
                checkpoint_folder.begin(folder)
        except CheckpointFailed as error:
            return error
        except OSError as error:
            return CheckpointFailed(f"checkpoint {folder} cannot begin: {error}")
        return None

    def _copied(self, shards: list[Shard]) -> list[Shard]:
        """The shards, in host memory of our own."""
        pinned = self._device.type == "cuda"
        for shard in shards:
            host = self._host.get(shard.name)
            if host is None or host.shape != shard.data.shape or host.dtype != shard.data.dtype:
                host = torch.empty(shard.data.shape, dtype=shard.data.dtype, pin_memory=pinned)
                self._host[shard.name] = host
            host.copy_(shard.data, non_blocking=pinned)
        if pinned:
            torch.cuda.synchronize(self._device)
        return [Shard(shard.name, shard.offsets, self._host[shard.name]) for shard in shards]

    def _write(self, folder: Path, shards: list[Shard], manifest: Manifest) -> None:
        """In the thread. Waits for the disk, and twice for the other ranks: for their files, and for rank 0's rename."""
        path, error, entry = partial_of(folder) / f"rank-{self._rank:05}{SUFFIX}", None, None
        try:
            path.parent.mkdir(exist_ok=True)
            entry = write_shards(path, shards)
        except OSError as caught:
            error = caught
        files = self._all_entries(entry)
        if self._rank == 0 and error is None:
            try:
                _finish(folder, files, manifest)
            except OSError as caught:
                error = caught
        if not self._all_well(error is None, self._group):
            if self._rank == 0:
                checkpoint_folder.give_up(folder)
            raise error or OSError("another rank could not write its file")
        logger.info("wrote checkpoint folder=%s", folder)

    def _all_entries(self, mine: FileEntry | None) -> list[FileEntry | None]:
        """Every rank's file, by rank; None of a rank that wrote none."""
        row = [0, 0, 0] if mine is None else [mine.bytes, *_halves(mine.xxh3)]
        own = torch.tensor(row, dtype=torch.int64)
        rows = [own]
        if self._ranks > 1:
            rows = [torch.zeros_like(own) for _ in range(self._ranks)]
            dist.all_gather(rows, own, group=self._group)
        return [
            FileEntry(name=f"rank-{rank:05}{SUFFIX}", bytes=size, xxh3=_joined(high, low)) if size else None
            for rank, (size, high, low) in enumerate(row.tolist() for row in rows)
        ]

    def _all_well(self, well: bool, group: dist.ProcessGroup | None = None) -> bool:
        if self._ranks == 1:
            return well
        flag = torch.tensor(float(well), device="cpu" if group else self._device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
        return bool(flag)


def _finish(folder: Path, files: list[FileEntry | None], manifest: Manifest) -> None:
    for rank, entry in enumerate(files):
        if entry is None:
            raise OSError(f"rank {rank} could not write its file")
        if not (partial_of(folder) / entry.name).is_file():
            raise OSError(
                f"rank {rank}'s {entry.name} is not in {partial_of(folder)} on rank 0's machine: the run's folder must be on a "
                "disk that all machines of the learner share"
            )
    there = [entry for entry in files if entry is not None]
    checkpoint_folder.finish(folder, msgspec.structs.replace(manifest, files=there))


def _halves(xxh3: str) -> tuple[int, int]:
    """128 bits as two signed numbers of 64."""
    raw = bytes.fromhex(xxh3)
    return int.from_bytes(raw[:8], "big", signed=True), int.from_bytes(raw[8:], "big", signed=True)


def _joined(high: int, low: int) -> str:
    return high.to_bytes(8, "big", signed=True).hex() + low.to_bytes(8, "big", signed=True).hex()
