"""What the fleet decides: which engines to add and to remove, how many slots each has, how its pools stand. Pure.

Called by `fleet`, which acts on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from asyncrl.generators.config import PoolConfig
from asyncrl.runtime.facts import Concurrency, EngineState, PoolFacts, PoolState

UP: Final = frozenset({"serving", "idle", "updating", "paused"})
"""States in which an engine has the present weights and may work."""
_FIRST_TO_GO: Final[tuple[EngineState, ...]] = (
    "dead",
    "waiting for room",
    "restarting",
    "starting",
    "joining",
)


class Resize(NamedTuple):
    """Indices of engines within their pool."""

    add: list[int]
    remove: list[int]


def resize(present: Mapping[int, EngineState], wanted: int) -> Resize:
    """`present`: the engines of one pool that are not on their way out. New ones take the lowest free indices; those go
    first that do not work, then the highest indices."""
    missing = wanted - len(present)
    if missing >= 0:
        free = (i for i in range(len(present) + missing) if i not in present)
        return Resize([index for index, _ in zip(free, range(missing), strict=False)], [])

    def usefulness(index: int) -> tuple[int, int]:
        state = present[index]
        return (_FIRST_TO_GO.index(state) if state in _FIRST_TO_GO else len(_FIRST_TO_GO), -index)

    return Resize([], sorted(present, key=usefulness)[:-missing])


def slots(limit: int, *, paused: bool, drained: bool) -> int:
    """What an engine may work on at once: a paused run and a drained pool hand everything back."""
    return 0 if paused or drained else limit


def pool_state(states: Sequence[EngineState], *, wanted: int, begun: bool) -> PoolState:
    """`begun`: every pool had its first engines up once."""
    serving = sum(state in UP for state in states)
    if states and all(state == "dead" for state in states):
        return "failed"
    if serving >= wanted:
        return "serving"
    return "short" if begun else "starting"


def pool_facts(
    pool: PoolConfig,
    states: Sequence[EngineState],
    *,
    wanted: int,
    concurrency: Concurrency,
    begun: bool,
    reasons: Sequence[str],
) -> PoolFacts:
    """`reasons`: of engines that are not up, and the controller's last; the first that says something is shown."""
    return PoolFacts(
        name=pool.name,
        state=pool_state(states, wanted=wanted, begun=begun),
        engines_wanted=wanted,
        engines_serving=sum(state in UP for state in states),
        concurrency=concurrency,
        reason=next((reason for reason in reasons if reason), ""),
    )


def has_begun(pools: Sequence[tuple[PoolConfig, Sequence[EngineState]]]) -> bool:
    """Every pool has as many engines up as its recipe asks for to begin."""
    return all(sum(s in UP for s in states) >= pool.engines_to_begin for pool, states in pools)
