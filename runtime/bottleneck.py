"""Who waits for whom: one line from the wait times of two snapshots. Pure; the views call it.

    engines --rollouts--> learner --versions--> staleness bound --room--> prompts --> engines

Each part waits for the one before it. Whoever waits is not the bottleneck; the part that the waits point at is.
"""

from __future__ import annotations

from asyncrl.runtime.facts import ENGINES_WAIT, LEARNER_WAITS, PROMPTS_WAIT, Snapshot

NOTICEABLE = 0.1
"""Shares of time below this are the ordinary gaps between two pieces of work."""


def wait_shares(prev: Snapshot, now: Snapshot) -> dict[str, float]:
    """Share of the time from `prev` to `now` that each cause was waited for, in [0, 1], largest first.

    A cause that ran backwards (its part was replaced and counts anew) has share 0.
    """
    span = now.seconds - prev.seconds
    if span <= 0:
        return {}
    shares = {
        cause: min(1.0, max(0.0, total - prev.waits.get(cause, 0.0)) / span)
        for cause, total in now.waits.items()
    }
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def bottleneck(prev: Snapshot | None, now: Snapshot) -> str:
    """The waits between two snapshots and what they mean, such as
    `learner waits for rollouts 62 %: generation is the bottleneck`."""
    starting = _starting(now)
    if starting:
        return starting
    if prev is None or now.seconds <= prev.seconds:
        return "measuring"
    shares = {cause: share for cause, share in wait_shares(prev, now).items() if share >= NOTICEABLE}
    if not shares:
        return "nobody waits: both sides are busy"
    waits = ", ".join(f"{cause} {share:.0%}".replace("%", " %") for cause, share in shares.items())
    verdict = _verdict(shares)
    return f"{waits}: {verdict}" if verdict else waits


def _starting(now: Snapshot) -> str:
    """What the start is held up by, "" once both sides have started."""
    starting = [engine for engine in now.engines if engine.state == "starting"]
    if now.learner_state == "starting":
        return "everyone waits for the learner to start"
    if starting and len(starting) == len(now.engines):
        named = next((engine for engine in starting if engine.waits_for), None)
        if named is not None:
            return f"engine {named.engine_id} waits for {named.waits_for}"
        return f"everyone waits for {len(starting)} engine{'s' if len(starting) > 1 else ''} to start"
    return ""


def _verdict(shares: dict[str, float]) -> str:
    """What limits the run, from the causes that are noticeable."""
    learner, engines, prompts = (
        shares.get(cause, 0.0) for cause in (LEARNER_WAITS, ENGINES_WAIT, PROMPTS_WAIT)
    )
    if learner and engines and prompts:
        return "the staleness bound holds both sides back"
    if learner and engines:
        return "the prompt source is the bottleneck" if engines > learner else "generation is the bottleneck"
    if learner:
        return "generation is the bottleneck"
    if engines and prompts:
        return "training is the bottleneck"
    if engines:
        return "the prompt source is the bottleneck"
    if prompts:
        return "training sets the pace, the engines keep busy"
    return ""
