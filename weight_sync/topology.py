"""Which transport carries weights, by where the learner and the engines are. Pure: facts in, decisions out.

    transport = "auto"                                                    a run's      an engine's
    all on the one GPU that there is (`runtime.sync_choice`)              pulled       ipc
    all of the learner and the engines on GPUs, some on other hosts       collective   over NCCL
    else: on the learner's host (one /dev/shm)                            pulled       shm
          elsewhere                                                       pulled       tcp

`shm` and `tcp` mix, one for each engine. A collective takes every engine or none; NCCL refuses two ranks on one GPU; and a
collective cannot roll, as it brings all engines to a version at once.
Called when a run starts, with what is known of places then (`is_collective`), and by the publisher for each engine (`pulled_by`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

Pulled = Literal["shm", "tcp"]
Backend = Literal["nccl", "gloo"]
Transport = Literal["auto", "shm", "tcp", "ipc", "collective"]


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a process computes."""

    host: str
    """Names the memory that it can map: equal names, one /dev/shm (`hosts.this_host`)."""
    gpus: tuple[str, ...] = ()
    """UUIDs of its GPUs, the one that it receives on first; none for the CPU."""


def pulled_by(learner_host: str, engine_host: str) -> Pulled:
    """How an engine gets a version that lies in the memory of the learner's host. Hosts are named by `hosts.this_host`."""
    return "shm" if engine_host == learner_host else "tcp"


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
