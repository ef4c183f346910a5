"""Single rules of the ledger, each by the shortest schedule that shows it."""

import pytest

from asyncrl.buffer.errors import BadRequest, ConservationError, LeaseLost
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.schema import State


def make(**changes):
    settings = dict(
        prompts_per_step=2,
        rollouts_per_prompt=2,
        max_staleness_versions=1,
        over_stale="mask",
        max_attempts=2,
        lease_timeout_s=10.0,
    )
    return Ledger(**{**settings, **changes})


def finish(ledger, rollout, tokens=3, version=None, now=0.0):
    version = ledger.version if version is None else version
    ledger.append(rollout.rollout_id, rollout.lease_id, rollout.length, tokens, version, "stop", now)
    ledger.score(rollout.rollout_id, rollout.lease_id, 1.0)


def train(ledger, groups):
    """Admits, generates and hands over so many groups."""
    ledger.admit(groups)
    for rollout in ledger.lease("e", 100, 0.0):
        finish(ledger, rollout)
    return ledger.select()


def test_nothing_is_admitted_before_the_first_version_is_published():
    ledger = make()
    assert ledger.capacity == 0
    with pytest.raises(BadRequest, match="capacity is 0 at version -1"):
        ledger.admit(1)
    ledger.publish(0)
    assert ledger.capacity == 4


def test_a_batch_goes_round_and_the_equation_holds():
    ledger = make()
    ledger.publish(0)
    batch = train(ledger, 2)
    assert len(batch.rollout_ids) == 4 and batch.tokens == batch.trainable_tokens == 12
    counts = ledger.commit(batch.batch_id, 1)
    assert counts.holds and counts.trained == 4 and counts.live == 0
    assert ledger.version == 1 and not ledger.groups


def test_groups_in_training_still_hold_their_slots():
    ledger = make()
    ledger.publish(0)
    train(ledger, 2)
    assert ledger.capacity == 2


def test_a_lost_lease_can_do_nothing_more_and_the_prefix_stays():
    ledger = make()
    ledger.publish(0)
    ledger.admit(1)
    (first,) = ledger.lease("a", 1, now=0.0)
    old = first.lease_id
    ledger.append(first.rollout_id, old, 0, 5, 0, "", now=0.0)
    assert ledger.expire(now=10.0) == [first]
    with pytest.raises(LeaseLost):
        ledger.append(first.rollout_id, old, 5, 1, 0, "", now=10.0)
    (again,) = ledger.lease("b", 1, now=11.0)
    assert again.rollout_id == first.rollout_id and again.length == 5 and again.lease_id != old
    ledger.append(again.rollout_id, again.lease_id, 5, 2, 0, "stop", now=11.0)
    assert again.spans == [(0, 7)]


def test_a_heartbeat_keeps_a_lease():
    ledger = make()
    ledger.publish(0)
    ledger.admit(1)
    ledger.lease("a", 1, now=0.0)
    ledger.heartbeat("a", now=9.0)
    assert ledger.expire(now=12.0) == []
    assert len(ledger.expire(now=19.0)) == 1


def test_a_scored_rollout_has_no_lease_that_could_expire():
    ledger = make()
    ledger.publish(0)
    ledger.admit(1)
    (rollout,) = ledger.lease("a", 1, now=0.0)
    finish(ledger, rollout)
    assert ledger.expire(now=1e9) == []
    assert rollout.state is State.SCORED


def test_a_complete_rollout_that_lost_its_scorer_comes_back_with_all_its_tokens():
    ledger = make()
    ledger.publish(0)
    ledger.admit(1)
    (rollout,) = ledger.lease("a", 1, now=0.0)
    ledger.append(rollout.rollout_id, rollout.lease_id, 0, 4, 0, "length", now=0.0)
    ledger.release_engine("a")
    (again,) = ledger.lease("b", 1, now=0.0)
    assert again is rollout and again.finish_reason == "length"
    ledger.append(again.rollout_id, again.lease_id, 4, 0, 0, "length", now=0.0)
    ledger.score(again.rollout_id, again.lease_id, 0.5)
    assert again.state is State.SCORED and again.length == 4


def test_segments_come_in_order_and_repeats_change_nothing():
    ledger = make()
    ledger.publish(0)
    ledger.admit(1)
    (r,) = ledger.lease("a", 1, now=0.0)
    assert ledger.append(r.rollout_id, r.lease_id, 0, 4, 0, "", 0.0)
    assert not ledger.append(r.rollout_id, r.lease_id, 0, 4, 0, "", 0.0)
    with pytest.raises(BadRequest, match="starts at token 6, expected 4"):
        ledger.append(r.rollout_id, r.lease_id, 6, 1, 0, "", 0.0)
    with pytest.raises(BadRequest, match="version 3, published is 0"):
        ledger.append(r.rollout_id, r.lease_id, 4, 1, 3, "", 0.0)
    assert ledger.append(r.rollout_id, r.lease_id, 4, 1, 1, "stop", 0.0)
    assert not ledger.append(r.rollout_id, r.lease_id, 4, 1, 1, "stop", 0.0)
    assert ledger.score(r.rollout_id, r.lease_id, 1.0)
    lease_id = r.scored_lease_id
    assert not ledger.score(r.rollout_id, lease_id, 1.0)


def test_a_poisoned_prompt_is_given_up_and_its_place_is_free():
    ledger = make()
    ledger.publish(0)
    ledger.admit(1)
    (bad, good) = ledger.lease("a", 2, now=0.0)
    assert ledger.fail(bad.rollout_id, bad.lease_id, "reward timed out")
    (bad,) = ledger.lease("a", 1, now=0.0)
    assert not ledger.fail(bad.rollout_id, bad.lease_id, "reward timed out")
    with pytest.raises(LeaseLost):
        ledger.append(good.rollout_id, good.lease_id, 0, 1, 0, "", 0.0)
    counts = ledger.check()
    assert counts.failed == {"reward timed out": 1} and sum(counts.dropped.values()) == 1
    assert ledger.capacity == 4


def late_group(over_stale):
    """One group sampled at version 0 stays incomplete while two batches are trained."""
    ledger = make(over_stale=over_stale, prompts_per_step=1, max_staleness_versions=1)
    ledger.publish(0)
    ledger.admit(1)
    late = ledger.lease("slow", 2, 0.0)
    for rollout in late:
        ledger.append(rollout.rollout_id, rollout.lease_id, 0, 3, 0, "", 0.0)
    return ledger, late


def pass_by(ledger):
    ledger.admit(1)
    for rollout in ledger.lease("fast", 2, 0.0):
        finish(ledger, rollout)
    batch = ledger.select()
    if batch:
        ledger.commit(batch.batch_id, ledger.version + 1)
    return batch


def test_mask_trains_only_tokens_inside_the_bound():
    ledger, late = late_group("mask")
    assert pass_by(ledger) and pass_by(ledger)
    for rollout in late:
        finish(ledger, rollout, tokens=5)
    batch = ledger.select()
    assert batch.tokens == 16 and batch.trainable_tokens == 10 and batch.staleness_max <= 1


def test_mask_drops_a_group_with_nothing_left_to_train():
    ledger, late = late_group("mask")
    assert pass_by(ledger) and pass_by(ledger)
    for rollout in late:
        finish(ledger, rollout, tokens=0, version=2)
    assert ledger.select() is None
    assert ledger.check().dropped == {"over_stale": 2}


def test_drop_drops_a_group_with_any_token_past_the_bound():
    ledger, late = late_group("drop")
    assert pass_by(ledger) and pass_by(ledger)
    for rollout in late:
        finish(ledger, rollout, tokens=5)
    assert ledger.select() is None
    assert ledger.check().dropped == {"over_stale": 2}


def test_wait_makes_the_reader_wait_for_the_late_group():
    ledger, late = late_group("wait")
    assert pass_by(ledger)  # version 0 -> 1: the late group can still leave at 1
    assert pass_by(ledger) is None  # leaving at 1 without it would break its deadline
    for rollout in late:
        finish(ledger, rollout, tokens=5)
    batch = ledger.select()
    assert {late[0].group_id} == set(batch.group_ids)
    assert batch.tokens == batch.trainable_tokens == 16


def test_a_lost_rollout_is_noticed_at_commit():
    ledger = make()
    ledger.publish(0)
    batch = train(ledger, 2)
    ledger.admit(1)
    del ledger.rollouts[ledger.groups[3].rollout_ids[0]]
    with pytest.raises(ConservationError, match="at version 1"):
        ledger.commit(batch.batch_id, 1)


def test_versions_are_published_one_by_one():
    ledger = make()
    ledger.publish(0)
    with pytest.raises(BadRequest, match="outside a commit"):
        ledger.publish(1)
    batch = train(ledger, 2)
    with pytest.raises(BadRequest, match="expected 1"):
        ledger.commit(batch.batch_id, 2)
    with pytest.raises(BadRequest, match="not handed over"):
        ledger.commit(batch.batch_id + 1, 1)
