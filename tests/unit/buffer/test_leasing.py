"""Who gets which rollout where KV caches are small: single rules, each by the shortest schedule that shows it."""

import pytest

from asyncrl.buffer.leasing import LONGEST_PASSED_S, MOST_PASSES
from asyncrl.buffer.ledger import Ledger, Prompt
from asyncrl.buffer.records import LedgerSettings
from asyncrl.buffer.schema import State

PROMPT_TOKENS = 10


def ledger_with(lengths, *, fresh=0):
    """A queued rollout of so many tokens each, the first the most urgent, then fresh ones. Each has a group of its own."""
    groups = len(lengths) + fresh
    ledger = Ledger(LedgerSettings(prompts_per_step=groups + 1, rollouts_per_prompt=1))
    ledger.publish(0)
    ledger.admit([Prompt(f"p{i}", i, PROMPT_TOKENS) for i in range(groups)])
    for rollout, length in zip(ledger.lease("maker", len(lengths), 0.0), lengths, strict=True):
        ledger.append(rollout.rollout_id, rollout.lease_id, 0, length, 0, "", 0.0)
    ledger.release_engine("maker")
    return ledger


def busy(ledger, *engines):
    """Each generates a group of its own, so that none may take just anything."""
    for engine in engines:
        (group,) = ledger.admit([Prompt(f"of {engine}", ledger.book.frontier, PROMPT_TOKENS)])
        ledger.book.lease([*group.rollouts.values()], engine, ledger.book.next_lease, 0.0)


def lease(ledger, engine, room, *, limit=100, now=0.0, request=1, **more):
    """Tokens of those that it gets."""
    got = ledger.lease(engine, limit, now, kv_free_tokens=room, request=request, **more)
    return [r.length for r in got]


def test_what_does_not_fit_is_passed_over_and_the_next_in_order_are_taken():
    ledger = ledger_with([100, 30, 90, 20], fresh=1)
    busy(ledger, "small", "large")
    assert lease(ledger, "small", 75) == [30, 20, 0]  # with their prompts 40 and 30 of 75
    assert ledger.held_back
    assert lease(ledger, "large", 1000, request=2) == [100, 90]
    assert not ledger.held_back


def test_the_order_of_urgency_stays_among_those_that_fit():
    ledger = ledger_with([30, 20, 10])
    busy(ledger, "e")
    assert lease(ledger, "e", 65) == [30, 10]  # 40 of 65, 30 do not fit into the rest, 20 do
    assert lease(ledger, "e", 65, request=2) == [20]


def test_the_room_is_a_limit_to_the_token():
    for room, expected in ((39, []), (40, [30])):
        ledger = ledger_with([30])
        busy(ledger, "e")
        assert lease(ledger, "e", room) == expected


def test_without_a_word_on_room_anything_goes_out():
    ledger = ledger_with([100, 30])
    busy(ledger, "e")
    assert lease(ledger, "e", -1) == [100, 30]


def test_fresh_prompts_take_room_and_are_never_refused_for_it():
    ledger = ledger_with([5], fresh=3)
    busy(ledger, "e", "f")
    assert lease(ledger, "e", 0) == [0, 0, 0]
    assert lease(ledger, "f", 15, request=2) == [5]


def test_a_fresh_sibling_leaves_less_room_for_a_partial_one():
    ledger = Ledger(LedgerSettings(prompts_per_step=2, rollouts_per_prompt=2))
    ledger.publish(0)
    ledger.admit([Prompt("p", 0, PROMPT_TOKENS)])
    _, second = ledger.lease("maker", 2, 0.0)
    ledger.append(second.rollout_id, second.lease_id, 0, 5, 0, "", 0.0)
    ledger.release_engine("maker")
    busy(ledger, "e")
    assert lease(ledger, "e", 24) == [0]  # 10 of 24; 15 do not fit into 14
    assert lease(ledger, "e", 15, request=2) == [5]


def test_what_only_waits_for_its_score_needs_no_room():
    ledger = ledger_with([100, 100])
    done, partial = ledger.lease("maker", 2, 0.0)
    ledger.append(done.rollout_id, done.lease_id, 100, 0, 0, "stop", 0.0)
    ledger.release_engine("maker")
    busy(ledger, "e")
    assert ledger.lease("e", 9, 0.0, kv_free_tokens=0) == [done] and partial.state is State.QUEUED


def test_an_engine_that_generates_nothing_may_take_any_one():
    ledger = ledger_with([100, 90], fresh=0)
    assert lease(ledger, "e", 0) == [100]  # from then on it has something
    assert lease(ledger, "e", 0, request=2) == []
    (held,) = (r for r in ledger.book.rollouts.values() if r.state is State.LEASED)
    ledger.append(held.rollout_id, held.lease_id, 100, 0, 0, "stop", 0.0)
    assert lease(ledger, "e", 0, request=3) == [90]  # one that is being scored holds no cache


@pytest.mark.parametrize("ends", ["complete", "fail", "release", "expire", "engine lost", "dropped"])
def test_an_engine_generates_nothing_once_its_last_rollout_went_whatever_way(ends):
    ledger = ledger_with([100])
    busy(ledger, "e")
    (held,) = (r for r in ledger.book.rollouts.values() if r.state is State.LEASED)
    match ends:
        case "complete":
            ledger.append(held.rollout_id, held.lease_id, 0, 1, 0, "stop", 0.0)
        case "fail":
            ledger.fail(held.rollout_id, held.lease_id, "broken")
        case "release":
            ledger.release(held.rollout_id, held.lease_id)
        case "expire":
            assert ledger.expire(1e6) == [held]
        case "engine lost":
            assert ledger.release_engine("e") == 1
        case "dropped":
            ledger.book.drop_group(held.group, "for the test")
    assert lease(ledger, "e", 0, limit=1) == [100]


def test_passed_over_eight_times_it_goes_to_the_next_that_asks():
    ledger = ledger_with([100])
    busy(ledger, "e", "f")
    for request in range(1, MOST_PASSES + 1):
        assert lease(ledger, "ef"[request % 2], 0, request=request) == []
    assert lease(ledger, "e", 0, request=MOST_PASSES + 1) == [100]


def test_a_request_that_waits_counts_once_however_often_it_is_looked_at():
    ledger = ledger_with([100])
    busy(ledger, "e", "f")
    for look in range(5 * MOST_PASSES):
        assert lease(ledger, "ef"[look % 2], 0, request=1 + look % 2) == []
    (rollout,) = (r for r in ledger.book.rollouts.values() if r.state is State.QUEUED)
    assert rollout.passed.times == 2


def test_time_alone_moves_it_on_to_a_request_that_waits():
    ledger = ledger_with([100])
    busy(ledger, "e")
    assert lease(ledger, "e", 0, now=7.0) == []
    assert lease(ledger, "e", 0, now=6.99 + LONGEST_PASSED_S) == []
    assert lease(ledger, "e", 0, now=7.01 + LONGEST_PASSED_S) == [100]


def test_passes_are_forgotten_once_it_went_out():
    ledger = ledger_with([100])
    busy(ledger, "e")
    for request in range(1, MOST_PASSES + 1):
        assert lease(ledger, "e", 0, request=request) == []
    assert lease(ledger, "large", 1000, request=20) == [100]
    ledger.release_engine("large")
    assert lease(ledger, "e", 0, request=21) == []


def test_what_did_not_arrive_is_given_again_whatever_the_room():
    ledger = ledger_with([100, 90])
    busy(ledger, "e")
    after = ledger.book.engines["e"].last_lease_id
    assert lease(ledger, "e", 1000, after=after) == [100, 90]
    assert lease(ledger, "e", 0, request=2, after=after) == [100, 90]
    assert not ledger.held_back


def test_at_the_memory_budget_only_the_next_batch_goes_out_as_far_as_there_is_room():
    ledger = Ledger(LedgerSettings(prompts_per_step=2, rollouts_per_prompt=1))
    ledger.publish(0)
    ledger.admit([Prompt(f"p{i}", i, PROMPT_TOKENS) for i in range(4)])
    for rollout, length in zip(ledger.lease("maker", 4, 0.0), (100, 20, 30, 40), strict=True):
        ledger.append(rollout.rollout_id, rollout.lease_id, 0, length, 0, "", 0.0)
    ledger.release_engine("maker")
    busy(ledger, "e")
    assert lease(ledger, "e", 60, next_batch_only=True) == [20]
    assert lease(ledger, "e", 60, request=2, next_batch_only=True) == []
    assert lease(ledger, "e", 60, now=LONGEST_PASSED_S, request=2, next_batch_only=True) == [100]


def test_one_look_passes_over_a_bounded_number():
    """Else a request that waits would have the loop walk a long queue, again and again. None is lost by it."""
    ledger = ledger_with([100] * 70, fresh=1)
    busy(ledger, "e")
    assert lease(ledger, "e", 0) == [] and ledger.held_back
    assert lease(ledger, "e", 0, now=LONGEST_PASSED_S) == [100] * 64 + [0]
    assert lease(ledger, "large", 10_000, request=2) == [100] * 6
