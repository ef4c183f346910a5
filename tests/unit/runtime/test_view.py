from __future__ import annotations

import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncrl.runtime.bars import SPARK, compact, shares, sparkline
from asyncrl.runtime.bottleneck import bottleneck, wait_shares
from asyncrl.runtime.facts import (
    ENGINES_WAIT,
    LEARNER_WAITS,
    PROMPTS_WAIT,
    BufferFacts,
    EngineFacts,
    Snapshot,
    StepFacts,
)
from asyncrl.runtime.live_view import LiveView, Screen, draw, eta_s, with_snapshot, with_step
from asyncrl.runtime.plain_view import HEADER_EVERY, PlainView, clock, step_line
from asyncrl.runtime.view import open_view


def waiting(snapshot: Snapshot, **waits: float) -> Snapshot:
    names = {"learner": LEARNER_WAITS, "engines": ENGINES_WAIT, "prompts": PROMPTS_WAIT}
    return msgspec.structs.replace(snapshot, waits={names[key]: value for key, value in waits.items()})


@pytest.mark.parametrize(
    "waits, expected",
    [
        ({}, "nobody waits: both sides are busy"),
        ({"learner": 0.9}, "nobody waits: both sides are busy"),
        ({"learner": 6.2}, "learner waits for rollouts 62 %: generation is the bottleneck"),
        ({"engines": 5.0}, "engines wait for prompts 50 %: the prompt source is the bottleneck"),
        (
            {"engines": 5.0, "prompts": 8.0},
            "prompts wait for staleness 80 %, engines wait for prompts 50 %: training is the bottleneck",
        ),
        (
            {"prompts": 8.0},
            "prompts wait for staleness 80 %: training sets the pace, the engines keep busy",
        ),
        (
            {"learner": 3.0, "engines": 5.0, "prompts": 8.0},
            "prompts wait for staleness 80 %, engines wait for prompts 50 %, learner waits for rollouts 30 %: "
            "the staleness bound holds both sides back",
        ),
        (
            {"learner": 6.0, "engines": 3.0},
            "learner waits for rollouts 60 %, engines wait for prompts 30 %: generation is the bottleneck",
        ),
        (
            {"learner": 3.0, "engines": 6.0},
            "engines wait for prompts 60 %, learner waits for rollouts 30 %: the prompt source is the bottleneck",
        ),
    ],
)
def test_bottleneck_names_who_waits_and_who_is_waited_for(snapshot_facts, waits, expected):
    prev = waiting(snapshot_facts(100.0, step=5), learner=0.0, engines=0.0, prompts=0.0)
    now = waiting(snapshot_facts(110.0, step=8), **waits)
    assert bottleneck(prev, now) == expected


def test_bottleneck_of_a_start_and_of_one_snapshot(snapshot_facts):
    starting = snapshot_facts(5.0, step=0, phase="engine start")
    assert bottleneck(None, starting) == "everyone waits for the learner to start"
    ready = msgspec.structs.replace(starting, learner_state="waiting for rollouts")
    assert bottleneck(None, ready) == "engine small-0 waits for version 0"
    silent = [msgspec.structs.replace(engine, waits_for="") for engine in ready.engines]
    assert (
        bottleneck(None, msgspec.structs.replace(ready, engines=silent))
        == "everyone waits for 2 engines to start"
    )
    now = snapshot_facts(50.0, step=3)
    assert bottleneck(None, now) == "measuring"
    assert bottleneck(now, now) == "measuring"


@given(
    st.dictionaries(st.sampled_from([LEARNER_WAITS, ENGINES_WAIT, PROMPTS_WAIT, "other"]), st.floats(0, 1e6)),
    st.dictionaries(st.sampled_from([LEARNER_WAITS, ENGINES_WAIT, PROMPTS_WAIT, "other"]), st.floats(0, 1e6)),
    st.floats(0.01, 1e4),
)
def test_wait_shares_are_shares_whatever_the_counters_do(before, after, span):
    base = Snapshot(
        seconds=0.0, phase="training", step=0, steps=1, version=0, engines=[], buffer=BufferFacts(),
        learner_state="training", learner_tokens_per_s=0.0, engine_tokens_per_s=0.0, waits=before,
    )  # fmt: skip
    now = msgspec.structs.replace(base, seconds=span, waits=after)
    found = wait_shares(base, now)
    assert set(found) == set(after)
    assert all(0 <= share <= 1 for share in found.values())
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert bottleneck(base, now)


@given(st.lists(st.integers(0, 10**6), min_size=5, max_size=5), st.integers(5, 200))
def test_shares_fill_the_room_and_hide_nobody(counts, room):
    cells = shares(counts, room)
    assert sum(cells) == (room if any(counts) else 0)
    assert all((cell > 0) == (count > 0) for cell, count in zip(cells, counts, strict=True))


@given(st.lists(st.floats(), max_size=50), st.integers(0, 40))
def test_sparkline_has_one_bar_per_value(values, width):
    line = sparkline(values, width)
    assert len(line) == min(len(values), width)
    assert set(line) <= set(SPARK) | {" "}


def test_sparkline_spans_from_lowest_to_highest():
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([5.0, 5.0], 10) == "▁▁"
    assert sparkline([5.0, 10.0], 10, low=0.0) == "▅█"
    assert sparkline([1.0, float("nan"), 2.0], 10) == "▁ █"


@given(st.integers(0, 999_499_999))
def test_compact_counts_are_short_and_near(count):
    text = compact(count)
    assert len(text) <= 4
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    value = float(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
    assert abs(value - count) <= 0.051 * max(count, 1)


def test_clock():
    assert [clock(s) for s in (0, 61.9, 3600 + 62, float("nan"), -1)] == ["0:00", "1:01", "1:01:02", "-", "-"]


def test_eta_follows_the_pace_of_the_last_steps():
    assert eta_s((), 0, 10, 5.0) is None
    assert eta_s(((1, 10.0),), 1, 10, 12.0) is None
    assert eta_s(((1, 10.0), (3, 30.0)), 3, 10, 30.0) == 70.0
    assert eta_s(((1, 10.0), (3, 30.0)), 3, 10, 35.0) == 65.0
    assert eta_s(((1, 10.0), (3, 30.0)), 10, 10, 100.0) is None


def rendered(screen: Screen, width: int) -> list[str]:
    console = Console(
        width=width, file=io.StringIO(), force_terminal=True, color_system=None, legacy_windows=False
    )
    with console.capture() as capture:
        console.print(draw(screen, 149.0, width))
    return capture.get().rstrip("\n").split("\n")


def screen_after(run_facts, seconds: float) -> Screen:
    screen = Screen(run="quickstart", bound=2)
    for fact in run_facts():
        if fact.seconds > seconds:
            break
        if isinstance(fact, StepFacts):
            screen = with_step(screen, fact)
        elif isinstance(fact, Snapshot):
            screen = with_snapshot(screen, fact)
    return screen


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("seconds", [-1.0, 10.0, 41.0, 148.0, 1e6])
def test_the_panel_fits_its_width_at_every_stage(run_facts, width, seconds):
    lines = rendered(screen_after(run_facts, seconds), width)
    assert {len(line) for line in lines} == {width}
    assert len(lines) <= 24


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_says_what_a_person_asks(run_facts, width):
    text = "\n".join(rendered(screen_after(run_facts, 148.0), width))
    for word in ("quickstart", "training", "step 38/60", "eta", "reward", "tokens/s", "queued", "staleness"):
        assert word in text
    for word in (
        "groups held 40/48",
        "learner waits for rollouts",
        "small-1",
        "serving",
        "version 38",
        "of 2",
    ):
        assert word in text


@pytest.mark.parametrize("width", [60, 120])
def test_the_panel_shows_what_the_buffer_holds_and_what_became_of_it(snapshot_facts, width):
    quiet = BufferFacts(held_bytes=1536 * 1024, memory_bytes=2**31)
    loud = msgspec.structs.replace(quiet, quarantined_prompts=2, recoveries=1)
    (line,), (full,) = (
        [line for line in rendered(with_snapshot(Screen(run="r", bound=1), now), width) if "memory" in line]
        for now in (snapshot_facts(50.0, step=7, buffer=buffer) for buffer in (quiet, loud))
    )
    assert "1.5 MiB of 2.0 GiB" in line and "quarantined" not in line
    assert "1.5 MiB of 2.0 GiB  quarantined" in full
    assert ("quarantined prompts 2  restarts 1" in full) == (width == 120)


def test_many_engines_are_shown_by_pool(snapshot_facts):
    engines = [
        EngineFacts(
            engine_id=f"e{i}", pool="big" if i < 10 else "small", state="dead" if i == 3 else "serving", version=7 - i % 2,
            slots_used=10, slots=16, tokens_per_s=100.0, waits_for="version 7" if i == 4 else "",
        )
        for i in range(30)
    ]  # fmt: skip
    snapshot = snapshot_facts(50.0, step=7, version=7, engines=engines)
    lines = rendered(with_snapshot(Screen(run="big", bound=1), snapshot), 100)
    (big,) = (line for line in lines if "big  " in line and "serving" in line)
    assert all(text in big for text in ("9 serving", "1 dead", "6-7", "100/160", "1,000", "1 for version 7"))
    assert sum("serving" in line for line in lines) == 2


def plain(width: int = 300) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=width, force_terminal=False), stream


def test_plain_lines_one_per_step_and_one_per_phase(run_facts):
    console, stream = plain(width=40)  # a pipe has no width: nothing may wrap
    view = open_view("quickstart", console, bound=2)
    assert isinstance(view, PlainView)
    for fact in run_facts(30):
        if isinstance(fact, StepFacts):
            view.step(fact)
        elif isinstance(fact, Snapshot):
            view.update(fact)
    view.note("held-out accuracy 0.965 → ok")
    view.close()
    view.close()
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("phase")] == [
        "phase engine start", "phase training", "phase evaluation",
    ]  # fmt: skip
    steps = [line for line in lines if line.startswith("step ")]
    headers = [line for line in lines if line.strip().startswith("step ") and "reward" in line]
    assert len(steps) == 30 and len(headers) == 1 + 30 // (HEADER_EVERY + 1)
    assert len({len(line) for line in steps + headers}) == 1 and len(steps[0]) < 120
    assert [line.split()[1] for line in steps][:2] == ["1/30", "2/30"]
    assert sum(line.startswith("waits ") for line in lines) == 1
    assert "note  held-out accuracy 0.965 ? ok" in lines
    assert stream.getvalue().isascii()


def test_a_step_line_without_a_snapshot_or_a_finite_loss(step_facts):
    line = step_line(step_facts(12, loss=float("nan")), None)
    assert line.split()[1] == "12" and "nan" in line and " - " in line


def terminal() -> tuple[Console, io.TextIOWrapper]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    return Console(
        file=stream, force_terminal=True, width=100, height=40, _environ={"TERM": "xterm-256color"}
    ), stream


def test_the_live_view_draws_and_gives_the_terminal_back(run_facts):
    console, stream = terminal()
    view = open_view("quickstart", console, bound=2)
    try:
        assert isinstance(view, LiveView)
        view.phase("ray start")
        for fact in run_facts(5):
            if isinstance(fact, StepFacts):
                view.step(fact)
            elif isinstance(fact, Snapshot):
                view.update(fact)
        view.note("held-out accuracy 0.551")
    finally:
        view.close()
        view.close()
    text = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "held-out accuracy 0.551" in text and "step 5/5" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_a_terminal_is_plain_when_asked_or_when_it_cannot_do_more():
    console, _ = terminal()
    assert isinstance(open_view("q", console, bound=2, plain=True), PlainView)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(open_view("q", dumb, bound=2), PlainView)
    ascii_only = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), force_terminal=True)
    assert isinstance(open_view("q", ascii_only, bound=2), PlainView)
