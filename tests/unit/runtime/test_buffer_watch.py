"""When a buffer's process is started again, and when its end is the run's."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from asyncrl.buffer.records import Recovery
from asyncrl.runtime import buffer_watch
from asyncrl.runtime.buffer_watch import MOST_DEATHS, ShardKeeper
from asyncrl.runtime.observer import Observer
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.watch import PartFailed, Watch
from tests.buffers import buffer_service


class Call:
    """What `method.remote()` is for a Ray handle: an outcome for each call, the last one again and again."""

    def __init__(self, *outcomes):
        self.outcomes, self.calls = list(outcomes), 0

    def remote(self):
        outcome = self.outcomes[min(self.calls, len(self.outcomes) - 1)]
        self.calls += 1

        async def give():
            await asyncio.sleep(0.001)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return give()


class Actor:
    def __init__(self, run, start):
        self.run, self.start = Call(*run), Call(*start)


class Notes(Observer):
    def __init__(self):
        self.notes, self._recoveries = [], 0

    def note(self, text):
        self.notes.append(text)


DEATH = ActorUnavailableError("socket closed", None)
GONE = ActorDiedError()


def keep(actor, tmp_path, address=None):
    """Keeps shard 0 until it ends; returns what was noted."""
    notes = Notes()
    folder = RunFolder(tmp_path)
    folder.logs.mkdir(exist_ok=True)
    folder.log("buffer-0").write_text("the end of the log")

    async def run():
        keeper = ShardKeeper(0, actor, address, Watch(folder, asyncio.Event()), notes)
        async with asyncio.timeout(20):
            await keeper.keep()

    asyncio.run(run())
    return notes.notes


@pytest.fixture
def no_note(monkeypatch):
    async def nothing(self):
        pass

    monkeypatch.setattr(ShardKeeper, "_note_recovery", nothing)


def test_a_process_that_dies_is_started_as_soon_as_ray_has_the_next(tmp_path, no_note, monkeypatch):
    monkeypatch.setattr(buffer_watch, "_TRY_AGAIN_S", 0.001)
    actor = Actor(run=[DEATH, DEATH, None], start=[DEATH, DEATH, "tcp://x:1"])
    keep(actor, tmp_path)
    assert (actor.run.calls, actor.start.calls) == (3, 4)


def test_one_death_too_many_ends_the_run_with_the_end_of_the_log(tmp_path, no_note):
    actor = Actor(run=[DEATH], start=["tcp://x:1"])
    with pytest.raises(
        PartFailed, match=r"buffer-0 failed: it died 6 times within 10 minutes(.|\n)*end of the log"
    ):
        keep(actor, tmp_path)
    assert actor.run.calls == MOST_DEATHS + 1 and actor.start.calls == MOST_DEATHS


@pytest.mark.parametrize("where", ["run", "start"])
def test_an_error_of_its_own_is_no_death(tmp_path, no_note, where):
    error = RayTaskError("run", "Traceback: ConservationError: 3 != 4", ValueError("conservation"))
    actor = Actor(run=[error] if where == "run" else [DEATH], start=[error])
    with pytest.raises(PartFailed, match="ConservationError: 3 != 4"):
        keep(actor, tmp_path)
    assert actor.start.calls == (where == "start")


@pytest.mark.parametrize("where", ["run", "start"])
def test_a_process_that_ray_gave_up_ends_the_run(tmp_path, no_note, where):
    actor = Actor(run=[GONE] if where == "run" else [DEATH], start=[GONE])
    with pytest.raises(PartFailed, match="buffer-0 failed"):
        keep(actor, tmp_path)


def test_a_process_that_does_not_come_back_in_time_ends_the_run(tmp_path, no_note, monkeypatch):
    monkeypatch.setattr(buffer_watch, "_RESTART_S", 0.2)
    with pytest.raises(PartFailed, match="buffer-0 gave no answer within 0 s"):
        keep(Actor(run=[DEATH], start=[DEATH]), tmp_path)


def test_what_was_recovered_is_noted(tmp_path):
    with buffer_service(tmp_path / "buffer") as (service, client):
        client.publish(0)
        service.again()

        class UntilNoted(Call):
            """The next process' run: ends a while later, as after a stop."""

            def remote(self):
                if not self.calls:
                    return super().remote()
                return asyncio.sleep(1.0)

        actor = Actor(run=[DEATH], start=["tcp://x:1"])
        actor.run = UntilNoted(DEATH)
        (note,) = keep(actor, tmp_path, service.address)
    assert note == "buffer shard 0 died; recovered 0 rollouts with 0 tokens, cut 0 bytes"


def test_a_note_says_what_the_log_gave_back():
    notes = Notes()
    found = Recovery(commits=9, cut_bytes=17, live_rollouts=128, live_tokens=40960)
    notes.recovered(1, found)
    notes.recovered(0, None)
    assert notes.notes == [
        "buffer shard 1 died; recovered 128 rollouts with 40,960 tokens, cut 17 bytes",
        "buffer shard 0 died; its log was empty",
    ]
    assert notes._recoveries == 2
