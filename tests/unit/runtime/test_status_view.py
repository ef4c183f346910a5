"""What `asyncrl status` looks like, as a whole: on a wide and on a narrow terminal, at a start, with many engines."""

import io
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from asyncrl.runtime.control import RunStatus
from asyncrl.runtime.engines_table import STATE_STYLES
from asyncrl.runtime.facts import BufferFacts, EngineFacts, HeldOut, PoolFacts, Snapshot
from asyncrl.runtime.status_view import draw_status

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "control.md"
ENDPOINT = "tcp://127.0.0.1:61234"


@pytest.fixture(autouse=True)
def _utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def engine(index, pool="big", **changes):
    facts = {
        "engine_id": f"{pool}-{index}",
        "pool": pool,
        "state": "serving",
        "version": 38,
        "slots_used": 30,
        "slots": 32,
        "tokens_per_s": 1150.4,
        "kv_used_fraction": 0.62,
        "weights": "9c1f6b0e44d2a7e3",
        "node": "10.0.0.4",
    }
    return EngineFacts(**(facts | changes))


def run(**changes):
    snapshot = {
        "seconds": 3748.0,
        "phase": "training",
        "step": 38,
        "steps": 60,
        "version": 38,
        "weights": {37: "07ab58c3e9d1f264", 38: "9c1f6b0e44d2a7e3"},
        "engines": [
            engine(0),
            engine(1, state="updating", version=37, weights="07ab58c3e9d1f264", preemptions=12, deaths=1),
            engine(
                0,
                "small",
                state="restarting",
                version=-1,
                weights="",
                slots_used=0,
                slots=0,
                tokens_per_s=0.0,
                kv_used_fraction=float("nan"),
                deaths=2,
                reason="died: exit code -9, started again in 4 s",
                node="10.0.0.7",
            ),
        ],
        "pools": [
            PoolFacts(name="big", state="serving", engines_wanted=2, engines_serving=2, concurrency=32),
            PoolFacts(
                name="small",
                state="short",
                engines_wanted=1,
                engines_serving=0,
                concurrency="auto",
                reason="small-0 is started again in 4 s",
            ),
        ],
        "buffer": BufferFacts(
            queued=96,
            leased=60,
            complete=2,
            scored=88,
            batched=128,
            trained=4864,
            dropped={"over_stale": 3},
            failed={"reward timeout": 1, "reward sums raised ValueError": 2},
            admitted=5241,
            held_groups=40,
            capacity_groups=48,
            held_bytes=1536 * 1024,
            memory_bytes=2**31,
            recoveries=1,
        ),
        "learner_state": "waiting for rollouts",
        "learner_tokens_per_s": 4200.0,
        "engine_tokens_per_s": 2300.8,
    }
    return RunStatus(
        name="sums",
        started_at=1_760_000_000.0,
        who_waits="learner waits for rollouts 41 %: generation is the bottleneck",
        snapshot=Snapshot(**(snapshot | changes)),
    )


def drawn(status, width, most_engines=None):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(draw_status(status, ENDPOINT, width, most_engines), highlight=False)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


WIDE = """\
learner waits for rollouts 41 %: generation is the bottleneck

run       sums  running, training  1:02:28 since 2025-10-09 08:53:20 UTC
step      38/60  63 %  version 38  weights 9c1f6b0e44d2a7e3
learner   waiting for rollouts  tokens/s 4,200
engines   3  slots 60/64  tokens/s 2,301
buffer    queued 96  leased 60  complete 2  scored 88  batched 128  groups held 40/48  memory 1.5 MiB of 2.0 GiB
          trained 4,864  dropped 3 (over_stale 3)  failed 3 (reward timeout 1, reward sums raised ValueError 2)  restarts 1
control   tcp://127.0.0.1:61234

pool   state    engines  slots per engine
big    serving      2/2                32
small  short        0/1              auto  small-0 is started again in 4 s

engine   state       version  slots  tokens/s   KV  preempted  deaths  weights           node
big-0    serving          38  30/32     1,150  62%          0       0  9c1f6b0e44d2a7e3  10.0.0.4
big-1    updating         37  30/32     1,150  62%         12       1  07ab58c3e9d1f264  10.0.0.4
small-0  restarting     none    0/0         0    -          0       2                    10.0.0.7  died: exit code -9, started again in 4 s
"""
NARROW = """\
learner waits for rollouts 41 %: generation is the bottleneck

run       sums  running, training  1:02:28 since 2025-10-09 08:53:20 UTC
step      38/60  63 %  version 38  weights 9c1f6b0e44d2a7e3
learner   waiting for rollouts  tokens/s 4,200
engines   3  slots 60/64  tokens/s 2,301
buffer    queued 96  leased 60  complete 2  scored 88  batched 128  groups held
          40/48  memory 1.5 MiB of 2.0 GiB
          trained 4,864  dropped 3 (over_stale 3)  failed 3 (reward timeout 1,
          reward sums raised ValueError 2)  restarts 1
control   tcp://127.0.0.1:61234

pool   state    engines  slots per engine
big    serving      2/2                32
small  short        0/1              auto
small: small-0 is started again in 4 s

engine   state       version  slots  tokens/s   KV
big-0    serving          38  30/32     1,150  62%
big-1    updating         37  30/32     1,150  62%
small-0  restarting     none    0/0         0    -
big-1: 12 preempted; 1 death; on 10.0.0.4
small-0: died: exit code -9, started again in 4 s; 2 deaths; on 10.0.0.7
"""
START = """\
learner waits for rollouts 41 %: generation is the bottleneck

run       sums  starting, engine start  1:02:28 since 2025-10-09 08:53:20 UTC
step      0/60  0 %  version none
learner   waiting for rollouts  tokens/s 0
engines   0  slots 0/0  tokens/s 0
buffer    queued 0  leased 0  complete 0  scored 0  batched 0  groups held 0/0
          memory 0 B of 0 B
          trained 0  dropped 0  failed 0
control   tcp://127.0.0.1:61234
"""


def test_on_a_wide_terminal():
    assert drawn(run(), 140) == WIDE.splitlines()


def test_the_document_shows_it_so():
    assert WIDE in DOCUMENT.read_text()


def test_on_a_narrow_terminal():
    assert drawn(run(), 80) == NARROW.splitlines()


def test_at_a_start():
    started = run(
        state="starting",
        phase="engine start",
        step=0,
        version=-1,
        pools=[],
        engines=[],
        buffer=BufferFacts(),
        learner_tokens_per_s=0.0,
        engine_tokens_per_s=0.0,
    )
    assert drawn(started, 80) == START.splitlines()


def test_more_engines_than_fit_are_shown_by_pool():
    many = run(engines=[engine(i) for i in range(40)])
    assert len(drawn(many, 140)) == len(drawn(many, 140, 5)) + 39
    (row,) = (line for line in drawn(many, 140, 5) if "40 serving" in line)
    assert "1,200/1,280" in row or "1200/1280" in row


def test_what_nobody_has_gets_no_column():
    plain = run(engines=[engine(0, kv_used_fraction=float("nan"), node="")], pools=[])
    text = "\n".join(drawn(plain, 140))
    assert not any(word in text for word in ("KV", "preempted", "deaths", "node"))


def test_an_engine_with_other_weights_is_told_of():
    other = engine(2, weights="0000000000000001")
    said = "NOT THE LEARNER'S WEIGHTS: version 38 is 9c1f6b0e44d2a7e3, it loaded 0000000000000001"
    for lines in (
        drawn(run(engines=[engine(0), other]), 230),
        drawn(run(engines=[engine(0), other]), 160, 1),
    ):
        assert [line for line in lines if "NOT THE" in line] == [line for line in lines if said in line] != []
    unknown = [engine(0, weights=""), engine(1, version=3, weights="0000000000000002")]
    assert not any("NOT THE" in line for line in drawn(run(engines=unknown), 230))


def test_what_a_run_says_cannot_act_on_the_terminal():
    evil = "\x1b[2J\x1b]0;x\x07[bold]\nnext"
    status = run(
        engines=[engine(0, reason=evil, node=evil, waits_for=evil, weights=evil)], pools=[], phase=evil
    )
    status = msgspec.structs.replace(status, who_waits=evil, name=evil)
    text = "\n".join(drawn(status, 140) + drawn(status, 60))
    assert "\x1b" not in text and "\x07" not in text and "\\x1b[2J" in text and "[bold]" in text


texts = st.text(max_size=60)
engines = st.builds(
    EngineFacts,
    engine_id=st.text("ab-0", min_size=1, max_size=12),
    pool=st.sampled_from(["a", "b"]),
    state=st.sampled_from(list(STATE_STYLES)),
    version=st.integers(-1, 10**4),
    slots_used=st.integers(0, 4096),
    slots=st.integers(0, 4096),
    tokens_per_s=st.floats(0, 1e6),
    kv_used_fraction=st.floats(0, 1) | st.just(float("nan")),
    preemptions=st.integers(0, 10**6),
    deaths=st.integers(0, 99),
    reason=texts,
    waits_for=texts,
    node=st.text("0123456789.", max_size=15),
    weights=st.just("") | st.text("0123456789abcdef", min_size=16, max_size=16),
)


FULL = EngineFacts(
    engine_id="aaaaaaaaaaaa",
    pool="a",
    state="waiting for room",
    version=10_000,
    weights="0123456789abcdef",
    slots_used=4096,
    slots=4096,
    tokens_per_s=1e6,
    kv_used_fraction=1.0,
    preemptions=10**6,
    deaths=99,
    node="255.255.255.255",
    reason="short of it",
)


@settings(deadline=None)  # the first drawing of a process takes long
@given(st.lists(engines, max_size=6), st.integers(80, 200))
@example([FULL], 110)
@example([FULL], 127)
@example([FULL], 128)
def test_every_status_fits_its_width(found, width):
    lines = drawn(run(engines=found), width)
    assert all(cell_len(line) <= width for line in lines)
    for facts in found:
        assert any(line.startswith(facts.engine_id) for line in lines)


def test_held_out_results_are_shown_where_some_are_wanted():
    def line(**changes):
        (found,) = [row for row in drawn(run(held_out=HeldOut(**changes)), 120) if row.startswith("held out")]
        return found.removeprefix("held out").strip()

    assert line(wanted=True) == "nothing yet"
    assert line(wanted=True, under_way_step=0) == "that of step 0 is under way"
    result = {"step": 20, "accuracy": 0.7124, "standard_error": 0.0201}
    assert line(wanted=True, **result) == "accuracy 0.712 +- 0.020 at step 20"
    assert line(wanted=True, under_way_step=40, **result).endswith("at step 20; that of step 40 is under way")
    assert not [row for row in drawn(run(), 120) if "held out" in row]
