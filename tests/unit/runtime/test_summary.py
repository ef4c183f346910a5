from __future__ import annotations

import io
import json
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncrl.generators.estimates import Estimate, over_prompts
from asyncrl.runtime.facts import LEARNER_WAITS, BufferFacts, EvaluationMissed, Snapshot, StepFacts
from asyncrl.runtime.summary import (
    Conservation,
    RunIdentity,
    Spread,
    Summary,
    accuracy_interval,
    conservation,
    read_summary,
    summarise,
    wilson,
    write_summary,
)
from asyncrl.runtime.summary_table import show_summary

RUN = RunIdentity(
    name="quickstart", model="quickstart-model", folder="runs/quickstart", steps=60, max_staleness_versions=2
)


def summary_of(facts, outcome: str = "finished", **phase_seconds: float) -> Summary:
    return summarise(
        RUN, facts, outcome=outcome, phase_seconds=phase_seconds, packages={"torch": "2.13.0", "ray": "2.60"}
    )


def shown(summary: Summary, *, terminal: bool, width: int = 100) -> str:
    stream = io.StringIO()
    show_summary(summary, Console(file=stream, force_terminal=terminal, width=width, color_system=None))
    return stream.getvalue()


def test_a_whole_run(run_facts):
    facts = run_facts(60)
    steps = [fact for fact in facts if isinstance(fact, StepFacts)]
    last = [fact for fact in facts if isinstance(fact, Snapshot)][-1]
    summary = summary_of(facts)
    assert (summary.steps_done, summary.versions_published, summary.seconds) == (60, 60, last.seconds)
    assert summary.held_out_before is not None and summary.held_out_after is not None
    assert (summary.held_out_before.accuracy, summary.held_out_before.prompts) == (141 / 256, 256)
    assert (summary.held_out_after.accuracy, summary.held_out_after.version) == (247 / 256, 60)
    assert summary.held_out_after.low > summary.held_out_before.high
    assert summary.rollouts_trained == last.buffer.trained == 7680
    assert summary.rollouts_over_versions == sum(step.rollouts_over_versions for step in steps)
    assert summary.versions_in_rollout_max == 3
    assert summary.tokens_trained == sum(step.tokens_trained for step in steps)
    assert summary.tokens_past_bound == 0 and summary.tokens_masked > 0
    assert summary.conservation.holds and summary.conservation.admitted == last.buffer.admitted
    assert summary.mismatch is not None and summary.mismatch.max == max(step.mismatch_max for step in steps)
    assert summary.engine_tokens_per_s == pytest.approx(2300, rel=0.02)
    assert summary.waits[LEARNER_WAITS] == last.waits[LEARNER_WAITS]


def test_a_run_that_failed_before_its_first_step():
    summary = summary_of([], outcome="failed: engine small-0: out of memory")
    assert summary.steps_done == 0 and summary.conservation.holds
    assert summary.held_out_before is summary.mismatch is summary.staleness is summary.reward_last is None
    assert summary.engine_tokens_per_s is summary.learner_tokens_per_s is summary.engine_stall_seconds is None
    text = shown(summary, terminal=False)
    assert "failed: engine small-0: out of memory" in text and "0 of 60" in text and "None" not in text


def test_averages_are_weighted_by_what_they_are_of(step_facts):
    facts = [
        step_facts(
            1, tokens_trained=90, tokens_masked=10, staleness_mean=1.0, staleness_max=1, train_s=1.0,
            learner_tokens_per_s=1000.0, mismatch_tokens=1, mismatch_mean=4.0, mismatch_p95=4.0, mismatch_max=4.0,
            publish_s=0.1, lag_wait_s=0.0, engine_stall_s=0.02,
        ),
        step_facts(
            2, tokens_trained=300, tokens_masked=0, staleness_mean=2.0, staleness_max=2, train_s=3.0,
            learner_tokens_per_s=2000.0, mismatch_tokens=3, mismatch_mean=0.0, mismatch_p95=0.0, mismatch_max=0.0,
            publish_s=0.3, lag_wait_s=0.25, engine_stall_s=0.04,
        ),
    ]  # fmt: skip
    summary = summary_of(facts)
    assert summary.staleness == Spread(mean=1.75, max=2)
    assert summary.learner_tokens_per_s == 1750.0
    assert summary.mismatch is not None
    assert (summary.mismatch.mean, summary.mismatch.max, summary.mismatch.p95, summary.mismatch.tokens) == (
        1,
        4,
        4,
        4,
    )
    assert summary.weight_sync_seconds == Spread(mean=pytest.approx(0.2), max=0.3)
    assert summary.lag_wait_seconds == Spread(mean=0.125, max=0.25)
    assert summary.engine_stall_seconds == Spread(mean=pytest.approx(0.03), max=0.04)
    waited = "for engines too far behind mean 0.125 s, max 0.250 s"
    assert waited in shown(summary, terminal=False)
    assert "too far behind" not in shown(summary_of(facts[:1]), terminal=False)


def test_generation_is_counted_over_the_time_of_training_alone(snapshot_facts):
    def rate(seconds, phase, tokens_per_s):
        return snapshot_facts(seconds, step=1, phase=phase, engine_tokens_per_s=tokens_per_s)

    facts = [
        rate(0.0, "engine start", 0.0),
        rate(10.0, "evaluation", 9000.0),
        rate(20.0, "training", 1000.0),  # the time before it was not training
        rate(21.0, "training", 2000.0),
        rate(24.0, "training", 1000.0),
        rate(25.0, "training", math.nan),
        rate(30.0, "evaluation", 9000.0),
    ]
    assert summary_of(facts).engine_tokens_per_s == pytest.approx((1 * 2000 + 3 * 1000) / 4)


def test_steps_without_a_measured_mismatch_are_left_out_and_nan_is_not_hidden(step_facts):
    unmeasured = step_facts(1, mismatch_tokens=0, mismatch_max=9.0, mismatch_mean=9.0, mismatch_p95=9.0)
    assert summary_of([unmeasured]).mismatch is None
    sound = step_facts(2, mismatch_tokens=10, mismatch_max=1e-5)
    broken = step_facts(3, mismatch_tokens=10, mismatch_max=math.nan)
    mismatch = summary_of([unmeasured, sound, broken]).mismatch
    assert mismatch is not None and (mismatch.tokens, mismatch.max, mismatch.steps_not_finite) == (
        10,
        1e-5,
        1,
    )
    assert "NOT FINITE in 1 steps" in shown(summary_of([sound, broken]), terminal=False)


def test_before_is_the_first_evaluation_at_step_0_and_after_the_last_later_one(evaluation_facts):
    def evaluation(step, correct):
        return evaluation_facts(step, correct, 10)

    only_before = summary_of([evaluation(0, 4)])
    assert only_before.held_out_before is not None and only_before.held_out_after is None
    several = summary_of([evaluation(0, 4), evaluation(5, 6), evaluation(9, 8)])
    assert several.held_out_after is not None and several.held_out_after.accuracy == 0.8
    missed = EvaluationMissed(seconds=7.0, step=7, version=7, reason="late")
    with_missed = summary_of([evaluation(0, 4), evaluation(5, 6), missed])
    assert (several.evaluations, several.evaluations_missed) == (3, 0)
    assert (with_missed.evaluations, with_missed.evaluations_missed) == (2, 1)
    assert "2, and 1 that came to nothing" in shown(with_missed, terminal=False)
    assert with_missed.held_out_after is not None and with_missed.held_out_after.step == 5


def test_several_answers_to_a_prompt_are_told_with_their_k(evaluation_facts):
    by_k = {4: Estimate(0.75, 0.1)}
    fact = evaluation_facts(
        0, 5, 10, rollouts_per_prompt=4, pass_at=by_k, maj_at=by_k, version=3, oldest_version=2, failed=2
    )
    text = shown(summary_of([fact]), terminal=False, width=300)
    for said in ("10 prompts x 4", "versions 2 to 3", "pass@4 0.750", "maj@4 0.750", "2 answers could not"):
        assert said in text, text


@pytest.mark.parametrize(
    ("spread", "draws"),
    [
        (0.5, 10),  # the answers to a prompt are all alike: as many draws as prompts
        (0.4, 14.0625),  # 0.25 / (0.16 / 9)
        (0.25, 36),
        (0.1, 40),  # never more than answers
        (0.0, 10),  # that no spread was found does not say that there is none
    ],
)
def test_the_interval_of_several_answers_lies_between_prompts_and_answers(evaluation_facts, spread, draws):
    rows = [0.5 + spread * (1 if i % 2 else -1) for i in range(10)]
    fact = evaluation_facts(0, 5, 10, rollouts_per_prompt=4, accuracy=over_prompts(rows))
    assert accuracy_interval(fact) == pytest.approx(wilson(0.5, draws), abs=1e-9)


counts = st.integers(0, 10**6)
reasons = st.dictionaries(st.sampled_from(["over_stale", "timeout", "quarantine"]), counts)


@given(st.lists(counts, min_size=6, max_size=6), reasons, reasons, st.integers(-5, 5))
def test_conservation_holds_exactly_when_the_counts_add_up(states, dropped, failed, off):
    queued, leased, complete, scored, batched, trained = states
    admitted = sum(states) + sum(dropped.values()) + sum(failed.values())
    found = conservation(
        BufferFacts(
            queued=queued, leased=leased, complete=complete, scored=scored, batched=batched, trained=trained,
            dropped=dropped, failed=failed, admitted=admitted + off,
        )
    )  # fmt: skip
    assert found.holds == (off == 0)
    assert found.live == queued + leased + complete + scored + batched


@pytest.mark.parametrize(
    "correct, n, low, high",
    # Found by bisection on the score equation (p - share)^2 = z^2 p (1 - p) / n with z = 1.959963984540054.
    [
        (5, 10, 0.236593, 0.763407),
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (81, 263, 0.255289, 0.366210),
        (15, 148, 0.062386, 0.160487),
        (1, 29, 0.006113, 0.171755),
    ],
)
def test_wilson_interval(correct, n, low, high):
    assert wilson(correct / n, n) == pytest.approx((low, high), abs=1e-6)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_its_ends_solve_the_score_equation(case):
    correct, n = case
    share = correct / n
    low, high = wilson(share, n)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert (share - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / n, rel=1e-6)


def test_wilson_refuses_more_right_than_there_are():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"share=1\.5, n=2"):
        wilson(1.5, 2)


def test_a_summary_is_read_as_it_was_written(tmp_path, run_facts, step_facts):
    path = tmp_path / "summary.json"
    for facts in (
        [],
        run_facts(5),
        [step_facts(1, reward_mean=math.nan, loss=math.nan, mismatch_max=math.inf)],
    ):
        summary = summary_of(facts, training=12.5)
        write_summary(summary, path)
        assert read_summary(path) == summary
    assert json.loads(path.read_text())["run"]["name"] == "quickstart"
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_reading_something_else_says_which_file(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text('{"run": 3}')
    with pytest.raises(ValueError, match=r"summary\.json: expected a run's summary"):
        read_summary(path)


def test_phases_come_in_the_order_of_a_run():
    summary = summarise(
        RUN, [], outcome="stopped", packages={},
        phase_seconds={"odd": 1.0, "training": 2.0, "model": 3.0, "engine start": 4.0},
    )  # fmt: skip
    assert list(summary.phase_seconds) == ["model", "engine start", "training", "odd"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal_and_the_plain_one_has_the_same_rows(run_facts, width):
    summary = summary_of(run_facts(60), training=170.2)
    table, lines = shown(summary, terminal=True, width=width), shown(summary, terminal=False)
    assert max(len(line) for line in table.splitlines()) == min(width, 110)
    for text in (
        "finished",
        "60 of 60",
        "0.551",
        "0.965",
        "conservation",
        "holds",
        "span two or more",
        "170.2 s",
    ):
        assert text in table and text in lines
    assert "╭" in table and lines.isascii()


def test_what_the_buffer_was_asked_to_bear(run_facts):
    facts = run_facts(60)
    last = [fact for fact in facts if isinstance(fact, Snapshot)][-1].buffer
    summary = summary_of(facts)
    use = summary.buffer
    assert (use.recoveries, use.quarantined_prompts, use.memory_bytes) == (1, 2, 2**31)
    assert use.held_bytes_max >= last.held_bytes > 0
    text = shown(summary, terminal=False)
    assert "0 0 0 0 0 0 0 0 0 3 (deciles of answer length, the shortest first)" in text
    assert "(reward timeout 2); 2 prompts quarantined" in text
    assert "buffer restarts      1: a process died and went on from the log" in text
    assert " of 2.0 GiB" in text


def test_a_quiet_buffer_takes_one_line_of_the_summary(run_facts):
    text = shown(summary_of(run_facts(5)), terminal=False)
    assert "tokens held          at most" in text
    for word in ("dropped by length", "quarantined", "buffer restarts"):
        assert word not in text


def test_what_is_broken_is_called_so(run_facts):
    summary = summary_of(run_facts(5))
    broken = msgspec.structs.replace(
        summary,
        tokens_past_bound=7,
        conservation=Conservation(
            admitted=9, trained=1, dropped={"over_stale": 2}, failed={}, live=3, holds=False
        ),
    )
    text = shown(broken, terminal=False)
    assert "BROKEN: 9 admitted = 1 trained + 2 dropped + 0 failed + 3 live" in text
    assert "7 tokens: BROKEN" in text
    assert "BROKEN" not in shown(summary, terminal=False)
