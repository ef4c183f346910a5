"""A shard's folder is one process' alone, and what is deleted is replaced on the disk before."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.buffer import base
from asyncrl.buffer.errors import FolderInUse, LogDamaged
from asyncrl.buffer.shard import Shard
from tests.unit.buffer.test_store_model import SETTINGS, Driver, state_of, tiny

HOLDER = """
import sys, time
from pathlib import Path
from asyncrl.buffer.config import BufferConfig
from asyncrl.buffer.records import LedgerSettings
from asyncrl.buffer.shard import Shard

shard = Shard(LedgerSettings(prompts_per_step=2, rollouts_per_prompt=2), BufferConfig(), Path(sys.argv[1]))
print("open", flush=True)
time.sleep(60)
"""


def opened(folder):
    return Shard(SETTINGS, tiny(), folder)


def test_a_folder_that_is_open_is_not_opened_twice(tmp_path):
    shard = opened(tmp_path / "0")
    with pytest.raises(FolderInUse, match=r"/0 is open in another process, which holds .*/0/lock"):
        opened(tmp_path / "0")
    opened(tmp_path / "1").close()  # another shard's
    shard.close()
    opened(tmp_path / "0").close()


def test_who_is_turned_away_leaves_the_folder_as_it_is(tmp_path):
    driver = Driver(tmp_path, tiny())
    driver.round()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FolderInUse):
        opened(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    driver.round()
    state = state_of(driver.shard)
    driver.reopen()
    assert state_of(driver.shard) == state
    driver.shard.close()


def test_a_folder_that_could_not_be_opened_is_not_held(tmp_path):
    driver = Driver(tmp_path, tiny())
    driver.round()
    driver.shard.close()
    newest = max(tmp_path.glob("base-*"))
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    for _ in range(2):
        with pytest.raises(LogDamaged):
            opened(tmp_path)
    newest.write_bytes(whole)
    opened(tmp_path).close()


def test_a_copy_of_an_open_folder_is_not_held(tmp_path):
    shard = opened(tmp_path / "0")
    shutil.copytree(tmp_path / "0", tmp_path / "copy")
    opened(tmp_path / "copy").close()
    shard.close()


def test_a_killed_process_leaves_no_lock(tmp_path):
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        try:
            assert holder.stdout.readline() == "open\n"
            with pytest.raises(FolderInUse):
                opened(tmp_path / "0")
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait(10)
    opened(tmp_path / "0").close()


def test_a_child_process_does_not_hold_the_folder(tmp_path):
    """It may outlive its parent. One that is forked has the very descriptor."""
    shard = opened(tmp_path)
    gate, opener = os.pipe()
    child = os.fork()
    if not child:
        os.close(opener)
        os.read(gate, 1)  # until the parent closes its end
        os._exit(0)
    try:
        shard.close()
        opened(tmp_path).close()
    finally:
        os.close(opener)
        os.close(gate)
        assert os.waitpid(child, 0)[1] == 0


# ---- rotation ----------------------------------------------------------------------------------------------------------


class Journal:
    """What is synced to the disk, put in its place and deleted, in order."""

    def __init__(self, monkeypatch):
        self.events = []
        fsync, replace, unlink = os.fsync, os.replace, Path.unlink

        def noted_fsync(fd):
            self.events.append(("sync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
            fsync(fd)

        def noted_replace(source, target):
            self.events.append(("place", Path(target).name))
            replace(source, target)

        def noted_unlink(path, missing_ok=False):
            self.events.append(("delete", path.name))
            unlink(path, missing_ok=missing_ok)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        monkeypatch.setattr(Path, "unlink", noted_unlink)


def rotated(folder, monkeypatch, **config):
    driver = Driver(folder, tiny(rotate_bytes=2**20, **config))
    driver.round()
    driver.shard.store.rotate_log()
    for _ in range(4):  # until all of the first file is trained
        driver.round()
    with monkeypatch.context() as patch:
        journal = Journal(patch)
        driver.shard.store.rotate_log()
    driver.shard.close()
    return journal.events


def test_the_base_is_on_the_disk_before_the_generation_before_it_is_deleted(tmp_path, monkeypatch):
    """The power may fail at any moment: a base that was not written yet, and nothing before it, would be the end of the run."""
    folder = tmp_path / "0"
    events = rotated(folder, monkeypatch, keep_log="needed")
    base_name = base.path_of(folder, 3).name
    deleted = events.index(("delete", base.path_of(folder, 1).name))
    order = [("sync", base_name + ".new"), ("place", base_name), ("sync", folder.name)]
    assert [event for event in events[:deleted] if event[0] != "delete"] == order
    assert events.index(("delete", "journal-000001")) > events.index(order[-1])


def test_where_nothing_is_deleted_a_rotation_waits_for_no_disk(tmp_path, monkeypatch):
    events = rotated(tmp_path / "0", monkeypatch, keep_log="all")
    assert [kind for kind, _ in events] == ["place"]
