"""Which transport `auto` picks, as a table."""

from __future__ import annotations

import pytest

from asyncrl.weight_sync.topology import (
    Place,
    Transport,
    collective_backend,
    is_collective,
    pulled_by,
)

LEARNER = Place(host="a", gpus=("g0",))
ON_CPU = Place(host="a")


def at(host: str, *gpus: str) -> Place:
    return Place(host=host, gpus=gpus)


@pytest.mark.parametrize(("host", "expected"), [("a", "shm"), ("b", "tcp"), ("", "tcp")])
def test_what_an_engine_pulls_by(host: str, expected: str) -> None:
    assert pulled_by("a", host) == expected


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
