"""Which transport carries weights, by where the learner and the engines are. Pure: facts in, decisions out.

    transport = "auto"                                              a run's   an engine's
    on the GPU of the learner's rank 0, on that one alone              pulled    ipc
    on its host (one /dev/shm)                                         pulled    shm
    elsewhere, and all of the learner and the engines on GPUs         collective, over NCCL
    elsewhere                                                          pulled    tcp

Pulled transports mix, one for each engine, so a run of several places needs no common one. A collective takes every engine or
none; NCCL refuses two ranks on one GPU; and a collective cannot roll, as it brings all engines to a version at once.
Called by the learner's part of a run, with what is known of places when it starts (`collective_backend`, `is_collective`, `faults`)
and of an engine when it joins (`pulled_by`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import msgspec

Pulled = Literal["ipc", "shm", "tcp"]
Backend = Literal["nccl", "gloo"]
Transport = Literal["auto", "shm", "tcp", "ipc", "collective"]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process computes."""

    host: str
    """Names the memory that it can map: equal names, one /dev/shm (`hosts.this_host`)."""
    gpus: tuple[str, ...] = ()
    """UUIDs of its GPUs, the one that it receives on first; none for the CPU."""


def pulled_by(sender: Place, engine: Place, *, senders: int = 1) -> Pulled:
    """How an engine gets a version that lies with the learner. `sender` is its rank 0; with several `senders` the version is whole
    only in the host's memory."""
    if senders == 1 and len(engine.gpus) == 1 and engine.gpus == sender.gpus and engine.host == sender.host:
        return "ipc"
    return "shm" if engine.host == sender.host else "tcp"


def collective_backend(senders: Sequence[Place], engines: Sequence[Place]) -> Backend:
    """`nccl` where each rank of the groups has a GPU to itself, else `gloo`."""
    ranks = [*senders, *engines]
    used = [place.gpus[0] for place in ranks if place.gpus]
    return "nccl" if len(used) == len(ranks) and len(set(used)) == len(used) else "gloo"


def is_collective(
    transport: Transport, senders: Sequence[Place], engines: Sequence[Place], *, max_lag_versions: int | None
) -> bool:
    """Whether the run's versions are broadcast. `senders`: the learner ranks that send, rank 0 first. `max_lag_versions`: as the
    recipe has it; None leaves it open, and what is broadcast has a lag of 0."""
    if transport != "auto":
        return transport == "collective"
    remote = any(engine.host != senders[0].host for engine in engines)
    return remote and not max_lag_versions and collective_backend(senders, engines) == "nccl"


def faults(transport: Transport, senders: Sequence[Place], engines: Mapping[str, Place]) -> Iterator[str]:
    """Why `transport` cannot reach each of `engines`, one sentence for each that it cannot."""
    first = senders[0]
    for name, engine in engines.items():
        if transport == "shm" and engine.host != first.host:
            yield (
                f"engine {name} does not see the learner's /dev/shm: on another host, in a container without it, or of another "
                f'user; let weight_sync.transport be "auto" or "tcp"'
            )
        if transport == "ipc" and pulled_by(first, engine, senders=len(senders)) != "ipc":
            yield (
                f"engine {name} runs on {_named(engine)}, the learner's rank 0 on {_named(first)}: expected the same one GPU, one "
                f'host and senders = "one"; let weight_sync.transport be "auto" or "shm"'
            )


def _named(place: Place) -> str:
    return " and ".join(place.gpus) or "the CPU"
