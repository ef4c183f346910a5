"""What a checkpoint's folder holds, and whether it is whole. Reads and writes files; knows no tensor and no process group.

    step-12/                          one checkpoint; the number is the run's step
        checkpoint.json               the manifest: written last, with the size and the checksum of every other file
        rank-00000.safetensors        what that rank held: shards of weights and optimizer states

Invariants:
- Whatever is being written lies in `.partial-step-12`, and is renamed when all of it is on the disk. So a folder of a
  checkpoint's name is whole, unless somebody changed it afterwards; `whole` sees other sizes, `check` any other byte.
- Nothing is pickled: a checkpoint cannot run code when it is read.
Called by `checkpoint` and `export`, and by whoever runs the learner to find the newest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import xxhash

FORMAT = 1
MANIFEST = "checkpoint.json"
SUFFIX = ".safetensors"
_PARTIAL = ".partial-"
_NAME = re.compile(r"step-(\d+)$")
_READ_BYTES = 1 << 22


class BrokenCheckpoint(ValueError):
    """A checkpoint that is not whole, is of another format, or does not fit what is to be restored."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    """With / within the checkpoint's folder."""
    bytes: int
    xxh3: str
    """Of 128 bits, in hexadecimal."""


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: int
    ranks: int
    """Of the learner that wrote it; any number may restore it."""
    steps_taken: dict[str, int]
    """Optimizer steps, by the name of what is trained."""
    gradient_norms: dict[str, list[float]]
    """Of the steps before, likewise: what the next norm is measured by."""
    extra: dict[str, Any]
    """`Learner.extra_state()`."""
    files: list[FileEntry]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    manifest: msgspec.Raw
    xxh3: str


def name_of(step: int) -> str:
    return f"step-{step}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's name; None for any other name."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else None


def checkpoints(folder: Path) -> list[Path]:
    """All that are named like one, the newest first; none where there is no such folder."""
    if not folder.is_dir():
        return []
    named = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None]
    return [path for _, path in sorted(named, reverse=True)]


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` of which every byte is as it was written; None if there is none.

    Reads all of it, and of those after it that are broken.
    """
    for path in checkpoints(folder):
        if whole(path) and not _changed(path, read_manifest(path).files):
            return path
    return None


def whole(folder: Path) -> bool:
    """It has a manifest, and every file that this names in its size. Reads no more than the manifest."""
    try:
        files = read_manifest(folder).files
    except BrokenCheckpoint:
        return False
    return all(_size(folder / entry.name) == entry.bytes for entry in files)


def check(folder: Path, part: int = 0, parts: int = 1) -> Manifest:
    """Reads every `parts`-th file from file `part` on. Raises `BrokenCheckpoint` if a byte is not as it was written."""
    manifest = read_manifest(folder)
    wrong = _changed(folder, manifest.files[part::parts])
    if wrong:
        raise BrokenCheckpoint(f"checkpoint {folder} is broken: {wrong}. Take an older one")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Raises `BrokenCheckpoint` if it is not there, or not as it was written."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        sealed = msgspec.json.decode(raw, type=_Sealed)
        # Encoded again, as a space between its parts is no other JSON, but other bytes.
        if xxhash.xxh3_128_hexdigest(sealed.manifest) != sealed.xxh3 or msgspec.json.encode(sealed) != raw:
            raise BrokenCheckpoint(f"{path} was changed since it was written. Take an older checkpoint")
        manifest = msgspec.json.decode(sealed.manifest, type=Manifest)
    except (OSError, UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise BrokenCheckpoint(
            f"{folder} is no whole checkpoint: its {MANIFEST} cannot be read ({error}). Take an older one"
        ) from error
    if manifest.format != FORMAT:
        raise BrokenCheckpoint(
            f"{folder} has format {manifest.format}, this asyncrl reads {FORMAT}: use the version that wrote it"
        )
    return manifest


def begin(folder: Path) -> Path:
    """The empty folder to write into, beside `folder`. What earlier ones left half written is removed.

    Raises FileExistsError if `folder` is there. One learner at a time writes checkpoints side by side.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; a checkpoint is never overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)
    partial = partial_of(folder)
    partial.mkdir()
    return partial


def partial_of(folder: Path) -> Path:
    return folder.with_name(f"{_PARTIAL}{folder.name}")


def finish(folder: Path, manifest: Manifest) -> None:
    """Makes `folder` of what lies in its partial one: manifest, disk, name, in that order."""
    partial = partial_of(folder)
    raw = msgspec.json.encode(manifest)
    sealed = _Sealed(manifest=msgspec.Raw(raw), xxh3=xxhash.xxh3_128_hexdigest(raw))
    (partial / MANIFEST).write_bytes(msgspec.json.encode(sealed))
    to_disk([partial / MANIFEST, partial])
    partial.rename(folder)
    to_disk([folder.parent])


def give_up(folder: Path) -> None:
    """Removes what was written of it."""
    shutil.rmtree(partial_of(folder), ignore_errors=True)


def remove(folder: Path) -> None:
    """It loses its name at once, whatever happens meanwhile, and then its files."""
    partial = partial_of(folder)
    give_up(folder)  # what a death left there would be in the way
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def entry_of(folder: Path, name: str) -> FileEntry:
    """Of a file that is on the disk."""
    return FileEntry(name=name, bytes=(folder / name).stat().st_size, xxh3=digest(folder / name))


def digest(path: Path) -> str:
    hashed = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            hashed.update(block)
    return hashed.hexdigest()


def to_disk(paths: Iterable[Path]) -> None:
    """A rename may reach the disk before the bytes do; a crash would then leave a named folder of empty files."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _changed(folder: Path, files: Sequence[FileEntry]) -> str:
    """What is wrong with the first file that is not as it was written; empty if none is."""
    for entry in files:
        size = _size(folder / entry.name)
        if size != entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            return f"{entry.name} {found}, written were {entry.bytes}"
        if digest(folder / entry.name) != entry.xxh3:
            return f"{entry.name} has another checksum than it was written with"
    return ""


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
