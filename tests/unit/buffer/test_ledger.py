"""Single rules of the ledger, each by the shortest schedule that shows it."""

import pytest

from asyncrl.buffer.accounts import by_state
from asyncrl.buffer.config import BufferConfig, StalenessConfig
from asyncrl.buffer.errors import BadRequest, ConservationError, EngineBarred, LeaseLost
from asyncrl.buffer.ledger import Ledger, Prompt
from asyncrl.buffer.records import LedgerSettings, ledger_settings, share
from asyncrl.buffer.schema import ENVIRONMENT, State


def make(*, published=True, **changes):
    settings = dict(
        prompts_per_step=2,
        rollouts_per_prompt=2,
        max_staleness_versions=1,
        over_stale="mask",
        max_attempts=2,
        lease_timeout_s=10.0,
    )
    ledger = Ledger(LedgerSettings(**{**settings, **changes}))
    if published:
        ledger.publish(0)
    return ledger


def prompts(ledger, count):
    first = ledger.book.frontier
    return [Prompt(f"p{i}", i, 3) for i in range(first, first + count)]


def admit(ledger, count):
    return ledger.admit(prompts(ledger, count))


def append(ledger, rollout, tokens, version=None, finish_reason="", now=0.0):
    version = ledger.version if version is None else version
    return ledger.append(
        rollout.rollout_id, rollout.lease_id, rollout.length, tokens, version, finish_reason, now
    )


def finish(ledger, rollout, tokens=3, version=None, reward=1.0):
    append(ledger, rollout, tokens, version, "stop")
    ledger.score(rollout.rollout_id, rollout.lease_id, reward)


def fail(ledger, rollout, reason="broken"):
    return ledger.fail(rollout.rollout_id, rollout.lease_id, reason)


def hand_over(ledger, groups):
    """Admits, generates and hands over so many groups."""
    admit(ledger, groups)
    for rollout in ledger.lease("e", 100, 0.0):
        finish(ledger, rollout)
    return ledger.select()


def commit(ledger, batch):
    return ledger.commit(batch.batch_ids[0], ledger.version + 1)


# ---- admission -----------------------------------------------------------------------------------------------------


def test_nothing_goes_out_before_the_first_version_is_published():
    ledger = make(published=False)
    assert ledger.capacity == 0
    with pytest.raises(BadRequest, match="capacity is 0 at version -1"):
        admit(ledger, 1)
    assert ledger.lease("a", 1, 0.0) == [] and ledger.select() is None
    ledger.publish(0)
    assert ledger.capacity == 4


def test_groups_in_training_still_hold_their_slots():
    ledger = make()
    hand_over(ledger, 2)
    assert ledger.capacity == 2


def test_past_the_capacity_nothing_of_the_request_is_admitted():
    ledger = make()
    with pytest.raises(BadRequest, match="admission of 5 groups refused: capacity is 4"):
        admit(ledger, 5)
    assert not ledger.book.groups and ledger.book.frontier == 0


def test_the_same_admission_twice_admits_once():
    ledger = make()
    asked = prompts(ledger, 2)
    assert [g.position for g in ledger.admit(asked)] == [0, 1]
    assert ledger.admit(asked) == [None, None]
    overlapping = [asked[1], Prompt("p2", 2, 3)]
    assert [g and g.position for g in ledger.admit(overlapping)] == [None, 2]
    assert ledger.counts().admitted == 6 and ledger.book.frontier == 3


def test_a_position_that_was_left_out_stays_left_out():
    """Other shards have the prompts between."""
    ledger = make()
    ledger.admit([Prompt("p5", 5, 3)])
    assert ledger.book.frontier == 6
    assert ledger.admit([Prompt("p3", 3, 3)]) == [None]


def test_an_id_modulo_the_shards_names_its_shard():
    ledgers = [make(shard=shard, shards=3) for shard in range(3)]
    groups = [group for ledger in ledgers for group in admit(ledger, 2)]
    group_ids = [g.group_id for g in groups]
    rollout_ids = [r for g in groups for r in g.rollouts]
    assert len({*group_ids}) == 6 and len({*rollout_ids}) == 12
    assert [g % 3 for g in group_ids] == [0, 0, 1, 1, 2, 2]
    assert [r % 3 for r in rollout_ids] == [0] * 4 + [1] * 4 + [2] * 4
    assert min(group_ids) > 0 and min(rollout_ids) > 0


def test_the_shards_parts_make_the_batch():
    assert [share(7, shard, 3) for shard in range(3)] == [3, 2, 2]


def test_more_shards_than_groups_of_a_batch_are_refused():
    """A shard without a part in the batches would never hand one over, and the reader wait for it without end."""

    def settings(shards):
        return ledger_settings(BufferConfig(shards=shards), StalenessConfig(), 3, 2, shard=shards - 1)

    assert [settings(shards).prompts_per_step for shards in (1, 2, 3)] == [3, 1, 1]
    with pytest.raises(
        ValueError, match=r"shards is 4 and prompts_per_step is 3: .* Set shards to 3 or less"
    ):
        settings(4)


# ---- leases --------------------------------------------------------------------------------------------------------


def test_a_lost_lease_can_do_nothing_more_and_the_prefix_stays():
    ledger = make()
    admit(ledger, 1)
    (first,) = ledger.lease("a", 1, now=0.0)
    old = first.lease_id
    ledger.append(first.rollout_id, old, 0, 5, 0, "", now=0.0)
    assert ledger.expire(now=10.0) == [first]
    for _ in range(2):
        with pytest.raises(LeaseLost):
            ledger.append(first.rollout_id, old, 5, 1, 0, "", now=10.0)
        with pytest.raises(LeaseLost):
            ledger.score(first.rollout_id, old, 1.0)
        with pytest.raises(LeaseLost):
            ledger.fail(first.rollout_id, old, "broken")
        with pytest.raises(LeaseLost):
            ledger.release(first.rollout_id, old)
        (again,) = [first] if first.lease_id else ledger.lease("b", 1, now=11.0)
    assert again.rollout_id == first.rollout_id and again.length == 5 and again.lease_id != old
    ledger.append(again.rollout_id, again.lease_id, 5, 2, 0, "stop", now=11.0)
    assert again.spans == [(0, 7)]


def test_a_heartbeat_keeps_a_lease():
    ledger = make()
    admit(ledger, 1)
    ledger.lease("a", 1, now=0.0)
    ledger.heartbeat("a", now=9.0)
    ledger.heartbeat("b", now=15.0)
    assert ledger.expire(now=18.9) == []
    assert len(ledger.expire(now=19.0)) == 1


def test_a_heartbeat_of_an_engine_that_never_leased_leaves_no_record():
    """Whoever has the keys could fill the memory with names."""
    ledger = make()
    for n in range(1000):
        ledger.heartbeat(f"engine-{n}", now=1.0)
    assert not ledger.book.engines
    admit(ledger, 1)
    first, second = ledger.lease("a", 1, now=2.0) + ledger.lease("b", 1, now=2.0)
    assert {*ledger.book.engines} == {"a", "b"}
    ledger.heartbeat("a", now=8.0)
    ledger.heartbeat("c", now=8.0)
    assert ledger.expire(now=12.0) == [second]
    assert ledger.expire(now=17.9) == [] and ledger.expire(now=18.0) == [first]
    assert {*ledger.book.engines} == {"a", "b"}


def test_an_append_keeps_its_own_lease_alone():
    ledger = make()
    admit(ledger, 1)
    one, other = ledger.lease("a", 2, now=0.0)
    append(ledger, one, 1, now=9.0)
    assert ledger.expire(now=10.0) == [other]
    assert ledger.expire(now=18.9) == []
    assert ledger.expire(now=19.0) == [one]


def test_a_new_lease_shows_that_its_engine_lives():
    ledger = make()
    admit(ledger, 1)
    ledger.lease("a", 1, now=0.0)
    ledger.lease("a", 1, now=9.0)
    assert ledger.expire(now=18.9) == []
    assert len(ledger.expire(now=19.0)) == 2


def test_a_lease_that_came_again_runs_from_its_new_beginning():
    ledger = make()
    admit(ledger, 1)
    (first,) = ledger.lease("a", 1, now=0.0)
    ledger.expire(now=10.0)
    (again,) = ledger.lease("b", 1, now=10.0)
    assert again is first and ledger.expire(now=19.9) == []
    assert ledger.expire(now=20.0) == [first]


def test_a_scored_rollout_has_no_lease_that_could_expire():
    ledger = make()
    admit(ledger, 1)
    (rollout,) = ledger.lease("a", 1, now=0.0)
    finish(ledger, rollout)
    assert ledger.expire(now=1e9) == []
    assert rollout.state is State.SCORED


def test_a_complete_rollout_that_lost_its_scorer_comes_back_with_all_its_tokens():
    ledger = make()
    admit(ledger, 1)
    (rollout,) = ledger.lease("a", 1, now=0.0)
    append(ledger, rollout, 4, finish_reason="length")
    assert ledger.release_engine("a") == 1
    assert ledger.release_engine("a") == 0
    (again,) = ledger.lease("b", 1, now=0.0)
    assert again is rollout and again.finish_reason == "length"
    append(ledger, again, 0, finish_reason="length")
    ledger.score(again.rollout_id, again.lease_id, 0.5)
    assert again.state is State.SCORED and again.length == 4


def test_a_partial_rollout_near_its_deadline_goes_before_a_fresh_one():
    ledger = make(rollouts_per_prompt=1)
    admit(ledger, 3)
    fresh, second, third = ledger.lease("a", 3, 0.0)
    append(ledger, second, 1, version=1)
    append(ledger, third, 1, version=0)
    for rollout in (fresh, second, third):
        ledger.release(rollout.rollout_id, rollout.lease_id)
    assert ledger.lease("b", 3, 0.0) == [third, second, fresh]


def test_queued_siblings_of_a_group_with_a_token_move_up():
    ledger = make()
    admit(ledger, 2)
    first = ledger.lease("a", 3, 0.0)[-1]  # one of the second group; its sibling is queued
    for rollout in list(ledger.book.groups[1].rollouts.values()):
        ledger.release(rollout.rollout_id, rollout.lease_id)
    append(ledger, first, 1)
    groups = [r.group.group_id for r in ledger.lease("b", 3, 0.0)]
    assert groups == [2, 1, 1]


def test_a_group_that_lost_its_only_tokens_goes_back_behind_the_others():
    ledger = make(rollouts_per_prompt=3, max_staleness_versions=3)
    admit(ledger, 2)
    held = ledger.lease("a", 4, 0.0)
    append(ledger, held[0], 1, version=0)  # group 1
    append(ledger, held[3], 1, version=1)  # group 2
    for rollout in held[1:3]:
        ledger.release(rollout.rollout_id, rollout.lease_id)
    assert fail(ledger, held[0])
    assert [r.group.group_id for r in ledger.lease("b", 5, 0.0)] == [2, 2, 1, 1, 1]


def test_a_rollout_is_leased_once_however_often_its_place_in_the_queue_changed():
    ledger = make()
    admit(ledger, 1)
    first, second = ledger.lease("a", 2, 0.0)
    ledger.release(second.rollout_id, second.lease_id)
    append(ledger, first, 1)
    assert fail(ledger, first)
    again = ledger.lease("b", 5, 0.0)
    assert again == [first, second] and [r.lease_id for r in again] == [3, 4]
    assert ledger.lease("b", 2, 0.0) == [] and by_state(ledger.book)["leased"] == 2


def test_leases_that_did_not_arrive_are_given_again():
    ledger = make()
    admit(ledger, 2)
    (first,) = ledger.lease("a", 1, now=0.0, after=0)
    second = ledger.lease("a", 2, now=1.0, after=first.lease_id)
    ids = [r.lease_id for r in second]
    again = ledger.lease("a", 1, now=2.0, after=first.lease_id)  # never mind its limit
    assert again == second and [r.lease_id for r in again] == ids
    (rest,) = ledger.lease("a", 5, now=2.0, after=max(ids))
    assert rest not in again and rest.lease_id > max(ids)
    assert ledger.lease("b", 5, now=2.0, after=0) == []  # they are another engine's


def test_an_engine_that_starts_anew_gets_what_it_held():
    ledger = make()
    admit(ledger, 2)
    held = ledger.lease("a", 4, now=0.0, after=0)
    append(ledger, held[0], 2)
    finish(ledger, held[1])
    ledger.release(held[2].rollout_id, held[2].lease_id)
    again = ledger.lease("a", 4, now=9.0, after=0)
    assert again == [held[0], held[3]] and held[0].length == 2
    assert ledger.expire(now=18.9) == []  # they were given out at 9
    assert ledger.lease("a", 4, now=9.0, after=held[3].lease_id) == [held[2]]


def test_at_the_memory_budget_only_the_next_batch_is_worked_on():
    ledger = make(prompts_per_step=1, max_staleness_versions=3)
    admit(ledger, 3)
    (one,) = ledger.lease("a", 1, 0.0)
    (other,) = ledger.lease("a", 9, 0.0, next_batch_only=True)
    assert one.group is other.group
    assert ledger.lease("a", 9, 0.0, next_batch_only=True) == []
    for rollout in (one, other):
        finish(ledger, rollout)
    assert ledger.lease("a", 9, 0.0, next_batch_only=True) == []  # it is the reader's turn
    batch = ledger.select()
    assert {r.group.group_id for r in ledger.lease("a", 9, 0.0, next_batch_only=True)} == {2}
    assert commit(ledger, batch).holds
    assert {r.group.group_id for r in ledger.lease("a", 9, 0.0)} == {3}


def test_at_the_memory_budget_a_group_that_lost_its_tokens_does_not_stand_in_the_way():
    ledger = make(prompts_per_step=1, rollouts_per_prompt=4, max_staleness_versions=3)
    admit(ledger, 2)
    held = ledger.lease("a", 8, 0.0)
    append(ledger, held[0], 1, version=0)
    append(ledger, held[4], 1, version=1)
    for rollout in held[1:4] + held[5:]:
        ledger.release(rollout.rollout_id, rollout.lease_id)
    assert fail(ledger, held[0])
    assert {r.group.group_id for r in ledger.lease("b", 8, 0.0, next_batch_only=True)} == {2}


# ---- progress ------------------------------------------------------------------------------------------------------


def test_segments_come_in_order_and_repeats_change_nothing():
    ledger = make()
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    assert ledger.append(r.rollout_id, r.lease_id, 0, 4, 0, "", 0.0)
    assert not ledger.append(r.rollout_id, r.lease_id, 0, 4, 0, "", 0.0)
    with pytest.raises(BadRequest, match="starts at token 6, expected 4"):
        ledger.append(r.rollout_id, r.lease_id, 6, 1, 0, "", 0.0)
    with pytest.raises(BadRequest, match="starts at token 3, expected 4"):
        ledger.append(r.rollout_id, r.lease_id, 3, 2, 0, "", 0.0)
    with pytest.raises(BadRequest, match="version 3, published is 0"):
        ledger.append(r.rollout_id, r.lease_id, 4, 1, 3, "", 0.0)
    assert ledger.append(r.rollout_id, r.lease_id, 4, 1, 1, "stop", 0.0)
    assert not ledger.append(r.rollout_id, r.lease_id, 4, 1, 1, "stop", 0.0)
    lease_id = r.lease_id
    assert ledger.score(r.rollout_id, lease_id, 1.0)
    assert not ledger.score(r.rollout_id, lease_id, 1.0)
    assert r.spans == [(0, 4), (1, 1)] and r.reward == 1.0


def test_an_empty_last_segment_twice_completes_once():
    ledger = make()
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    append(ledger, r, 4)
    assert append(ledger, r, 0, finish_reason="length")
    assert not append(ledger, r, 0, finish_reason="length")
    assert r.spans == [(0, 4)] and r.state is State.COMPLETE
    with pytest.raises(BadRequest, match=r"starts at token 4, expected 4 \(state COMPLETE"):
        append(ledger, r, 1)


def test_an_answer_has_a_token():
    ledger = make()
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    with pytest.raises(BadRequest, match="finished without a sampled token"):
        append(ledger, r, 0, finish_reason="stop")


# ---- the environment's tokens ----------------------------------------------------------------------------------------


def test_an_answer_has_a_token_that_was_sampled():
    ledger = make()
    admit(ledger, 1)
    r, other = ledger.lease("a", 2, now=0.0)
    append(ledger, r, 2, ENVIRONMENT)
    for tokens in (0, 3):
        with pytest.raises(BadRequest, match="finished without a sampled token"):
            append(ledger, r, tokens, ENVIRONMENT, "stop")
    append(ledger, r, 1, 0)
    append(ledger, r, 2, ENVIRONMENT, "length")
    assert r.state is State.COMPLETE and r.spans == [(-1, 2), (0, 1), (-1, 2)]
    with pytest.raises(BadRequest, match="has version -2"):
        append(ledger, other, 1, -2)


def test_the_environment_s_tokens_have_no_age():
    """A group with nothing else is as fresh as one without a token, and no deadline follows from it."""
    ledger = make(rollouts_per_prompt=1, prompts_per_step=1, max_staleness_versions=2)
    admit(ledger, 2)
    first, second = ledger.lease("a", 2, now=0.0)
    append(ledger, first, 4, ENVIRONMENT)
    append(ledger, second, 1, 0)
    assert (first.group.oldest_version, first.group.newest_version) == (None, -1)
    assert dict(ledger.book.ages) == {0: 1}
    for rollout in (first, second):
        ledger.release(rollout.rollout_id, rollout.lease_id)
    assert ledger.lease("b", 2, now=0.0) == [second, first]  # the one with a deadline comes first


def test_an_attempt_with_an_environment_that_fails_leaves_no_age_behind():
    ledger = make(rollouts_per_prompt=1)
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    append(ledger, r, 1, 0)
    append(ledger, r, 2, ENVIRONMENT)
    fail(ledger, r, "environment: gone")
    assert r.spans == [] and r.group.oldest_version is None and not ledger.book.ages


def test_the_environment_s_tokens_are_in_no_figure_of_a_batch():
    ledger = make(rollouts_per_prompt=1, prompts_per_step=1, max_staleness_versions=3)
    admit(ledger, 3)
    one, two, three = ledger.lease("a", 3, now=0.0)
    finish(ledger, one)
    commit(ledger, ledger.select())
    append(ledger, two, 2, 0)
    append(ledger, two, 50, ENVIRONMENT)
    append(ledger, two, 2, 1)
    append(ledger, two, 50, ENVIRONMENT)  # the last words: the reply to a turn after which there was no room
    finish(ledger, two, 0, ENVIRONMENT)
    assert two.completed_version == 1
    batch = ledger.select()
    assert (batch.tokens, batch.trainable_tokens) == (4, 4)
    assert (batch.staleness_min, batch.staleness_mean, batch.staleness_max) == (0, 0.5, 1)
    assert (batch.in_flight_mean, batch.in_queue_mean) == (0.5, 0.0)
    commit(ledger, batch)
    assert (ledger.book.spanning_trained, ledger.book.most_versions) == (1, 2)
    append(ledger, three, 2, 2)
    append(ledger, three, 5, ENVIRONMENT)
    finish(ledger, three, 1, 2)
    commit(ledger, ledger.select())
    assert ledger.book.spanning_trained == 1  # one version and the environment are not two versions


def test_what_was_sampled_ahead_of_the_environment_counts_for_the_end_of_flight():
    """The newest version of the answer is that of its turn before last; in the queue it cannot have aged less than nothing."""
    ledger = make(rollouts_per_prompt=1, prompts_per_step=1)
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    append(ledger, r, 2, 1)  # the version that is being published
    append(ledger, r, 5, ENVIRONMENT, "length")
    assert r.completed_version == 1


def test_a_reward_is_kept_as_the_log_keeps_it():
    """Else a group of equal rewards would show a spread once half of them were read back."""
    ledger = make()
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    finish(ledger, r, reward=0.1)
    (row,) = [row for row in ledger.take_rows() if row.state == "SCORED"]
    assert r.reward == row.reward


def test_only_a_complete_rollout_is_scored():
    ledger = make()
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    with pytest.raises(LeaseLost, match="rollout is LEASED"):
        ledger.score(r.rollout_id, r.lease_id, 1.0)


def test_reasons_that_name_their_prompts_are_counted_together_past_so_many():
    ledger = make(max_attempts=1, rollouts_per_prompt=1, prompts_per_step=200)
    ledger.admit(prompts(ledger, 400))
    for number, rollout in enumerate(ledger.lease("e", 400, 0.0)):
        reason = f"reward: of p{number}" if number % 2 else f"cause {number}: x"
        assert not ledger.fail(rollout.rollout_id, rollout.lease_id, reason)
    counts = ledger.check()
    assert sum(counts.failed.values()) == 400 and len(counts.failed) <= 2 * 64 + 1
    assert counts.failed["reward"] == 200 - 32 and counts.failed["other reasons"] > 0


def test_an_engine_that_is_dead_for_good_gets_nothing_more():
    """A machine was lost, and its process lived on for a while: it took what had just been freed, and held it."""
    ledger = make()
    ledger.admit(prompts(ledger, 1))
    assert len(ledger.lease("e", 2, 0.0)) == 2
    assert ledger.release_engine("e", for_good=True) == 2
    with pytest.raises(EngineBarred, match="engine e was given up as dead"):
        ledger.lease("e", 2, 0.0)
    assert len(ledger.lease("e.2", 2, 0.0)) == 2


def test_a_release_twice_loses_the_lease_once():
    ledger = make()
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    lease_id = r.lease_id
    ledger.release(r.rollout_id, lease_id)
    with pytest.raises(LeaseLost, match=r"lease 1 is not valid \(rollout is QUEUED, lease 0"):
        ledger.release(r.rollout_id, lease_id)
    with pytest.raises(LeaseLost):
        ledger.release(r.rollout_id, 0)
    assert by_state(ledger.book)["queued"] == 2


def test_a_failure_twice_counts_once():
    ledger = make(max_attempts=3)
    admit(ledger, 1)
    (r,) = ledger.lease("a", 1, now=0.0)
    append(ledger, r, 3)
    lease_id = r.lease_id
    assert ledger.fail(r.rollout_id, lease_id, "broken")
    with pytest.raises(LeaseLost):
        ledger.fail(r.rollout_id, lease_id, "broken")
    assert r.attempts == 1 and r.length == 0 and r.group.oldest_version is None


# ---- what comes to nothing -----------------------------------------------------------------------------------------


def poison(ledger, prompt_id):
    """The prompt fails until it is given up."""
    ledger.admit([Prompt(prompt_id, ledger.book.frontier, 3)])
    for again in (True, False):
        bad = ledger.lease("a", 1, now=0.0)[0]
        assert fail(ledger, bad, "reward timed out") is again


def test_a_poisoned_prompt_is_given_up_and_its_place_is_free():
    ledger = make()
    admit(ledger, 1)
    (bad, good) = ledger.lease("a", 2, now=0.0)
    assert fail(ledger, bad, "reward timed out")
    (bad,) = ledger.lease("a", 1, now=0.0)
    good_lease = good.lease_id
    assert not fail(ledger, bad, "reward timed out")
    with pytest.raises(LeaseLost, match="rollout is gone"):
        ledger.append(good.rollout_id, good_lease, 0, 1, 0, "", 0.0)
    counts = ledger.check()
    assert counts.failed == {"reward timed out": 1}
    assert counts.dropped == {"a rollout of its group failed": 1}
    assert ledger.capacity == 4


def test_a_quarantined_prompt_is_passed_over_and_the_frontier_goes_on():
    ledger = make()
    poison(ledger, "bad")
    assert ledger.book.quarantined == {"bad": "reward timed out"}
    admitted = ledger.admit([Prompt("bad", 1, 3), Prompt("good", 2, 3), Prompt("bad", 3, 3)])
    assert [g and g.prompt_id for g in admitted] == [None, "good", None]
    assert ledger.book.frontier == 4 and ledger.counts().live == 2


def test_a_quarantined_prompt_takes_no_room():
    ledger = make(prompts_per_step=1, max_staleness_versions=0)
    poison(ledger, "bad")
    assert ledger.capacity == 1
    assert len(ledger.admit([Prompt("bad", 1, 3), Prompt("good", 2, 3)])) == 2


def test_after_a_restore_prompts_in_quarantine_are_dropped_unless_they_are_in_training():
    ledger = make(prompts_per_step=1)
    batch = hand_over(ledger, 1)
    admit(ledger, 1)
    ledger.book.quarantined = {"p0": "bad", "p1": "bad"}
    ledger.drop_quarantined()
    assert ledger.check().dropped == {"prompt is quarantined": 2}
    assert commit(ledger, batch).trained == 2


# ---- first k -------------------------------------------------------------------------------------------------------


def test_the_first_k_make_the_group_and_the_surplus_loses_its_leases():
    ledger = make(prompts_per_step=1, spare_rollouts_per_prompt=2)
    admit(ledger, 1)
    *winners, slow, complete = ledger.lease("a", 4, 0.0)
    append(ledger, slow, 5)
    append(ledger, complete, 5, finish_reason="stop")
    held = [(r.rollout_id, r.lease_id) for r in (slow, complete)]
    for rollout in winners:
        finish(ledger, rollout)
    assert ledger.check().dropped == {"surplus": 2}
    for rollout_id, lease_id in held:
        with pytest.raises(LeaseLost):
            ledger.append(rollout_id, lease_id, 5, 1, 0, "stop", 0.0)
        with pytest.raises(LeaseLost):
            ledger.score(rollout_id, lease_id, 1.0)
    batch = ledger.select()
    assert batch.rollout_ids == tuple(r.rollout_id for r in winners)
    assert commit(ledger, batch).trained == 2
    assert ledger.book.dropped_lengths == {5: 2} and ledger.book.lengths == {5: 2, 3: 2}


def test_a_surplus_rollout_s_old_tokens_do_not_age_its_group():
    """What was dropped is in no batch, so its tokens bind nobody."""
    ledger = make(prompts_per_step=1, spare_rollouts_per_prompt=1, over_stale="drop")
    admit(ledger, 1)
    slow, *winners = ledger.lease("slow", 3, 0.0)
    append(ledger, slow, 1)
    assert pass_by(ledger) and pass_by(ledger)
    for rollout in winners:
        finish(ledger, rollout)
    assert ledger.book.ages == {2: 1}
    batch = ledger.select()
    assert batch and batch.group_ids == (1,) and batch.staleness_max == 0


def test_a_failed_rollout_has_a_stand_in_and_its_prompt_is_not_quarantined():
    ledger = make(prompts_per_step=1, spare_rollouts_per_prompt=1, max_attempts=1)
    admit(ledger, 1)
    bad, *good = ledger.lease("a", 3, 0.0)
    assert not fail(ledger, bad)
    for rollout in good:
        finish(ledger, rollout)
    assert ledger.book.quarantined == {} and commit(ledger, ledger.select()).trained == 2


def test_a_failed_rollout_s_old_tokens_do_not_age_its_group():
    ledger = make(prompts_per_step=1, spare_rollouts_per_prompt=1, max_attempts=1)
    admit(ledger, 1)
    bad, good, _ = ledger.lease("a", 3, 0.0)
    append(ledger, bad, 1, version=0)
    append(ledger, good, 1, version=1)
    fail(ledger, bad)
    assert good.group.oldest_version == 1 and ledger.book.ages == {1: 1}


def test_a_group_that_cannot_be_filled_is_given_up():
    ledger = make(prompts_per_step=1, spare_rollouts_per_prompt=1, max_attempts=1)
    admit(ledger, 1)
    first, second, scored = ledger.lease("a", 3, 0.0)
    finish(ledger, scored)
    fail(ledger, first)
    assert ledger.book.quarantined == {}
    fail(ledger, second)
    counts = ledger.check()
    assert counts.failed == {"broken": 2} and counts.dropped == {"a rollout of its group failed": 1}
    assert ledger.book.quarantined == {"p0": "broken"} and not ledger.book.groups


# ---- dynamic sampling ----------------------------------------------------------------------------------------------


def test_a_group_with_equal_rewards_is_dropped_and_another_takes_its_place():
    ledger = make(prompts_per_step=1, max_staleness_versions=0, dynamic_sampling=True)
    admit(ledger, 1)
    assert ledger.capacity == 0
    for rollout in ledger.lease("a", 2, 0.0):
        finish(ledger, rollout, reward=1.0)
    assert ledger.check().dropped == {"no reward spread": 2}
    assert ledger.select() is None and ledger.capacity == 1
    admit(ledger, 1)
    for reward, rollout in enumerate(ledger.lease("a", 2, 0.0)):
        finish(ledger, rollout, reward=float(reward))
    assert commit(ledger, ledger.select()).trained == 2


def test_without_dynamic_sampling_equal_rewards_are_trained():
    ledger = make()
    assert len(hand_over(ledger, 2).group_ids) == 2


def test_the_last_rollout_s_score_twice_is_a_repeat_also_where_its_group_was_dropped():
    """Its group is gone, and with it the memory of the score: the asker hears that there is nothing left to do."""
    ledger = make(dynamic_sampling=True)
    admit(ledger, 1)
    one, other = ledger.lease("a", 2, 0.0)
    finish(ledger, one)
    append(ledger, other, 1, finish_reason="stop")
    lease_id = other.lease_id
    assert ledger.score(other.rollout_id, lease_id, 1.0)
    with pytest.raises(LeaseLost, match="rollout is gone"):
        ledger.score(other.rollout_id, lease_id, 1.0)
    assert ledger.check().dropped == {"no reward spread": 2}


# ---- staleness -----------------------------------------------------------------------------------------------------


def late_group(over_stale):
    """One group sampled at version 0 stays incomplete while batches of others are trained."""
    ledger = make(over_stale=over_stale, prompts_per_step=1, max_staleness_versions=1)
    admit(ledger, 1)
    late = ledger.lease("slow", 2, 0.0)
    for rollout in late:
        append(ledger, rollout, 3)
    return ledger, late


def pass_by(ledger):
    admit(ledger, 1)
    size = ledger.settings.rollouts_per_prompt + ledger.settings.spare_rollouts_per_prompt
    for rollout in ledger.lease("fast", size, 0.0)[: ledger.settings.rollouts_per_prompt]:
        finish(ledger, rollout)
    batch = ledger.select()
    if batch:
        commit(ledger, batch)
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
    assert {late[0].group.group_id} == set(batch.group_ids)
    assert batch.tokens == batch.trainable_tokens == 16


def test_wait_goes_on_where_the_late_group_s_old_tokens_are_forgotten():
    ledger, late = late_group("wait")
    assert pass_by(ledger) and pass_by(ledger) is None
    fail(ledger, late[0])
    assert ledger.select() is None
    fail(ledger, late[1])
    assert ledger.select() is not None


def test_wait_does_not_wait_for_what_waiting_cannot_mend():
    """First segments arrive three versions late: the deadlines are missed whatever is done, and no better batch comes."""
    ledger = make(over_stale="wait", prompts_per_step=1, rollouts_per_prompt=1, max_staleness_versions=2)
    admit(ledger, 2)
    late = ledger.lease("slow", 2, 0.0)
    assert (
        pass_by(ledger) and pass_by(ledger) and pass_by(ledger)
    )  # nobody knows of tokens that are on their way
    for rollout in late:
        append(ledger, rollout, 1, version=0)
    finish(ledger, late[0], tokens=4)
    finish(ledger, late[1], tokens=4)
    for rollout in late:
        batch = ledger.select()
        assert batch is not None and batch.rollout_ids == (rollout.rollout_id,)
        assert batch.tokens == 5 and batch.trainable_tokens == 4
        commit(ledger, batch)


def test_wait_still_waits_for_a_more_urgent_group_whose_deadline_is_missed():
    ledger = make(over_stale="wait", prompts_per_step=1, rollouts_per_prompt=1, max_staleness_versions=2)
    admit(ledger, 1)
    (late,) = ledger.lease("slow", 1, 0.0)
    assert pass_by(ledger) and pass_by(ledger) and pass_by(ledger)
    append(ledger, late, 1, version=0)
    assert pass_by(ledger) is None
    finish(ledger, late)
    assert ledger.select().rollout_ids == (late.rollout_id,)


# ---- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_goes_round_and_the_equation_holds():
    ledger = make()
    batch = hand_over(ledger, 2)
    assert len(batch.rollout_ids) == 4 and batch.tokens == batch.trainable_tokens == 12
    counts = commit(ledger, batch)
    assert counts.holds and counts.trained == 4 and counts.live == 0
    assert ledger.version == 1 and not ledger.book.groups and not ledger.book.batches


def test_the_most_urgent_groups_come_first():
    ledger = make(prompts_per_step=1, rollouts_per_prompt=1, max_staleness_versions=3)
    admit(ledger, 3)
    first, second, third = ledger.lease("a", 3, 0.0)
    finish(ledger, first, version=1)
    finish(ledger, second, version=1)
    finish(ledger, third, version=0)
    order = [ledger.select(after=batch).rollout_ids[0] for batch in range(3)]
    assert order == [r.rollout_id for r in (third, first, second)]


def test_a_group_whose_age_changed_when_it_was_complete_is_handed_over_once():
    ledger = make(rollouts_per_prompt=1, spare_rollouts_per_prompt=1, max_staleness_versions=3)
    admit(ledger, 2)
    slow, fast, other, _ = ledger.lease("a", 4, 0.0)
    append(ledger, slow, 1, version=0)
    finish(ledger, fast, version=1)
    assert ledger.select() is None
    finish(ledger, other, version=0)
    batch = ledger.select()
    assert batch.group_ids == (2, 1) and batch.rollout_ids == (other.rollout_id, fast.rollout_id)


def test_a_batch_that_did_not_arrive_comes_again_and_no_other():
    ledger = make()
    batch = hand_over(ledger, 2)
    admit(ledger, 2)
    for rollout in ledger.lease("e", 100, 0.0):
        finish(ledger, rollout)
    assert ledger.select(after=0) == batch
    assert ledger.select(after=0) == batch
    following = ledger.select(after=batch.batch_ids[0])
    assert not {*following.group_ids} & {*batch.group_ids}
    assert ledger.select(after=0) == batch  # one after the other


def test_the_same_commit_twice_trains_once():
    ledger = make()
    batch = hand_over(ledger, 2)
    counts = commit(ledger, batch)
    assert ledger.commit(batch.batch_ids[0], 1) == counts
    assert ledger.version == 1
    with pytest.raises(BadRequest, match="expected 2"):
        ledger.commit(batch.batch_ids[0] + 1, 1)


def test_versions_are_published_one_by_one():
    ledger = make()
    with pytest.raises(BadRequest, match="1 published outside a commit; present version is 0"):
        ledger.publish(1)
    batch = hand_over(ledger, 2)
    with pytest.raises(BadRequest, match="expected 1"):
        ledger.commit(batch.batch_ids[0], 2)
    with pytest.raises(BadRequest, match="not handed over"):
        ledger.commit(batch.batch_ids[0] + 1, 1)


def test_the_same_publication_twice_publishes_once():
    ledger = make(published=False)
    ledger.publish(7)  # a run may start from any
    ledger.publish(7)
    assert ledger.version == 7 and len(ledger.take_rows()) == 1


def test_a_lost_rollout_is_noticed_at_commit():
    ledger = make()
    batch = hand_over(ledger, 2)
    (group,) = admit(ledger, 1)
    del ledger.book.rollouts[min(group.rollouts)]
    with pytest.raises(ConservationError, match="at version 1"):
        commit(ledger, batch)


def test_a_rollout_in_no_group_is_noticed():
    ledger = make()
    (group,) = admit(ledger, 1)
    del ledger.book.groups[group.group_id]
    with pytest.raises(ConservationError):
        ledger.check()


def test_a_rollout_in_another_s_place_is_noticed_when_each_is_looked_up():
    ledger = make()
    (group,) = admit(ledger, 1)
    ledger.book.rollouts[999] = ledger.book.rollouts.pop(min(group.rollouts))
    assert ledger.check(every_rollout=False).holds
    with pytest.raises(ConservationError, match="missing"):
        ledger.check()


def test_every_change_leaves_its_row():
    ledger = make(rollouts_per_prompt=1, prompts_per_step=1)
    commit(ledger, hand_over(ledger, 1))
    states = [row.state for row in ledger.take_rows()]
    assert states == ["PUBLISHED", "QUEUED", "LEASED", "COMPLETE", "SCORED", "BATCHED", "TRAINED"]
    assert len(ledger.take_rows()) == 0 and ledger.take_closed() == ([1], [1])
