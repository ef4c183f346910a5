"""Which machines Ray has: notes those that join and those that are lost. Nothing acts on it: an engine whose machine is gone
is found dead by its keeper, and one that waits for room gets it by itself. Called by the supervisor, on its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

import ray

_LOOK_S: Final = 2.0


def alive(nodes: list[dict[str, Any]]) -> dict[str, str]:
    """Id -> address and resources, of `ray.nodes()`."""
    return {
        n["NodeID"]: f"{n['NodeManagerAddress']} ({_resources(n['Resources'])})" for n in nodes if n["Alive"]
    }


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A sentence for each machine that came or went."""
    came = [f"machine {now[node]} joined" for node in now if node not in before]
    return came + [f"machine {before[node]} is lost" for node in before if node not in now]


async def watch_machines(note: Callable[[str], None]) -> None:
    """Looks every `_LOOK_S`; ends when cancelled."""
    before = alive(await asyncio.to_thread(ray.nodes))
    while True:
        await asyncio.sleep(_LOOK_S)
        now = alive(await asyncio.to_thread(ray.nodes))
        for sentence in changes(before, now):
            note(sentence)
        before = now


def _resources(found: Mapping[str, float]) -> str:
    named = {k: v for k, v in found.items() if not k.startswith("node:") and "memory" not in k}
    return ", ".join(f"{k} {v:g}" for k, v in sorted(named.items())) or "no resources"
