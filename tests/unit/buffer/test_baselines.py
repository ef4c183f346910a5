"""Groups with a greedy baseline, and costs: what of them the ledger, the log and a batch know."""

import asyncio

import numpy as np
import pytest

from asyncrl.buffer import BufferClient, Segment, wire
from asyncrl.buffer.errors import BadRequest
from asyncrl.buffer.ledger import Ledger, Prompt
from asyncrl.buffer.reading import read_log, rollouts_table
from asyncrl.buffer.records import LedgerSettings
from asyncrl.buffer.schema import State
from tests.buffers import Buffer, admit

ENGINE = "e"


def make(**changes):
    settings = dict(prompts_per_step=1, rollouts_per_prompt=2, greedy_baseline=True, max_attempts=1)
    ledger = Ledger(LedgerSettings(**{**settings, **changes}))
    ledger.publish(0)
    first = ledger.book.frontier
    (group,) = ledger.admit([Prompt("p", first, 3)])
    return ledger, group, ledger.lease(ENGINE, 100, 0.0)


def append(ledger, rollout, tokens=2, finish_reason="", version=None):
    version = ledger.version if version is None else version
    ledger.append(rollout.rollout_id, rollout.lease_id, rollout.length, tokens, version, finish_reason, 0.0)


def finish(ledger, rollout, reward=1.0):
    append(ledger, rollout, finish_reason="stop")
    ledger.score(rollout.rollout_id, rollout.lease_id, reward)


def test_a_group_has_one_rollout_more_and_the_baseline_is_leased_first():
    _, group, leased = make()
    assert [r.greedy for r in leased] == [True, False, False]
    assert group.greedy_id == leased[0].rollout_id == min(group.rollouts)
    _, plain, leased = make(greedy_baseline=False)
    assert plain.greedy_id == 0 and [r.greedy for r in leased] == [False, False]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_a_group_is_complete_with_its_rollouts_and_its_baseline(order):
    ledger, group, leased = make()
    for index in order:
        assert ledger.select() is None
        finish(ledger, leased[index], reward=float(index))
    batch = ledger.select()
    assert batch.rollout_ids == tuple(group.rollouts) and len(batch.rollout_ids) == 3
    counts = ledger.commit(batch.batch_ids[0], 1)
    assert counts.holds and (counts.trained, counts.baselines) == (3, 1)


def test_a_baseline_does_not_stand_in_for_a_rollout():
    ledger, _, leased = make(rollouts_per_prompt=1, spare_rollouts_per_prompt=1)
    baseline, one, spare = leased
    finish(ledger, baseline)
    assert ledger.select() is None and ledger.counts().dropped == {}
    finish(ledger, one)
    assert ledger.counts().dropped == {"surplus": 1} and spare.state is State.DROPPED
    assert ledger.select() is not None


def test_first_k_drops_the_surplus_at_once_and_waits_for_the_baseline():
    ledger, group, (baseline, one, two, spare) = make(spare_rollouts_per_prompt=1)
    finish(ledger, one)
    finish(ledger, two)
    assert ledger.counts().dropped == {"surplus": 1} and spare.state is State.DROPPED
    assert baseline.state is State.LEASED and ledger.select() is None
    finish(ledger, baseline)
    assert ledger.select().rollout_ids == tuple(group.rollouts)


def test_equal_rewards_are_those_of_the_sampled_rollouts():
    ledger, _, (baseline, one, two) = make(dynamic_sampling=True)
    finish(ledger, baseline, reward=0.0)
    finish(ledger, one, reward=1.0)
    finish(ledger, two, reward=1.0)
    assert ledger.check().dropped == {"no reward spread": 3}
    ledger, _, (baseline, one, two) = make(dynamic_sampling=True)
    finish(ledger, one, reward=0.0)
    finish(ledger, two, reward=1.0)
    finish(ledger, baseline, reward=1.0)
    assert ledger.select() is not None


def test_a_group_whose_baseline_fails_is_given_up():
    ledger, _, leased = make(spare_rollouts_per_prompt=3)
    ledger.fail(leased[0].rollout_id, leased[0].lease_id, "broken")
    counts = ledger.check()
    assert counts.failed == {"broken": 1} and counts.dropped == {"a rollout of its group failed": 5}
    assert ledger.book.quarantined == {"p": "broken"} and not ledger.book.groups


def test_a_rollout_that_fails_leaves_a_group_that_spare_ones_can_fill():
    ledger, _, (_, bad, *others) = make(spare_rollouts_per_prompt=1)
    ledger.fail(bad.rollout_id, bad.lease_id, "broken")
    assert ledger.book.quarantined == {} and len(others) == 2
    ledger.fail(others[0].rollout_id, others[0].lease_id, "broken")
    assert ledger.book.quarantined == {"p": "broken"}


def test_a_baseline_does_not_age_its_group():
    ledger, group, (baseline, one, two) = make(max_staleness_versions=1)
    append(ledger, baseline, 5, version=0)
    assert group.oldest_version is None and group.newest_version == -1 and not ledger.book.ages
    ledger.release(baseline.rollout_id, baseline.lease_id)
    ledger.book.version = 3
    finish(ledger, one)
    finish(ledger, two)
    assert group.oldest_version == 3
    (again,) = ledger.lease("other", 1, 0.0)
    assert again is baseline and again.greedy and again.length == 5
    finish(ledger, again)
    batch = ledger.select()
    assert (batch.staleness_max, batch.tokens, batch.trainable_tokens) == (0, 4, 4)


# ---- through a real buffer -------------------------------------------------------------------------------------------


async def answer(buffer, lease, cost, count=3):
    segment = Segment(
        rollout_id=lease.rollout_id,
        lease_id=lease.lease_id,
        start=len(lease.tokens) // 4,
        version=0,
        tokens=np.arange(count),
        logprobs=np.full(count, -0.5, np.float32),
        finish_reason="stop",
    )
    assert await buffer.append(ENGINE, [segment]) == []
    scored = wire.Scored(lease.rollout_id, lease.lease_id, 0.5, cost)
    assert await buffer.score([scored]) == []


@pytest.mark.parametrize("crashes", [False, True])
def test_a_batch_has_costs_and_flags_its_baselines_also_after_a_crash(tmp_path, crashes):
    buffer = Buffer(tmp_path, prompts_per_step=1, greedy_baseline=True)

    async def work(limit):
        async with BufferClient(buffer.address) as client:
            for lease in await client.lease(ENGINE, limit, 5.0):
                assert lease.greedy == (lease.rollout_id == 1)
                await answer(client, lease, cost=0.25 * lease.rollout_id)

    try:
        buffer.client.publish(0)
        asyncio.run(admit(buffer.address, 1))
        asyncio.run(work(2))
        if crashes:
            buffer.again()
        asyncio.run(work(2))
        selection, rows = buffer.client.read_batch(5.0)
        assert rows["rollout_id"].to_pylist() == [1, 2, 3] and selection.trainable_tokens == 6
        assert rows["cost"].to_pylist() == [0.25, 0.5, 0.75]
        assert rows["greedy"].to_pylist() == [True, False, False]
        assert rows["trainable"].to_pylist() == [[False] * 3, [True] * 3, [True] * 3]
        if crashes:
            buffer.again()  # from a base and the rows behind it
        assert buffer.client.commit(selection.batch_ids, 1).baselines == 1
        table = rollouts_table(read_log(tmp_path / "rollouts"))
        assert table["greedy"].to_pylist() == [True, False, False]
        assert table["cost"].to_pylist() == [0.25, 0.5, 0.75]
    finally:
        buffer.close()


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), 1e39])
def test_a_cost_that_is_no_number_is_refused(tmp_path, cost):
    buffer = Buffer(tmp_path, prompts_per_step=1)

    async def work():
        async with BufferClient(buffer.address) as client:
            (lease,) = await client.lease(ENGINE, 1, 5.0)
            with pytest.raises(BadRequest, match="cost of rollout 1"):
                await answer(client, lease, cost)

    try:
        buffer.client.publish(0)
        asyncio.run(admit(buffer.address, 1))
        asyncio.run(work())
    finally:
        buffer.close()
