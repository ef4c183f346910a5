from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.runtime.facts import StepFacts
from asyncrl.runtime.metrics import MetricsError, MetricsLog
from asyncrl.runtime.report import MOST_POINTS, draw_report, headline, load, write_report
from asyncrl.runtime.report_panels import Recorded, SnapshotPoint, smooth, spread, wait_series
from asyncrl.runtime.summary import RunIdentity, summarise

RUN = RunIdentity(
    name="quickstart",
    model="models/quickstart-model",
    folder="runs/quickstart",
    steps=60,
    max_staleness_versions=2,
)


def written(tmp_path, facts):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for fact in facts:
            log.write(fact)
    return path


def summary_of(facts, outcome="finished"):
    return summarise(RUN, facts, outcome=outcome, phase_seconds={}, packages={})


def ink(path) -> float:
    """Share of the picture's pixels that are not white."""
    from matplotlib import image

    pixels = image.imread(path)[:, :, :3]
    return float(np.mean(np.any(pixels < 0.98, axis=2)))


def texts(figure) -> list[str]:
    from matplotlib.text import Text

    return [found.get_text() for found in figure.findobj(Text) if found.get_text()]


def test_a_whole_run_is_drawn(tmp_path, run_facts):
    facts = run_facts(60)
    out = tmp_path / "report.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(written(tmp_path, facts), summary_of(facts), out)
    assert out.read_bytes().startswith(b"\x89PNG")
    assert 0.03 < ink(out) < 0.4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


def test_the_panels_show_the_facts(tmp_path, run_facts):
    facts = run_facts(60)
    steps = [fact for fact in facts if isinstance(fact, StepFacts)]
    figure = draw_report(load(written(tmp_path, facts)), summary_of(facts))
    reward, length, staleness, throughput, waits, mismatch = figure.axes
    assert list(reward.get_lines()[0].get_ydata()) == [step.reward_mean for step in steps]
    assert [line.get_label() for line in length.get_lines()] == ["longest", "mean"]
    assert any(
        line.get_label() == "bound 2" and set(line.get_ydata()) == {2} for line in staleness.get_lines()
    )
    masked = next(line for line in staleness.get_lines() if line.get_label() == "tokens masked")
    assert list(masked.get_xdata()) == [step.step for step in steps if step.tokens_masked]
    assert {"engines", "learner"} <= {line.get_label() for line in throughput.get_lines()}
    assert len(waits.collections) == 3
    assert mismatch.get_yscale() == "log"
    shown = texts(figure)
    assert "0.551" in shown and "0.965" in shown and "quickstart  (quickstart-model)" in shown
    assert "nothing recorded" not in shown


@pytest.mark.parametrize("ended", [True, False])
def test_a_run_without_a_step_is_drawn(tmp_path, run_facts, ended):
    facts = run_facts(0)[:20]  # it died while the engines started
    summary = summary_of(facts, outcome="failed: engine small-0 died\nTraceback ...") if ended else None
    figure = draw_report(load(written(tmp_path, facts)), summary)
    shown = texts(figure)
    assert shown.count("nothing recorded") == 6
    assert any("failed: engine small-0 died" in text or "has not ended" in text for text in shown)
    write_report(tmp_path / "no-metrics.jsonl", summary, tmp_path / "report.png")
    assert ink(tmp_path / "report.png") > 0.001


def test_one_step_one_evaluation_and_numbers_that_are_not_finite(tmp_path, step_facts, evaluation_facts):
    facts = [
        evaluation_facts(0, 0, 1),
        step_facts(
            1, reward_mean=math.nan, loss=math.nan, mismatch_max=math.nan, learner_tokens_per_s=math.nan
        ),
        step_facts(2, mismatch_tokens=0),
    ]
    out = tmp_path / "report.png"
    write_report(written(tmp_path, facts), summary_of(facts), out)
    assert ink(out) > 0.01


def test_a_torn_or_foreign_file(tmp_path, run_facts):
    path = written(tmp_path, run_facts(5))
    path.write_bytes(path.read_bytes()[:-30])
    write_report(path, None, tmp_path / "report.png")
    path.write_text("hello\n")
    with pytest.raises(MetricsError, match=r"metrics\.jsonl:1"):
        write_report(path, None, tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_a_long_run_is_thinned_evenly(tmp_path, snapshot_facts):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for second in range(5 * MOST_POINTS):
            log.write(snapshot_facts(float(second), step=0))
    seconds = [point.seconds for point in load(path).points]
    assert MOST_POINTS <= len(seconds) < 2 * MOST_POINTS
    assert set(np.diff(seconds)) == {4.0} and seconds[0] == 0.0


def test_the_headline_carries_what_must_not_be_missed(run_facts):
    facts = run_facts(10)
    title, line = headline(Recorded([], [], []), summary_of(facts))
    assert title == "quickstart  (quickstart-model)"
    for text in ("finished", "10 of 60 steps", "0.551 → 0.965", "0 past the bound", "conservation holds"):
        assert text in line


def test_wait_series_are_shares_of_each_stretch():
    points = [
        SnapshotPoint(60.0 * i, "training", 0.0, {"a": 15.0 * i, "b": 60.0 if i >= 2 else 0.0})
        for i in range(4)
    ]
    xs, (a, b) = wait_series(points, ["a", "b"])
    assert xs == [1.0, 2.0, 3.0]
    assert a == [0.25, 0.25, 0.25] and b == [0.0, 1.0, 0.0]
    assert wait_series(points[:1], ["a"]) == ([], [[]])


@given(st.lists(st.floats(-1e6, 1e6), max_size=30), st.integers(1, 9))
def test_smooth_stays_within_its_neighbours(values, width):
    smoothed = smooth(values, width)
    assert len(smoothed) == len(values)
    for place, value in enumerate(smoothed):
        near = values[max(0, place - width // 2) : place + width // 2 + 1]
        assert min(near) - 1e-6 <= value <= max(near) + 1e-6


def test_smooth_leaves_out_what_is_not_finite():
    assert smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(smooth([math.nan], 1)[0])


@given(st.lists(st.floats(0, 500), max_size=6), st.floats(0.1, 20))
def test_spread_labels_never_overlap_nor_move_down(heights, gap):
    moved = spread(heights, gap)
    assert all(after >= before for before, after in zip(heights, moved, strict=True))
    ordered = sorted(moved)
    assert all(high - low >= gap - 1e-6 for low, high in itertools.pairwise(ordered))


def test_what_was_done_again_after_a_resume_is_drawn_once(tmp_path, step_facts, evaluation_facts):
    done = [*map(step_facts, (1, 2, 3, 4)), evaluation_facts(4, 1, 4), *map(step_facts, (5, 6))]
    again = [*map(step_facts, (4, 5)), evaluation_facts(5, 3, 4)]
    recorded = load(written(tmp_path, [evaluation_facts(0, 1, 4), *done, *again]))
    assert [fact.step for fact in recorded.steps] == [1, 2, 3, 4, 5]
    assert [fact.step for fact in recorded.evaluations] == [0, 5]
