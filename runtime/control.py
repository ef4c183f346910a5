"""The commands that a run obeys while it goes on: what each means, what a status says, how a command is refused.

Invariants: a command says what is to be from now on ("so many slots", "paused"), so a command that comes twice changes
nothing the second time. It answers when the change has begun, with one sentence, and does not wait for its end.

The supervisor implements `Commands`, `control_server` calls it, and the command line says what it got.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Protocol

import msgspec

from asyncrl.runtime.facts import Concurrency, Snapshot

COMMAND_S = 30.0
"""A command that has not answered after so long is cancelled."""


class CommandRefused(RuntimeError):
    """The run does not do this now, and stays as it is: why, and the way out."""


class WrongCommand(CommandRefused):
    """What was written does not fit this run, such as a pool that it does not have."""


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One run, now."""

    name: str
    """Of its folder."""
    started_at: float
    """Unix time of the launch in seconds."""
    who_waits: str
    """Who waits for whom over the last seconds, as `bottleneck` says it."""
    snapshot: Snapshot


class Commands(Protocol):
    """What a run can be asked for. Each may raise `CommandRefused` or `WrongCommand`; what else it raises ends the run.

    Those that change something come one after the other, in the order in which they arrived; `status` and `stop` come
    at any time, also while another waits. Each is cancelled after `COMMAND_S`, or when the run ends.
    """

    async def status(self) -> RunStatus:
        """Refused before there is a first snapshot."""
        ...

    async def scale(self, pool: str | None, concurrency: Concurrency | None, engines: int | None) -> str:
        """Slots per engine, of `pool` or of all; engines of one pool. None leaves it as it is. See `check_scale`."""
        ...

    async def pause(self) -> str:
        """Engines hand their partial rollouts back and hold still; the learner trains what is ready."""
        ...

    async def go_on(self) -> str:
        """Undoes pauses and drains."""
        ...

    async def drain(self, pool: str | None) -> str:
        """Of a pool: its engines hand back, stay up and take nothing more, until `go_on` or a `scale` of that pool.
        Of the run: no new prompts; what is under way is finished and trained in whole batches, and then it ends."""
        ...

    async def stop(self) -> str:
        """As Ctrl-C: ends in order within seconds."""
        ...


def pools_meant(names: Sequence[str], pool: str | None) -> list[str]:
    """The pools that a command is about: that one, or all of the run's. Raises `WrongCommand` for an unknown one."""
    if pool is None:
        return list(names)
    if pool not in names:
        near = difflib.get_close_matches(pool, names, 1)
        advice = f"did you mean {near[0]}?" if near else f"it has: {', '.join(names)}"
        raise WrongCommand(f"the run has no pool {pool!r}; {advice}")
    return [pool]


def check_scale(
    names: Sequence[str], pool: str | None, concurrency: Concurrency | None, engines: int | None
) -> list[str]:
    """The pools that a `scale` is about. Raises `WrongCommand`."""
    meant = pools_meant(names, pool)
    if concurrency is None and engines is None:
        raise WrongCommand("scale what? give --concurrency N, --concurrency auto or --engines N")
    if engines is not None and len(meant) > 1:
        raise WrongCommand(
            f"--engines {engines} of which pool? the run has {len(meant)}: give --pool with one of {', '.join(meant)}"
        )
    return meant
