"""A fleet over actors that are scripted: who is started again, who is given up, and what ends the run.

Ray's own part (rooms, real deaths) is in tests/e2e; here every schedule is exact.
"""

import asyncio
import functools
import types
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.evaluation import HeldOutAnswer
from asyncrl.generators.evaluation_config import EvaluationConfig
from asyncrl.generators.score import CostMissing
from asyncrl.recipes import load_recipe
from asyncrl.runtime import deaths, engine_keeper, fleet
from asyncrl.runtime.facts import EngineFacts
from asyncrl.runtime.held_out import ask
from asyncrl.runtime.placement import PlacementError
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.watch import PartFailed, Watch

ROOT = Path(__file__).resolve().parents[3]
ADDRESS = types.SimpleNamespace(keys="the run's")
ANSWER = functools.partial(
    HeldOutAnswer, reward=1.0, tokens=1, truncated=False, oldest_version=0, newest_version=0
)
BROKEN = RayTaskError("start", "Traceback: it is broken", ValueError("broken"))
MISTAKEN = RayTaskError("dispatch", "Traceback: no term gave a cost", CostMissing("no term gave a cost"))


async def raises(error):
    raise error


class Method:
    def __init__(self, function):
        self.function = function

    def remote(self, *arguments):
        return self.function(*arguments)


class Actor:
    """An engine's process: `ends` ends it, as Ray would tell."""

    def __init__(self, engine_id, script):
        self.engine_id, self.script = engine_id, script
        self.ends = asyncio.get_running_loop().create_future()
        self.ends.add_done_callback(lambda f: f.exception())
        self.stopped = asyncio.Event()
        self.update_fails = asyncio.Event()
        """A weight update finds the engine's core dead, a moment before the dispatcher does."""
        self.asked = []
        self.dispatches, self.slots, self.shut, self.handed_in = 0, None, False, False

    def __getattr__(self, name):
        return Method(getattr(self, f"do_{name}"))

    async def _or_end(self, work):
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self.ends}, return_when=asyncio.FIRST_COMPLETED)
            if self.ends.done():
                self.ends.result()
            return await task
        finally:
            task.cancel()

    async def do_start(self):
        error = self.script.start_errors.pop(0) if self.script.start_errors else None
        if error is not None:
            raise error
        await self._or_end(asyncio.sleep(self.script.start_s))
        return "here (abc)"

    async def do_join(self, endpoint, keys, timeout_s):
        assert (endpoint, keys) == ("tcp://learner:1", "the run's")
        await self._or_end(asyncio.sleep(0))
        return 0

    async def do_receive(self):
        await self._or_end(self.update_fails.wait())
        raise BROKEN

    async def do_dispatch(self, address, slots):
        self.dispatches, self.slots = self.dispatches + 1, slots
        self.stopped.clear()
        stopped, failed = (asyncio.ensure_future(e.wait()) for e in (self.stopped, self.update_fails))
        waits = asyncio.wait({stopped, failed}, return_when=asyncio.FIRST_COMPLETED)
        await self._or_end(waits)
        if failed.done():
            await asyncio.sleep(0.2)
            self.handed_in = True
            raise BROKEN

    async def do_stop(self):
        self.stopped.set()

    async def do_set_concurrency(self, slots):
        self.slots = slots

    async def do_evaluate(self, prompts, asking, timeout_s):
        self.asked.append(asking)
        assert 0 < timeout_s <= 60
        await self._or_end(asyncio.sleep(0.01))
        said = [f"{prompt} by {self.engine_id}" for prompt in prompts]
        return [[ANSWER(final=final)] * asking.rollouts_per_prompt for final in said]

    async def do_status(self):
        return EngineFacts(
            engine_id=self.engine_id,
            pool="p",
            state="idle",
            version=3,
            slots_used=0,
            slots=self.slots or 0,
            tokens_per_s=0,
        )

    async def do_shutdown(self):
        self.shut = True
        if self.ends.done():
            self.ends.result()


class World:
    """A fleet, its scripted machines, and what it noted."""

    def __init__(self, tmp_path, monkeypatch, *pools, room=100, again_s=0.01):
        self.again_s = again_s
        self.room, self.start_errors, self.start_s = room, [], 0.0
        self.actors, self.notes, self.lost, self.ended = {}, [], [], []
        recipe = load_recipe(ROOT / "recipes" / "quickstart.toml", [])
        pools = pools or (PoolConfig(name="p", engines=2, engine="fake", max_deaths=2),)
        self.recipe = type(recipe)(
            **{f: getattr(recipe, f) for f in recipe.__struct_fields__} | {"pools": list(pools)}
        )
        folder = RunFolder(tmp_path)
        folder.logs.mkdir(exist_ok=True)
        world = self

        class Room:
            def __init__(self, pool):
                self.taken = False

            def is_ready(self):
                if not self.taken and world.room > 0:
                    world.room, self.taken = world.room - 1, True
                return self.taken

            def wants(self):
                return "CPU 1"

            def make_engine(self, recipe, folder, run_id, pool_index, engine_id):
                assert engine_id not in world.actors, "an id lives once"
                world.actors[engine_id] = Actor(engine_id, world)
                return world.actors[engine_id]

            def release(self):
                if self.taken:
                    world.room, self.taken = world.room + 1, False

        monkeypatch.setattr(engine_keeper, "EngineRoom", Room)
        monkeypatch.setattr(engine_keeper, "end_actor", lambda actor: world.ended.append(actor.engine_id))
        monkeypatch.setattr(deaths, "FIRST_WAIT_S", self.again_s)
        monkeypatch.setattr(engine_keeper, "_LOOK_S", 0.01)
        self.watch = Watch(folder, asyncio.Event())
        self.fleet = fleet.Fleet(self.recipe, "folder", "run", self.watch, self, ADDRESS, self.notes.append)
        self.fleet.endpoint.set_result("tcp://learner:1")

    async def engine_lost(self, engine_id, *, for_good):
        assert for_good
        self.lost.append(engine_id)
        return 0

    async def begin(self):
        self.kept = asyncio.create_task(self.fleet.keep())
        self.fleet.start()
        self.fleet.dispatching.set()
        await self.until(lambda: self.fleet.begun or self.kept.done(), self.fleet.begin())

    async def until(self, condition, work=None):
        task = asyncio.ensure_future(work) if work is not None else None
        async with asyncio.timeout(5):
            while not condition() and not (task and task.done()):  # noqa: ASYNC110 (any condition)
                await asyncio.sleep(0.005)
        if task is not None:
            if task.done():
                task.result()
            task.cancel()

    def kill(self, engine_id):
        self.actors[engine_id].ends.set_exception(ActorDiedError())

    def works(self, *ids):
        return all(i in self.actors and self.actors[i].dispatches and i not in self.ended for i in ids)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `test(world)` in a fleet of its own, which is shut down at the end."""

    def run(test, *pools, **settings):
        async def inside():
            world = World(tmp_path, monkeypatch, *pools, **settings)
            try:
                await test(world)
            finally:
                await world.fleet.shutdown()
                assert {t.get_name() for t in asyncio.all_tasks() if "keeper" in t.get_name()} == set()

        asyncio.run(inside())

    return run


def test_an_engine_that_dies_is_started_again_under_another_id(run):
    async def test(world):
        await world.begin()
        await world.until(lambda: world.works("p-0", "p-1"))
        world.kill("p-0")
        await world.until(lambda: world.works("p-0.2", "p-1"))
        assert set(world.lost) == {"p-0"} and world.ended == ["p-0"] and not world.kept.done()
        (note,) = world.notes
        assert note.startswith("engine p-0 died (") and note.endswith("); starting it again in 0 s")
        engines, (pool,) = await world.fleet.facts()
        assert [(e.engine_id, e.deaths, e.version) for e in engines] == [("p-0", 1, 3), ("p-1", 0, 3)]
        assert (pool.state, pool.engines_serving) == ("serving", 2)

    run(test)


def test_an_engine_that_dies_again_and_again_is_given_up_and_the_run_goes_on(run):
    async def test(world):
        await world.begin()
        for life in ("p-0", "p-0.2", "p-0.3"):
            await world.until(lambda life=life: world.works(life))
            world.kill(life)
        await world.until(lambda: any("given up" in note for note in world.notes))
        engines, (pool,) = await world.fleet.facts()
        assert [e.state for e in engines] == ["dead", "idle"] and "p-0: " in pool.reason
        assert pool.state == "short" and not world.kept.done()
        world.fleet.set_engines("p", 2)  # tried again, with a clean slate
        await world.until(lambda: world.works("p-0.4"))

    run(test)


def test_a_pool_fails_alone_and_all_of_them_end_the_run(run):
    async def test(world):
        await world.begin()
        for pool in ("a", "b"):
            assert not world.kept.done()
            for life in ("", ".2"):
                await world.until(lambda p=pool, n=life: world.works(f"{p}-0{n}"))
                world.kill(f"{pool}-0{life}")
            await world.until(lambda p=pool: f"pool {p} failed: all its engines are given up" in world.notes)
        with pytest.raises(PartFailed, match=r"b-0\.2 failed"):
            await world.kept

    run(test, *(PoolConfig(name=n, engine="fake", max_deaths=1) for n in "ab"))


def test_what_cannot_start_ends_the_run_before_it_has_begun(run):
    async def test(world):
        world.start_errors = [None, BROKEN]
        await world.begin()
        with pytest.raises(PartFailed, match="it is broken"):
            await world.kept

    run(test)


def test_a_mistake_of_the_recipe_ends_the_run_at_its_first_engine(run):
    """Another process would meet it as well: nobody is started again, and an evaluation asks nobody else."""

    async def test(world):
        await world.begin()
        await world.until(lambda: world.works("p-0", "p-1"))
        for engine in world.actors.values():
            engine.do_evaluate = lambda *_: raises(MISTAKEN)
        with pytest.raises(PartFailed, match="no term gave a cost"):
            await ask(world.fleet, [1, 2], held_out(60.0), 8, "0", 0)
        world.actors["p-0"].ends.set_exception(MISTAKEN)
        with pytest.raises(PartFailed, match=r"p-0 failed: .*no term gave a cost"):
            async with asyncio.timeout(5):
                await world.kept
        await world.until(lambda: world.ended)
        assert set(world.actors) == {"p-0", "p-1"}
        assert [note.partition(" (")[0] for note in world.notes] == ["engine p-0 died"]
        assert world.notes[0].endswith("; given up")

    run(test)


def test_an_engine_that_a_version_was_settled_without_is_replaced(run):
    """It hangs: it would neither die nor serve."""

    async def test(world):
        await world.begin()
        await world.until(lambda: world.works("p-0", "p-1"))
        world.fleet.condemn({"p-1": "no answer within 3.0 s (applying)", "p-7": "nobody knows it"})
        await world.until(lambda: world.works("p-0", "p-1.2"))
        assert world.ended == ["p-1"] and "no answer within 3.0 s" in world.notes[0]
        world.fleet.condemn({"p-1": "it comes again"})  # of the life that is over
        await asyncio.sleep(0.05)
        assert world.ended == ["p-1"]

    run(test)


def test_a_death_met_by_a_weight_update_leaves_the_dispatcher_time_to_hand_in_its_tails(run):
    async def test(world):
        await world.begin()
        await world.until(lambda: world.works("p-0", "p-1"))
        world.actors["p-0"].update_fails.set()
        await world.until(lambda: world.lost == ["p-0"])
        assert world.actors["p-0"].handed_in
        await world.until(lambda: world.works("p-0.2"))

    run(test)


def test_a_death_before_the_beginning_is_no_failure(run):
    async def test(world):
        world.start_errors = [ActorDiedError()]
        await world.begin()
        await world.until(lambda: world.works("p-0.2", "p-1"))

    run(test)


def test_engines_are_added_and_removed(run):
    async def test(world):
        await world.begin()
        world.fleet.set_engines("p", 4)
        await world.until(lambda: world.works("p-0", "p-1", "p-2", "p-3"))
        world.fleet.set_engines("p", 1)
        await world.until(lambda: len(world.lost) == 3)
        assert world.works("p-0") and all(world.actors[f"p-{i}"].shut for i in (1, 2, 3))
        assert sorted(world.notes) == [f"engine p-{i} is removed" for i in (1, 2, 3)]
        world.fleet.set_engines("p", 2)
        await world.until(lambda: world.works("p-1.2"))

    run(test)


def test_an_engine_is_removed_while_it_starts(run):
    async def test(world):
        await world.begin()
        world.start_s = 60.0
        world.fleet.set_engines("p", 3)
        await world.until(lambda: "p-2" in world.actors)
        world.fleet.set_engines("p", 2)
        await world.until(lambda: world.ended == ["p-2"])
        assert not world.kept.done()

    run(test)


def test_engines_wait_for_room_and_the_run_begins_with_fewer_where_it_may(run):
    async def test(world):
        await world.begin()
        _, (pool,) = await world.fleet.facts()
        assert pool.engines_serving >= 1
        await world.until(lambda: sum(k.state == "waiting for room" for k in world.fleet.keepers()) == 1)
        world.room += 1  # a machine joins
        await world.until(lambda: world.works("p-0", "p-1"))

    run(test, PoolConfig(name="p", engines=2, min_engines=1, engine="fake"), room=1)


def test_a_run_without_room_for_its_first_engines_says_what_it_wants(run, monkeypatch):
    monkeypatch.setattr(fleet, "RESERVE_S", 0.1)
    monkeypatch.setattr(fleet, "_LOOK_S", 0.02)
    monkeypatch.setattr(fleet, "no_room", lambda wanted, advice: PlacementError(f"{wanted}. {advice}"))

    async def test(world):
        with pytest.raises(PlacementError, match="1 more engines of pool p, each of which wants CPU 1"):
            await world.begin()

    run(test, room=1)


def test_slots_are_set_paused_drained_and_given_back(run):
    async def test(world):
        await world.begin()
        await world.until(lambda: world.works("p-0", "p-1"))
        told = lambda: {world.actors[i].slots for i in ("p-0", "p-1")}  # noqa: E731
        assert told() == {64}
        await world.fleet.set_concurrency(["p"], 8)
        assert told() == {8}
        await world.fleet.set_paused(True)
        assert told() == {0}
        await world.fleet.set_concurrency(["p"], 16)
        assert told() == {0}  # paused is paused
        await world.fleet.go_on()
        assert told() == {16}
        await world.fleet.drain("p")
        assert told() == {0}
        world.kill("p-0")
        await world.until(lambda: world.works("p-0.2"))
        assert world.actors["p-0.2"].slots == 0  # and stays so after a death
        engines, _ = await world.fleet.facts()
        assert {e.state for e in engines} == {"paused"}

    run(test)


def test_handing_back_ends_a_dispatch_that_is_about_to_begin(run):
    async def test(world):
        await world.begin()
        await world.until(lambda: world.works("p-0", "p-1"))
        await world.fleet.hand_back()
        assert [k._dispatch for k in world.fleet.keepers()] == [None, None]
        world.fleet.dispatching.set()
        await asyncio.sleep(0)
        await world.fleet.hand_back()  # set and cleared at once
        await asyncio.sleep(0.05)
        assert [k._dispatch for k in world.fleet.keepers()] == [None, None]

    run(test)


def held_out(timeout_s):
    return EvaluationConfig(source="sums:test", timeout_s=timeout_s, slots_per_engine=3)


def test_engines_without_rollouts_give_all_they_have_and_a_late_one_ends_at_the_deadline(run):
    async def test(world):
        await world.begin()
        world.fleet.dispatching.clear()
        await ask(world.fleet, [1], held_out(5.0), 8, "0", 0)
        ((asked,),) = [actor.asked for actor in world.actors.values() if actor.asked]
        assert (asked.slots, asked.max_new_tokens) == (256, 8)
        for actor in world.actors.values():
            actor.do_evaluate = lambda *_: asyncio.sleep(60)
        with pytest.raises(PartFailed, match=r"not done within 0 s .*: 0 of 2 prompts"):
            await ask(world.fleet, [1, 2], held_out(0.05), 8, "1", 0)

    run(test)


def test_what_a_dying_engine_leaves_of_an_evaluation_goes_to_the_others(run):
    async def test(world):
        await world.begin()
        asking = asyncio.create_task(ask(world.fleet, list(range(9)), held_out(5.0), 8, "0", 0))
        await asyncio.sleep(0)
        world.kill("p-0")
        found = await asking
        assert [row[0].final.split()[0] for row in found] == [str(i) for i in range(9)]
        assert {row[0].final.split()[2] for row in found} >= {"p-1"}
        labels = [asked.label for actor in world.actors.values() for asked in actor.asked]
        assert labels.count("0.1") == 2 and "0.2" in labels  # a request's id is never used again
        assert all(a.slots == 3 for actor in world.actors.values() for a in actor.asked)

    run(test)


def test_an_evaluation_waits_for_the_next_engine_and_asks_for_nothing_twice(run):
    """One engine of two answers its share, then both are gone: what is left is asked of the one that comes back."""

    async def test(world):
        await world.begin()
        asking = asyncio.create_task(ask(world.fleet, list(range(9)), held_out(20.0), 8, "0", 0))
        await asyncio.sleep(0)
        world.kill("p-0")
        await asyncio.sleep(0.05)  # p-1 has answered
        world.kill("p-1")
        found = await asking
        assert [row[0].final.split()[0] for row in found] == [str(i) for i in range(9)]
        assert {row[0].final.split()[2] for row in found} & {"p-0.2", "p-1.2"}

    run(test, PoolConfig(name="p", engines=2, engine="fake", max_deaths=5), again_s=1.5)
