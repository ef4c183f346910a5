"""Which checkpoint is picked: never one that is half written, cut off or changed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl.learner.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    BrokenCheckpoint,
    Manifest,
    begin,
    check,
    checkpoints,
    entry_of,
    finish,
    give_up,
    name_of,
    newest,
    partial_of,
    read_manifest,
    remove,
    step_of,
    whole,
)


def _write(folder: Path, *contents: bytes) -> Path:
    """A checkpoint with a file of each content."""
    partial = begin(folder)
    for rank, content in enumerate(contents):
        (partial / f"rank-{rank}").write_bytes(content)
    finish(folder, _manifest(partial, len(contents)))
    return folder


def _manifest(partial: Path, ranks: int, version: int = FORMAT) -> Manifest:
    return Manifest(
        format=version,
        ranks=ranks,
        steps_taken={"policy": 3},
        gradient_norms={"policy": [0.5]},
        extra={"multiplier": 0.25},
        files=[entry_of(partial, f"rank-{rank}") for rank in range(ranks)],
    )


def test_the_newest_is_that_of_the_highest_step(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None and newest(tmp_path) is None
    for step in (9, 10, 2):
        _write(tmp_path / name_of(step), b"state")
    (tmp_path / "step-11").mkdir()
    (tmp_path / "notes").mkdir()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [11, 10, 9, 2]
    assert newest(tmp_path) == tmp_path / "step-10"
    assert check(newest(tmp_path)).extra == {"multiplier": 0.25}  # type: ignore[arg-type]


def test_what_is_being_written_is_not_there_yet(tmp_path: Path) -> None:
    folder = tmp_path / "step-4"
    partial = begin(folder)
    (partial / "rank-0").write_bytes(b"state")
    assert not whole(folder) and checkpoints(tmp_path) == []
    finish(folder, _manifest(partial, 1))
    assert whole(folder) and newest(tmp_path) == folder and not partial_of(folder).exists()
    with pytest.raises(FileExistsError, match="never overwritten"):
        begin(folder)


def test_one_that_was_given_up_or_removed_leaves_nothing(tmp_path: Path) -> None:
    begin(tmp_path / "step-1")
    give_up(tmp_path / "step-1")
    again = _write(tmp_path / "step-2", b"state")
    partial_of(again).mkdir()  # a death while an earlier one of this step was removed
    (partial_of(again) / "rank-0").write_bytes(b"sta")
    remove(again)
    assert os.listdir(tmp_path) == []


def test_another_format_is_told_so(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    finish(folder, _manifest(begin(folder), 0, FORMAT + 1))
    with pytest.raises(BrokenCheckpoint, match=f"has format {FORMAT + 1}, this asyncrl reads {FORMAT}"):
        read_manifest(folder)


def test_ranks_share_the_reading_of_it(tmp_path: Path) -> None:
    folder = _write(tmp_path / "step-1", b"zero", b"one", b"two")
    (folder / "rank-1").write_bytes(b"ONE")
    check(folder, 0, 2)
    with pytest.raises(BrokenCheckpoint, match="rank-1 has another checksum"):
        check(folder, 1, 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(data=st.data())
def test_no_change_of_a_byte_or_a_length_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tmp_path = tmp_path_factory.mktemp("changed")
    good = _write(tmp_path / "step-1", b"old state")
    folder = _write(tmp_path / "step-2", *data.draw(st.lists(st.binary(min_size=1), min_size=1, max_size=3)))
    path = folder / data.draw(st.sampled_from(sorted(os.listdir(folder))))
    raw = path.read_bytes()
    change: Callable[[], bytes] = data.draw(
        st.sampled_from(
            [
                lambda: raw[: data.draw(st.integers(0, len(raw) - 1))],
                lambda: raw + data.draw(st.binary(min_size=1)),
                lambda: _flipped(raw, data.draw(st.integers(0, len(raw) * 8 - 1))),
            ]
        )
    )
    path.write_bytes(change())
    assert newest(tmp_path) == good
    with pytest.raises(BrokenCheckpoint):
        check(folder)
    path.unlink()
    assert not whole(folder) and newest(tmp_path) == good


def _flipped(raw: bytes, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_it_is_found_without_torch() -> None:
    """The launcher looks for checkpoints, and starts in a moment."""
    program = textwrap.dedent(
        """
        import sys
        import asyncrl.learner.checkpoint_folder
        sys.exit("torch" in sys.modules)
        """
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, timeout=60)


def test_the_manifest_names_every_file(tmp_path: Path) -> None:
    folder = _write(tmp_path / "step-1", b"zero", b"one")
    named = {entry.name for entry in read_manifest(folder).files}
    assert named == set(os.listdir(folder)) - {MANIFEST}
