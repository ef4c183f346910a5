"""Checkpoints on disk: which one is picked, and that nothing is which is not whole. The buffer's part is a real buffer's."""

import asyncio

import msgspec
import pytest

from asyncrl.buffer.errors import BadRequest
from asyncrl.buffer.store import lacks_of_snapshot, snapshot_of
from asyncrl.learner import checkpoint_folder
from asyncrl.runtime.checkpoints import Checkpoints, Manifest
from asyncrl.runtime.run_folder import RunFolder
from tests.buffers import admit, buffer_service
from tests.learner_states import write_state


class World:
    """A run's folder with a buffer that was stopped after some snapshots, and checkpoints of the steps that are wanted."""

    def __init__(self, path, shards=1):
        self.folder, self.shards = RunFolder(path), shards
        self.checkpoints = Checkpoints(self.folder)
        path.mkdir()

    def snapshots(self, *steps):
        with buffer_service(self.folder.path, prompts_per_step=8, shards=self.shards) as (_, client):
            client.publish(0)
            for step in steps:
                client.snapshot(step, keep=steps)

    def learner_state(self, step, data=b"weights"):
        write_state(self.checkpoints.learner_state(step), **{"rank-00000": data})

    def count(self, step, keep=2, learner=True):
        self.checkpoints.count(manifest(step, learner=learner), keep)


def manifest(step, learner=True):
    return Manifest(
        step=step, version=step, frontier=8 * step, recipe_digest="d", metrics_bytes=7, learner=learner
    )


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "run")


def test_the_newest_that_counts_is_picked_and_only_so_many_stay(world):
    world.snapshots(2, 4, 6)
    assert world.checkpoints.newest() is None
    for step in (2, 4, 6):
        world.learner_state(step)
        assert step not in world.checkpoints.steps()  # written, and nobody has said that it counts
        world.count(step)
    assert world.checkpoints.steps() == (4, 6)
    assert not world.checkpoints.learner_state(2).exists()
    assert world.checkpoints.newest() == manifest(6)


def test_what_a_death_left_is_never_picked(world):
    world.snapshots(2, 4)
    world.learner_state(2)
    world.count(2)
    world.learner_state(4)  # died before it counted
    checkpoint_folder.begin(world.checkpoints.learner_state(5))  # died while it was written
    assert world.checkpoints.newest() == manifest(2)
    world.checkpoints.make_room(4)
    assert not world.checkpoints.learner_state(4).exists()
    with pytest.raises(FileExistsError, match="whole checkpoint"):
        world.checkpoints.make_room(2)


def spoil_weights(world):
    (world.checkpoints.learner_state(4) / "rank-00000.safetensors").write_bytes(b"weighty")


def cut_weights(world):
    (world.checkpoints.learner_state(4) / "rank-00000.safetensors").write_bytes(b"w")


def lose_snapshot(world):
    snapshot_of(world.folder.rollouts / "0", 4).unlink()


def spoil_base(world):
    newest = max((world.folder.rollouts / "0").glob("base-*.msgpack"))
    newest.write_bytes(newest.read_bytes()[:-1])


def cut_snapshot(world):
    path = snapshot_of(world.folder.rollouts / "0", 4)
    path.write_bytes(path.read_bytes()[:9])


@pytest.mark.parametrize("damage", [spoil_weights, cut_weights, lose_snapshot, spoil_base, cut_snapshot])
def test_a_damaged_one_is_passed_over_for_the_one_before(world, damage):
    world.snapshots(2, 4)
    for step in (2, 4):
        world.learner_state(step)
        world.count(step)
    assert world.checkpoints.newest() == manifest(4)
    damage(world)
    assert world.checkpoints.newest() == manifest(2)


def test_every_shard_must_have_its_snapshot(tmp_path):
    world = World(tmp_path / "run", shards=2)
    world.snapshots(0)
    world.count(0, learner=False)
    assert world.checkpoints.newest() == manifest(0, learner=False)
    snapshot_of(world.folder.rollouts / "1", 0).unlink()
    assert world.checkpoints.newest() is None


def test_going_on_from_one_forgets_what_came_after(world):
    world.snapshots(0, 2, 4)
    world.count(0, keep=3, learner=False)
    for step in (2, 4):
        world.learner_state(step)
        world.count(step, keep=3)
    world.learner_state(6)
    world.checkpoints.forget_after(2)
    assert world.checkpoints.steps() == (0, 2)
    assert [p.name for p in checkpoint_folder.checkpoints(world.folder.checkpoints)] == ["step-2", "step-0"]


def test_a_manifest_of_another_version_is_told(world):
    world.count(3)
    path = world.checkpoints.learner_state(3) / "run.json"
    path.write_bytes(msgspec.json.encode({"step": 3}))
    with pytest.raises(ValueError, match=r"run\.json: expected a checkpoint's run\.json"):
        world.checkpoints.read(3)


def test_what_a_snapshot_lacks_is_what_the_buffer_would_refuse(tmp_path):
    with buffer_service(tmp_path, prompts_per_step=8) as (buffer, client):
        client.publish(0)
        asyncio.run(admit(buffer.address, 4))
        client.snapshot(1)
        assert lacks_of_snapshot(buffer.log(0), 1) == ""
        assert "snapshot-00000002.json is not there" in lacks_of_snapshot(buffer.log(0), 2)
        client.restore(1)
        with pytest.raises(BadRequest):
            client.restore(2)
