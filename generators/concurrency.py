"""How many rollouts an engine works on at once, with `concurrency = "auto"`. Pure: facts in (with `now`), a limit out.

    preemptions -----------------------------------------> a quarter less, at once; then wait until it has settled
    KV cache all but full -------------------------------> a tenth less, likewise
    the learner has enough and the bound holds back -----> a tenth less
    the learner waits, work is queued, slots are full ---> an eighth more; twice as many until the first time of less
    slots added since bring no more tokens --------------> stay, and look again after a while

One look per window of `settle_s`; only pressure is acted on at once. A rise needs all of its conditions, a fall needs one,
and between them nothing is done.

Invariants (held by `tests/unit/generators/test_concurrency.py`)
----------
- The limit is in [1, max_concurrency] and changes by no more than these factors (or by 1).
- One event is punished once: after a cut, pressure counts again only when the engine has come down to its limit and
  `settle_s` has passed since, twice as long with each cut that follows soon; and, with no new preemption, only if the cache
  is not emptying by itself. (Rollouts hold what they have until they end: a cut takes as long as an answer to show.)
- Above nine tenths of a limit that met pressure, and above one that brought no more tokens, it goes only after
  `LOOK_AGAIN` windows, and comes back from there if nothing changed.
One controller per engine. Called by who sets the engine's limit, about once a second.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

KV_HIGH: Final = 0.95
"""Share of the KV cache from which the next long answer brings a preemption."""
KV_LOW: Final = 0.8
"""Below this, at every look within a window, there is room for more."""
CUT: Final = 0.75
GENTLE: Final = 0.9
GROWTH: Final = 1.125
STARVING: Final = 0.05
"""Share of time in which the learner waited for rollouts, from which on more of them would be trained."""
FED: Final = 0.02
HELD_BACK: Final = 0.1
"""Share of time in which free slots found no work, for the staleness bound, from which on there are too many."""
FULL: Final = 0.85
"""Share of the slots in use, below which more of them would stay empty too."""
GAIN: Final = 0.1
"""Relative gain in tokens/s over relative gain in slots, below which more slots only make each rollout slower."""
COMPARABLE: Final = 1.25
"""Limits closer than this factor are not compared: the difference would be noise."""
PATIENCE: Final = 16
"""How many times `settle_s` a cut may be given to show, at most."""
LOOK_AGAIN: Final = 15
"""Windows after which a limit that was too high before is tried again: answers grow, and learners change."""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One engine as it is now, and what happened since the facts before. Shares are of that time, in [0, 1]."""

    now: float
    """Seconds, of any clock that does not run backwards."""
    limit: int
    """As it was decided last, or as somebody else has set it since. Not asked while the engine is paused."""
    slots_used: int
    kv_used_fraction: float
    """NaN if the engine does not say."""
    preemptions: int
    """Rollouts whose KV cache the engine gave up for want of room."""
    waiting: int
    """Requests that the engine has taken and cannot run yet, now."""
    tokens_per_s: float
    learner_waiting: float
    """The learner waited for rollouts."""
    staleness_waiting: float
    """Slots were free and nothing was queued, because the staleness bound let no prompt in."""
    queued: int
    """Rollouts in the buffer that no engine has taken, now."""
    stale: int
    """Rollouts masked or dropped for staleness."""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    limit: int
    reason: str
    """One sentence with the numbers that decided."""


class _Window:
    """Means over time since it was opened."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.kv_max = 0.0
        self.stale = 0
        self._sums = dict.fromkeys(("tokens_per_s", "slots_used", "waiting", "queued"), 0.0)
        self._sums |= {"learner_waiting": 0.0, "staleness_waiting": 0.0}

    def add(self, facts: Facts, seconds: float) -> None:
        self.seconds += seconds
        self.stale += facts.stale
        if not math.isnan(facts.kv_used_fraction):
            self.kv_max = max(self.kv_max, facts.kv_used_fraction)
        for name in self._sums:
            self._sums[name] += getattr(facts, name) * seconds

    def mean(self, name: str) -> float:
        return self._sums[name] / self.seconds


class _Mark(msgspec.Struct, frozen=True):
    """A limit, and what it brought when it was measured."""

    limit: int
    tokens_per_s: float


class Controller:
    """The state between two decisions."""

    def __init__(self, max_concurrency: int, settle_s: float = 20.0) -> None:
        """`settle_s`: how long a change takes to show, and how long is measured between two; best a few steps of the
        learner, as its waiting comes in one piece per step."""
        self._max = max_concurrency
        self._settle_s = settle_s
        self._now = -math.inf
        self._limit = -1
        self._opens_at = -math.inf
        """Until then the last change has not taken effect."""
        self._window = _Window()
        self._slow_start = True
        self._cut_at = -math.inf
        """When the last cut came into force: its rollouts over the limit were handed back."""
        self._cut_pending = False
        self._cut_kv = 0.0
        self._cool_s = settle_s
        self._ceiling: tuple[int, float] = (max_concurrency, -math.inf)
        """Not above this limit before this time, since it was too much."""
        self._anchor: _Mark | None = None
        self._knee: int | None = None
        """A limit at which more slots brought no more tokens."""

    def decide(self, facts: Facts) -> Decision:
        """The limit from now on, and why. Facts may come at any pace; gaps count as their last fact says."""
        seconds = max(facts.now - self._now, 0.0) if math.isfinite(self._now) else 0.0
        self._now = max(facts.now, self._now)
        if facts.limit != self._limit:
            self._taken_over(facts.limit)
        limit = min(max(facts.limit, 1), self._max)
        if limit != facts.limit:
            return self._change(limit, f"an engine of these has 1 to {self._max} slots")
        coming_down = facts.slots_used > limit
        if self._cut_pending:
            self._cut_at, self._cut_pending = self._now, coming_down
        pressure = self._pressure(facts)
        if pressure:
            return self._cut(facts, limit, pressure)
        if coming_down or self._now < self._opens_at:
            return self._hold("a change is taking effect")
        self._window.add(facts, seconds)
        if self._window.seconds < self._settle_s:
            return self._hold(f"measured for {self._window.seconds:.0f} of {self._settle_s:.0f} s")
        window, self._window = self._window, _Window()
        return self._judge(limit, window)

    # ---- less ----------------------------------------------------------------------------------------------------

    def _pressure(self, facts: Facts) -> str:
        """Why the limit must come down at once; empty if it need not, or if it just did."""
        kv = facts.kv_used_fraction
        if not facts.preemptions and not kv >= KV_HIGH:
            return ""
        if self._now < self._cut_at + self._cool_s:
            return ""
        if not facts.preemptions and kv < self._cut_kv:
            return ""  # it is emptying since the last cut
        return f"{facts.preemptions} preemptions, KV cache {_percent(kv)} full"

    def _cut(self, facts: Facts, limit: int, pressure: str) -> Decision:
        soon = self._now < self._cut_at + 4 * self._cool_s
        self._cool_s = min(2 * self._cool_s, PATIENCE * self._settle_s) if soon else self._settle_s
        self._cut_at, self._cut_pending = self._now, True
        self._cut_kv = 0.0 if math.isnan(facts.kv_used_fraction) else facts.kv_used_fraction
        self._ceiling = (max(1, math.floor(limit * GENTLE)), self._now + LOOK_AGAIN * self._settle_s)
        factor = CUT if facts.preemptions else GENTLE
        return self._lower(min(limit - 1, math.floor(limit * factor)), pressure)

    def _lower(self, limit: int, reason: str) -> Decision:
        self._slow_start = False
        self._anchor = None
        return self._change(limit, reason) if limit >= 1 else self._hold(reason)

    # ---- one look per window ---------------------------------------------------------------------------------------

    def _judge(self, limit: int, window: _Window) -> Decision:
        starved, held_back = window.mean("learner_waiting"), window.mean("staleness_waiting")
        if window.kv_max < self._cut_kv:
            self._cut_kv = 0.0
        less = min(limit - 1, math.floor(limit * GENTLE))
        surplus = held_back >= max(HELD_BACK, 1.5 * (limit - less) / limit)
        if starved <= FED and (surplus or window.stale):
            reason = (
                f"the learner has enough (waits {_percent(starved)}), the staleness bound held slots back "
                f"{_percent(held_back)}, {window.stale} rollouts were too stale"
            )
            return self._lower(less, reason)
        kept = self._why_not_more(limit, window, starved, held_back)
        if kept:
            return self._hold(kept)
        brought = self._brought_nothing(limit, window.mean("tokens_per_s"))
        if brought is not None:
            return brought
        return self._raise(limit, window, starved)

    def _why_not_more(self, limit: int, window: _Window, starved: float, held_back: float) -> str:
        """The first condition of a rise that is not met."""
        used, queued, waiting = (window.mean(name) for name in ("slots_used", "queued", "waiting"))
        ceiling, until = self._ceiling
        busy = 1.0 - held_back  # where the bound lets in a batch at a time, slots count while there is work
        tests = [
            (starved >= STARVING, f"the learner waits {_percent(starved)}"),
            (
                held_back < max(HELD_BACK, starved),
                f"the staleness bound held slots back {_percent(held_back)}",
            ),
            (used >= FULL * limit * busy, f"{used:.1f} of {limit} slots are used"),
            (queued >= 1, f"{queued:.1f} rollouts are queued"),
            (not window.stale, f"{window.stale} rollouts were too stale"),
            (window.kv_max < KV_LOW, f"the KV cache was up to {_percent(window.kv_max)} full"),
            (waiting < 1, f"{waiting:.1f} requests wait in the engine"),
            (limit < self._max, f"{limit} is the most that the engine is built for"),
            (limit < ceiling or self._now >= until, f"above {ceiling} the KV cache was too full"),
        ]
        return next((reason for met, reason in tests if not met), "")

    def _brought_nothing(self, limit: int, tokens_per_s: float) -> Decision | None:
        """A decision if the slots added since the anchor brought nothing, or if that was found here before."""
        here, anchor = _Mark(limit, tokens_per_s), self._anchor
        if anchor is None or limit < anchor.limit:
            self._anchor = here
        elif limit >= COMPARABLE * anchor.limit:
            more = tokens_per_s / anchor.tokens_per_s - 1 if anchor.tokens_per_s else math.inf
            told = (
                f"{limit} slots bring {tokens_per_s:.0f} tokens/s, {anchor.limit} brought "
                f"{anchor.tokens_per_s:.0f}"
            )
            if more < GAIN * (limit / anchor.limit - 1):
                return self._stay_at_knee(limit, anchor, more, told)
            self._anchor, self._knee = here, None
        return None

    def _stay_at_knee(self, limit: int, anchor: _Mark, more: float, told: str) -> Decision:
        back = limit if self._knee is None and more > -GAIN else anchor.limit
        self._knee = back
        self._ceiling = (back, self._now + LOOK_AGAIN * self._settle_s)
        if back == limit:
            self._slow_start, self._anchor = False, None
            return self._hold(told)
        return self._lower(back, told)

    def _raise(self, limit: int, window: _Window, starved: float) -> Decision:
        factor = 2.0 if self._slow_start else GROWTH
        if window.kv_max:
            factor = min(
                factor, KV_HIGH / window.kv_max
            )  # as much as there would be room for if each took as much
        ceiling, until = self._ceiling
        most = ceiling if self._now < until else self._max
        more = min(max(limit + 1, math.floor(limit * factor)), most, self._max)
        reason = f"the learner waits {_percent(starved)}, all slots are used, KV cache {_percent(window.kv_max)} full"
        return self._change(more, reason)

    # ---- how it is said --------------------------------------------------------------------------------------------

    def _hold(self, reason: str) -> Decision:
        return Decision(limit=self._limit, reason=f"stays at {self._limit}: {reason}")

    def _change(self, limit: int, reason: str) -> Decision:
        before = self._limit
        self._taken_over(limit)
        return Decision(limit=limit, reason=f"{before} -> {limit}: {reason}")

    def _taken_over(self, limit: int) -> None:
        """From now on `limit` holds, whoever set it."""
        self._limit = limit
        self._window = _Window()
        self._opens_at = self._now + self._settle_s / 4


def _percent(share: float) -> str:
    return "?" if math.isnan(share) else f"{100 * share:.0f} %"
