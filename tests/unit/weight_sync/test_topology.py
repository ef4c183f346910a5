"""Which transport `auto` picks, as a table; and what is said where one was asked for that cannot reach an engine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.weight_sync.topology import (
    Place,
    Transport,
    collective_backend,
    faults,
    is_collective,
    pulled_by,
)

LEARNER = Place(host="a", gpus=("g0",))
ON_CPU = Place(host="a")


def at(host: str, *gpus: str) -> Place:
    return Place(host=host, gpus=gpus)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        (at("a", "g0"), "ipc"),
        (at("a", "g1"), "shm"),
        (at("a", "g0", "g1"), "shm"),  # tensor-parallel: only one of its workers is on the learner's GPU
        (at("a", "g1", "g0"), "shm"),
        (at("a"), "shm"),
        (at("b", "g2"), "tcp"),
        (at("b"), "tcp"),
        (at("c", "g0"), "tcp"),  # another container of that GPU's machine, without its /dev/shm
    ],
)
def test_what_an_engine_pulls_by(engine: Place, expected: str) -> None:
    assert pulled_by(LEARNER, engine) == expected
    if expected == "ipc":
        assert pulled_by(LEARNER, engine, senders=2) == "shm"
    else:
        assert pulled_by(LEARNER, engine, senders=2) == expected


@pytest.mark.parametrize(("engine", "expected"), [(at("a"), "shm"), (at("b"), "tcp"), (at("a", "g0"), "shm")])
def test_a_learner_on_the_cpu_shares_no_gpu(engine: Place, expected: str) -> None:
    assert pulled_by(ON_CPU, engine) == expected


@pytest.mark.parametrize(
    ("senders", "engines", "lag", "expected"),
    [
        ([LEARNER], [], 0, False),
        ([LEARNER], [at("a", "g1")], 0, False),  # one host
        ([LEARNER], [at("b", "g2")], 0, True),
        ([LEARNER], [at("b", "g2")], None, True),
        ([LEARNER], [at("b", "g2")], 1, False),  # rolling
        ([LEARNER], [at("a", "g1"), at("b", "g2", "g3")], 0, True),
        ([LEARNER], [at("a", "g1"), at("b")], 0, False),  # one engine on a CPU
        ([LEARNER], [at("a", "g0"), at("b", "g2")], 0, False),  # one engine on the learner's GPU
        ([LEARNER], [at("b", "g2"), at("b", "g2")], 0, False),  # two engines on one GPU
        ([ON_CPU], [at("b", "g2")], 0, False),
        ([LEARNER, at("a", "g1")], [at("b", "g2")], 0, True),
        ([LEARNER, at("a", "g1")], [at("a", "g1"), at("b", "g2")], 0, False),
    ],
)
def test_when_auto_broadcasts(
    senders: list[Place], engines: list[Place], lag: int | None, expected: bool
) -> None:
    assert is_collective("auto", senders, engines, max_lag_versions=lag) is expected


@pytest.mark.parametrize("transport", ["shm", "tcp", "ipc", "collective"])
def test_what_was_asked_for_is_taken(transport: Transport) -> None:
    assert is_collective(transport, [LEARNER], [at("b")], max_lag_versions=0) is (transport == "collective")


def test_the_backend_of_a_collective() -> None:
    assert collective_backend([LEARNER], [at("b", "g2"), at("a", "g1", "g3")]) == "nccl"
    assert collective_backend([LEARNER], [at("b")]) == "gloo"
    assert collective_backend([ON_CPU], [at("b", "g2")]) == "gloo"
    assert collective_backend([LEARNER], [at("a", "g0")]) == "gloo"


ENGINES = {
    "same": at("a", "g0"),
    "host": at("a", "g1"),
    "wide": at("a", "g0", "g1"),
    "far": at("b", "g2"),
    "cpu": at("a"),
}


@pytest.mark.parametrize(
    ("transport", "unreachable"),
    [
        ("auto", []),
        ("tcp", []),
        ("collective", []),
        ("shm", ["far"]),
        ("ipc", ["host", "wide", "far", "cpu"]),
    ],
)
def test_whom_a_transport_cannot_reach(transport: Transport, unreachable: list[str]) -> None:
    found = list(faults(transport, [LEARNER], ENGINES))
    assert [sentence.split()[1] for sentence in found] == unreachable
    assert all('let weight_sync.transport be "auto"' in sentence for sentence in found)


places = st.builds(
    Place,
    host=st.sampled_from("ab"),
    gpus=st.lists(st.sampled_from("ghij"), max_size=2, unique=True).map(tuple),
)


@given(learner=places, engines=st.lists(places, min_size=1, max_size=4), lag=st.integers(0, 1))
def test_auto_always_reaches_everyone(learner: Place, engines: list[Place], lag: int) -> None:
    """Whatever it picks is a transport that `faults` has nothing against, for a run or for each engine."""
    if is_collective("auto", [learner], engines, max_lag_versions=lag):
        assert collective_backend([learner], engines) == "nccl" and lag == 0
        return
    for engine in engines:
        assert not list(faults(pulled_by(learner, engine), [learner], {"it": engine}))
