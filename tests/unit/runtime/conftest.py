"""A small generator of realistic facts: a run that learns, as the supervisor would tell of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from asyncrl.generators.estimates import over_prompts
from asyncrl.runtime.facts import (
    ENGINES_WAIT,
    EVALUATION,
    LEARNER_WAITS,
    PROMPTS_WAIT,
    TRAINING,
    BufferFacts,
    EngineFacts,
    Evaluation,
    Fact,
    HeldOut,
    Snapshot,
    StepFacts,
)

ROLLOUTS_PER_STEP = 128


def make_step(step: int, **changes: object) -> StepFacts:
    """Step `step` of a run that learns from 0.5 to 0.97 in about 30 steps; `changes` replace fields."""
    noise = random.Random(step)
    reward = 0.5 + 0.47 * (1 - math.exp(-step / 12)) + noise.gauss(0, 0.015)
    in_flight, in_queue = noise.uniform(0.2, 0.5), noise.uniform(0.3, 0.7)
    wait_s, train_s = max(0.05, noise.gauss(1.0, 0.3)), max(0.5, noise.gauss(1.6, 0.15))
    length = 38 + 8 * (1 - math.exp(-step / 20)) + noise.gauss(0, 1)
    masked = noise.randrange(0, 60) if step % 9 == 0 else 0
    facts: dict[str, object] = {
        "step": step,
        "version": step,
        "seconds": 40 + step * 2.8,
        "reward_mean": min(1.0, reward),
        "loss": noise.gauss(0, 0.02),
        "grad_norm": 0.4 + noise.random() * 0.4,
        "response_tokens_mean": length,
        "response_tokens_max": int(length * noise.uniform(2.0, 3.2)),
        "rollouts": ROLLOUTS_PER_STEP,
        "rollouts_over_versions": noise.randrange(20, 50),
        "versions_in_rollout_max": noise.choice([2, 3]),
        "groups_without_spread": min(16, int(reward * 12)),
        "staleness_min": 0,
        "staleness_mean": in_flight + in_queue,
        "staleness_max": 3 if masked else noise.choice([1, 2, 2, 2]),
        "staleness_in_flight_mean": in_flight,
        "staleness_in_queue_mean": in_queue,
        "tokens_trained": int(length * ROLLOUTS_PER_STEP) - masked,
        "tokens_masked": masked,
        "tokens_past_bound": 0,
        "mismatch_tokens": int(length * 40),
        "mismatch_max": 10 ** noise.uniform(-5.6, -4.8),
        "mismatch_mean": 10 ** noise.uniform(-6.8, -6.5),
        "mismatch_p95": 10 ** noise.uniform(-6.3, -6.0),
        "mismatch_kl": noise.gauss(0, 1e-7),
        "wait_s": wait_s,
        "train_s": train_s,
        "publish_s": noise.uniform(0.05, 0.12),
        "engine_stall_s": noise.uniform(0.02, 0.06),
        "learner_tokens_per_s": length * ROLLOUTS_PER_STEP * 1.4 / train_s,
        "learner": {"clipped_fraction": noise.random() * 0.02, "entropy": 1.2 * math.exp(-step / 40)},
    }
    return StepFacts(**(facts | changes))  # type: ignore[arg-type]


def make_snapshot(
    seconds: float, *, step: int, steps: int = 60, phase: str = TRAINING, **changes: object
) -> Snapshot:
    """The run at `seconds` with `step` steps done and two engines; `changes` replace fields."""
    noise = random.Random(int(seconds * 10))
    since = max(0.0, seconds - 40)
    serving = phase == TRAINING
    engines = [
        EngineFacts(
            engine_id=f"small-{index}",
            pool="small",
            state="updating" if serving and noise.random() < 0.1 else "serving" if serving else "starting",
            version=step if serving else -1,
            slots_used=noise.randrange(24, 33) if serving else 0,
            slots=32,
            tokens_per_s=noise.gauss(1150, 60) if serving else 0.0,
            waits_for="" if serving else "version 0",
            kv_used_fraction=0.5,
        )
        for index in range(2)
    ]
    trained = step * ROLLOUTS_PER_STEP
    states = {
        "queued": noise.randrange(60, 130),
        "leased": sum(engine.slots_used for engine in engines),
        "complete": noise.randrange(0, 4),
        "scored": noise.randrange(20, 120),
        "batched": ROLLOUTS_PER_STEP if noise.random() < 0.6 else 0,
    }
    dropped, failed = {"over_stale": step // 20}, {"reward timeout": step // 30}
    facts: dict[str, object] = {
        "seconds": seconds,
        "phase": phase,
        "step": step,
        "steps": steps,
        "version": step if serving else -1,
        "engines": engines,
        "buffer": BufferFacts(
            **states,
            trained=trained,
            dropped=dropped,
            failed=failed,
            admitted=trained + sum(states.values()) + sum(dropped.values()) + sum(failed.values()),
            held_groups=40,
            capacity_groups=48,
            quarantined_prompts=step // 30,
            held_bytes=8 * 40 * sum(states.values()),
            memory_bytes=2**31,
            drops_by_length_decile=[0] * 9 + [step // 20] if step >= 20 else [],
            recoveries=step // 40,
        )
        if serving
        else BufferFacts(),
        "learner_state": ("waiting for rollouts" if noise.random() < 0.35 else "training")
        if serving
        else "starting",
        "learner_tokens_per_s": noise.gauss(4200, 150) if serving else 0.0,
        "engine_tokens_per_s": sum(engine.tokens_per_s for engine in engines),
        "held_out": HeldOut(wanted=True, step=0, accuracy=0.551, standard_error=0.031),
        "waits": {
            LEARNER_WAITS: since * (0.36 + 0.05 * math.sin(seconds / 20)),
            ENGINES_WAIT: since * 0.06,
            PROMPTS_WAIT: since * 0.12,
        },
    }
    return Snapshot(**(facts | changes))  # type: ignore[arg-type]


def make_evaluation(step: int, correct: int, prompts: int, **changes: object) -> Evaluation:
    """One answer to each of so many prompts, so many of them right; `changes` replace fields."""
    right = [float(i < correct) for i in range(prompts)]
    facts: dict[str, object] = {
        "seconds": float(step),
        "step": step,
        "version": step,
        "oldest_version": step,
        "answers_over_versions": 0,
        "prompts": prompts,
        "rollouts_per_prompt": 1,
        "accuracy": over_prompts(right),
        "reward": over_prompts(right),
        "tokens": over_prompts([20.0] * prompts),
        "truncated": over_prompts([0.0] * prompts),
        "failed": 0,
        "took_s": 3.0,
    }
    return Evaluation(**(facts | changes))  # type: ignore[arg-type]


def make_run(steps: int = 60) -> list[Fact]:
    """All facts of a run of `steps` steps in the order of time, held-out evaluations before and after included."""
    facts: list[Fact] = [
        make_snapshot(float(second), step=0, steps=steps, phase="engine start") for second in range(36)
    ]
    facts.append(make_evaluation(0, 141, 256, seconds=39.0))
    second = 40.0
    for step in range(1, steps + 1):
        done = make_step(step)
        while second < done.seconds:
            facts.append(make_snapshot(second, step=step - 1, steps=steps))
            second += 1.0
        facts.append(done)
    last = make_snapshot(second, step=steps, steps=steps)
    facts.append(make_evaluation(steps, 247, 256, seconds=second + 6))
    facts.append(make_snapshot(second + 7, step=steps, steps=steps, phase=EVALUATION, buffer=last.buffer))
    return facts


@pytest.fixture
def step_facts() -> Callable[..., StepFacts]:
    return make_step


@pytest.fixture
def evaluation_facts() -> Callable[..., Evaluation]:
    return make_evaluation


@pytest.fixture
def snapshot_facts() -> Callable[..., Snapshot]:
    return make_snapshot


@pytest.fixture
def run_facts() -> Callable[..., list[Fact]]:
    return make_run
