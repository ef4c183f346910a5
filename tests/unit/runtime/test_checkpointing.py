"""When checkpoints are taken, and when one counts: only when the learner's state is on the disk, whoever waits for it."""

import asyncio
import time
from pathlib import Path

import pytest

from asyncrl.learner import checkpoint_folder
from asyncrl.learner.checkpoint import CheckpointFailed
from asyncrl.recipes import load_recipe
from asyncrl.runtime.checkpointing import Checkpointing
from asyncrl.runtime.checkpoints import Checkpoints
from asyncrl.runtime.learner_part import Taken
from asyncrl.runtime.learner_ranks import LearnerRanks
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.watch import PartFailed, Watch
from tests.learner_states import finish_state

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"


class Method:
    def __init__(self, function):
        self._function = function

    def remote(self, *arguments):
        return asyncio.ensure_future(self._function(*arguments))


class Rank:
    """A learner's rank as far as checkpoints go: `written` is set when its thread has written what was taken."""

    def __init__(self, checkpoints):
        self._checkpoints = checkpoints
        self.step, self.asked, self.fails = 0, [], None
        self.written = asyncio.Event()
        self._writing = None

    def __getattr__(self, name):
        return Method(getattr(self, f"do_{name}"))

    async def do_steps_done(self):
        return self.step

    async def do_checkpoint(self, keep, learner):
        if self.fails is not None:
            raise PartFailed("no room", part="learner-0", raised=self.fails)
        self.asked.append((self.step, tuple(keep), learner))
        if learner:
            if self._writing is not None:
                await self._writing
            self._writing = asyncio.ensure_future(self._write(self._checkpoints.learner_state(self.step)))
        return Taken(step=self.step, version=self.step, frontier=4)

    async def _write(self, path):
        checkpoint_folder.begin(path)
        await self.written.wait()
        finish_state(path)

    async def do_checkpoint_finished(self, timeout_s):
        async with asyncio.timeout(timeout_s):
            await self._writing


class World:
    def __init__(self, tmp_path, *overrides):
        self.folder = RunFolder(tmp_path)
        self.on_disk = Checkpoints(self.folder)
        self.rank = Rank(self.on_disk)
        self.notes = []
        ranks = LearnerRanks([self.rank], Watch(self.folder, asyncio.Event()), 5.0)
        recipe = load_recipe(QUICKSTART, overrides)
        self.checkpointing = Checkpointing(recipe, self.folder, ranks, self.notes.append)

    async def take(self, step):
        self.rank.step = step
        return await self.checkpointing.take()


@pytest.fixture
def run(tmp_path):
    def run(test, *overrides):
        async def inside():
            world = World(tmp_path, *overrides)
            keeping = asyncio.create_task(world.checkpointing.keep())
            try:
                await test(world)
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)

        asyncio.run(inside())

    return run


def test_when_one_is_due(run):
    async def test(world):
        assert [s for s in range(1, 9) if world.checkpointing.due(s)] == [3, 6, 8]

    run(test, "run.steps=8", "checkpoints.every_steps=3")


def test_without_a_number_of_steps_the_last_one_alone_is_due(run):
    async def test(world):
        assert [s for s in range(1, 9) if world.checkpointing.due(s)] == [8]

    run(test, "run.steps=8", "checkpoints.every_steps=0")


def test_one_counts_when_it_is_written_and_not_before(run):
    async def test(world):
        await world.checkpointing.begin()
        assert world.on_disk.steps() == (0,)
        await world.take(5)
        await asyncio.sleep(0.6)
        assert world.on_disk.steps() == (0,)
        world.rank.written.set()
        await asyncio.sleep(1.0)
        assert world.on_disk.steps() == (0, 5)
        assert world.on_disk.read(5).version == 5 and world.on_disk.read(5).learner
        assert world.notes == []

    run(test)


def test_the_buffer_keeps_the_snapshot_of_one_that_is_being_written(run):
    async def test(world):
        await world.checkpointing.begin()
        await world.take(5)
        asyncio.get_running_loop().call_later(0.3, world.rank.written.set)
        assert await world.take(10) > 0.2  # it waited for the one before
        await world.checkpointing.finish(5.0)
        assert world.rank.asked == [(0, (), False), (5, (0,), True), (10, (0, 5), True)]
        assert world.on_disk.steps() == (5, 10)

    run(test)


def test_a_step_that_has_one_is_not_taken_again(run):
    async def test(world):
        world.rank.written.set()
        for _ in range(2):
            await world.take(5)
        await world.checkpointing.finish(5.0)
        await world.take(5)
        assert len(world.rank.asked) == 1

    run(test)


def test_one_that_cannot_be_written_is_noted_and_the_run_goes_on(run):
    async def test(world):
        await world.checkpointing.begin()
        world.rank.fails = CheckpointFailed("no space left on device")
        await world.take(5)
        assert world.on_disk.steps() == (0,) and "was not written" in world.notes[0]
        world.rank.fails = None
        world.rank.written.set()
        await world.take(10)
        await world.checkpointing.finish(5.0)
        assert world.on_disk.steps() == (0, 10)

    run(test)


def test_any_other_failure_of_the_learner_is_raised(run):
    async def test(world):
        world.rank.fails = RuntimeError("a bug")
        with pytest.raises(PartFailed):
            await world.take(5)

    run(test)


def test_the_end_waits_for_what_is_being_written_and_not_for_ever(run):
    async def test(world):
        await world.take(5)
        began = time.monotonic()
        with pytest.raises((PartFailed, TimeoutError)):
            await world.checkpointing.finish(0.2)
        assert time.monotonic() - began < 3.0
        assert world.on_disk.steps() == ()

    run(test)
