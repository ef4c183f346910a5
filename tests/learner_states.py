"""A learner's checkpoint as files alone: for tests of those who keep and pick checkpoints, without a learner."""

from __future__ import annotations

from pathlib import Path

from asyncrl.learner.checkpoint_folder import FORMAT, Manifest, begin, entry_of, finish, partial_of


def write_state(path: Path, **files: bytes) -> Path:
    """A whole one of these files, `.safetensors` added to their names. Returns `path`."""
    partial = begin(path)
    for name, data in files.items():
        (partial / f"{name}.safetensors").write_bytes(data)
    finish_state(path)
    return path


def finish_state(path: Path) -> None:
    """It is written: what lies in its partial folder is all of it."""
    partial = partial_of(path)
    entries = [entry_of(partial, file.name) for file in sorted(partial.iterdir())]
    finish(
        path,
        Manifest(format=FORMAT, ranks=1, steps_taken={}, gradient_norms={}, extra={}, files=entries),
    )
