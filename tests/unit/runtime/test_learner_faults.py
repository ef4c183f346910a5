"""Which failures a run may go back for, whose fault they are, and how often."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.buffer.records import Selection
from asyncrl.learner.faults import Culprits, NonFiniteLoss
from asyncrl.runtime.learner_faults import Restores, is_fault, named, verdict
from asyncrl.runtime.learner_ranks import LearnerRanks
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.watch import PartFailed, Watch

FAULT = NonFiniteLoss("loss is not finite on 3 tokens", Culprits((7,), ((3, 4),)))
DIED = PartFailed("it died", part="learner-1", process_died=True)
UNFIT = PartFailed("no good", part="learner-0", raised=FAULT)
CUT_OFF = PartFailed("connection closed by peer", part="learner-0", raised=RuntimeError("gloo"))


def test_a_death_and_an_unfit_step_are_faults_and_a_bug_is_none():
    assert is_fault(DIED) and is_fault(UNFIT)
    assert not is_fault(CUT_OFF)
    assert not is_fault(PartFailed("it died", part="fake-0", process_died=True))
    assert not is_fault(PartFailed("learner-0 gave no answer"))
    assert not is_fault(ValueError("x"))


def test_the_rank_at_fault_is_told_not_those_that_lost_touch_with_it():
    assert verdict([CUT_OFF, DIED]) is DIED
    assert verdict([CUT_OFF, UNFIT]) is UNFIT
    assert verdict([CUT_OFF]) is CUT_OFF


def test_a_batch_is_named_by_what_can_be_looked_up():
    selection = Selection(
        batch_ids=(7, 8),
        version=4,
        group_ids=(1,),
        rollout_ids=tuple(range(20, 30)),
        staleness_min=0,
        staleness_mean=0.5,
        staleness_max=1,
        in_flight_mean=0.0,
        in_queue_mean=0.0,
        tokens=9,
        trainable_tokens=9,
    )
    assert named(selection) == (
        "batch 7/8 of version 4: rollouts 20, 21, 22, 23, 24, 25, 26, 27 and 2 more, of versions 3 to 4"
    )


def test_progress_makes_the_count_begin_anew():
    restores = Restores(2)
    assert [restores.one_too_many(done) for done in (5, 5, 6, 6, 6)] == [False, False, False, False, True]


@given(st.integers(1, 4), st.lists(st.integers(0, 6), max_size=40))
def test_a_run_never_goes_back_more_often_than_allowed_without_a_step_of_progress(most, steps):
    restores, furthest, since = Restores(most), -1, 0
    for done in steps:
        since = 0 if done > furthest else since
        furthest, since = max(furthest, done), since + 1
        assert restores.one_too_many(done) == (since > most)


class Method:
    def __init__(self, function):
        self._function = function

    def remote(self, *arguments):
        return asyncio.ensure_future(self._function(*arguments))


class Rank:
    """Answers after a while, or raises."""

    def __init__(self, after_s, answer):
        self._after_s, self._answer = after_s, answer
        self.train = Method(self._train)

    async def _train(self, *arguments):
        await asyncio.sleep(self._after_s)
        if isinstance(self._answer, Exception):
            raise self._answer
        return (self._answer, *arguments)


def everyone(tmp_path, *ranks, timeout_s=5.0):
    async def run():
        watch = Watch(RunFolder(tmp_path), asyncio.Event())
        return await LearnerRanks(list(ranks), watch, timeout_s).everyone("train", 1)

    return asyncio.run(run())


def test_the_first_rank_answers_when_all_have(tmp_path):
    assert everyone(tmp_path, Rank(0.0, "first"), Rank(0.02, "second")) == ("first", 1)


def test_a_death_that_is_heard_of_later_is_what_is_told(tmp_path):
    with pytest.raises(PartFailed) as caught:
        everyone(tmp_path, Rank(0.0, CUT_OFF), Rank(0.1, DIED))
    assert caught.value is DIED


def test_a_rank_that_hangs_is_not_waited_for_once_another_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("asyncrl.runtime.learner_ranks._VERDICT_S", 0.05)
    with pytest.raises(PartFailed) as caught:
        everyone(tmp_path, Rank(30.0, "never"), Rank(0.0, UNFIT), timeout_s=60.0)
    assert caught.value is UNFIT


def test_a_call_past_its_time_names_the_rank(tmp_path):
    with pytest.raises(PartFailed, match="learner-1 gave no answer"):
        everyone(tmp_path, Rank(0.0, "first"), Rank(30.0, "never"), timeout_s=0.05)
