"""What telemetry is told: plain facts of a run, and nothing that acts.

The supervisor makes them (a `Snapshot` about once a second, a `StepFacts` after each learner step, an `Evaluation`
after each held-out evaluation, an `EvaluationMissed` where one was due and came to nothing) and hands them to the view
and to the metrics log; the summary and the report read them back from `metrics.jsonl`. Each is a line of that file, told
apart by `kind`.

Invariants: facts are frozen; `seconds` counts from launch and never runs backwards within one launch; counts are
of rollouts unless the name says tokens, groups or prompts. A number that could not be had is NaN, never 0.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from asyncrl.generators.estimates import Estimate

EngineState = Literal[
    "waiting for room",
    "starting",
    "joining",
    "serving",
    "idle",
    "updating",
    "paused",
    "draining",
    "restarting",
    "dead",
]
"""joining: it is up and takes the present weights. restarting: it died and is started again after a while."""
PoolState = Literal["starting", "serving", "short", "failed"]
"""short: it serves with fewer engines than wanted."""
Concurrency = int | Literal["auto"]
"""Slots per engine, as set."""
RunState = Literal["starting", "running", "paused", "draining", "stopping"]
LearnerState = Literal["starting", "waiting for rollouts", "training", "publishing"]

LEARNER_WAITS: Final = "learner waits for rollouts"
ENGINES_WAIT: Final = "engines wait for prompts"
PROMPTS_WAIT: Final = "prompts wait for staleness"

MODEL: Final = "model"
"""Finding the model, or making it by supervised fine-tuning."""
RAY_START: Final = "ray start"
ENGINE_START: Final = "engine start"
LEARNER_START: Final = "learner start"
FIRST_SYNC: Final = "first sync"
EVALUATION: Final = "evaluation"
TRAINING: Final = "training"
SHUTDOWN: Final = "shutdown"
PHASES: Final = (
    MODEL,
    RAY_START,
    ENGINE_START,
    LEARNER_START,
    FIRST_SYNC,
    EVALUATION,
    TRAINING,
    SHUTDOWN,
)
"""The phases of a run in the order in which a summary shows them. Throughput is counted in `TRAINING` alone."""


class StepFacts(msgspec.Struct, frozen=True, kw_only=True, tag="step", tag_field="kind"):
    """One learner step, after its weights were published."""

    step: int
    """1 for the first."""
    version: int
    """The newest published version after this step."""
    seconds: float
    reward_mean: float
    loss: float
    grad_norm: float
    response_tokens_mean: float
    response_tokens_max: int
    rollouts: int
    """Rollouts of this batch."""
    rollouts_over_versions: int
    """Those of them whose tokens come from two or more versions."""
    versions_in_rollout_max: int
    groups_without_spread: int
    """Groups whose rewards are all equal: they teach nothing."""
    staleness_min: int
    staleness_mean: float
    """Of the answer tokens handed over, in versions; masked ones count too, here and in `staleness_max`."""
    staleness_max: int
    staleness_in_flight_mean: float
    """The part that a token aged until its rollout was complete."""
    staleness_in_queue_mean: float
    """The part that it aged from then until hand-over."""
    tokens_trained: int
    """Answer tokens that the loss saw."""
    tokens_masked: int
    """Answer tokens kept out of the loss because they were past the bound."""
    tokens_past_bound: int
    """Trained tokens past the bound: 0, or the bound is broken."""
    mismatch_tokens: int
    """Tokens compared between engine and learner: those of rollouts sampled as a whole at the version that the learner
    held (a rollout that spans an update has keys of older weights). With 0 the four below say nothing and are left
    out of every average."""
    mismatch_max: float
    """Largest |engine's logprob - learner's logprob| of one token."""
    mismatch_mean: float
    mismatch_p95: float
    mismatch_kl: float
    """Estimate of KL(engine || learner) in nats per token: mean of exp(d) - 1 - d, d = learner's - engine's logprob."""
    wait_s: float
    """The learner's wait for this batch."""
    train_s: float
    publish_s: float
    """One whole weight sync, gathering included: until the last engine's confirmation, or, with `max_lag_versions` of 1 or more,
    until the version's bytes are complete."""
    lag_wait_s: float = 0.0
    """Of `publish_s`: for engines that were `max_lag_versions` behind."""
    checkpoint_stall_s: float = 0.0
    """For which training stood still for a checkpoint after this step; it is written while training goes on."""
    engine_stall_s: float
    """The longest time that one engine stood still for it."""
    learner_tokens_per_s: float
    """Prompt and answer tokens over `train_s`."""
    learner: dict[str, float] = {}
    """Whatever else the learner measured, by name."""


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One engine, now."""

    engine_id: str
    pool: str
    state: EngineState
    version: int
    """-1 before the first weights."""
    weights: str = ""
    """Digest of the bytes of that version that it verified and loaded: 16 hex digits. Empty where it summed them on its device, and
    until the version is proven."""
    slots_used: int
    slots: int
    tokens_per_s: float
    waits_for: str = ""
    """Empty while it waits for nothing."""
    kv_used_fraction: float = math.nan
    preemptions: int = 0
    """Since it started: rollouts whose KV cache it had to give up for want of room."""
    waiting: int = 0
    """Rollouts that it has taken and cannot compute now, for want of room."""
    deaths: int = 0
    """Since launch."""
    reason: str = ""
    """Why it is in this state, where that needs saying: how it died, what it waits for room for."""
    node: str = ""
    """Ray's address of its machine."""


class PoolFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One pool, now."""

    name: str
    state: PoolState
    engines_wanted: int
    engines_serving: int
    concurrency: Concurrency
    reason: str = ""
    """Why it failed or is short; with `auto` the controller's last change and why."""


class BufferFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The ledger, now. The first five states are live; `trained`, `dropped` and `failed` count since launch."""

    queued: int = 0
    leased: int = 0
    complete: int = 0
    scored: int = 0
    batched: int = 0
    trained: int = 0
    dropped: dict[str, int] = {}
    """By reason."""
    failed: dict[str, int] = {}
    admitted: int = 0
    held_groups: int = 0
    """Groups admitted and not yet terminal."""
    capacity_groups: int = 0
    """Groups that pacing allows to be held."""
    quarantined_prompts: int = 0
    """Given up after their rollouts failed again and again; others took their place."""
    held_bytes: int = 0
    """Tokens and logprobs of live rollouts, which lie in the log's files."""
    memory_bytes: int = 0
    """The budget: `buffer.memory_bytes`."""
    drops_by_length_decile: list[int] = []
    """Dropped rollouts per decile of all closed rollouts' lengths, the shortest first; empty while none is dropped."""
    recoveries: int = 0
    """Processes of the buffer that died and were started again, since launch."""

    @property
    def live(self) -> int:
        return self.queued + self.leased + self.complete + self.scored + self.batched


class HeldOut(msgspec.Struct, frozen=True, kw_only=True):
    """How evaluation stands, now."""

    wanted: bool = False
    """Whether the recipe asks for any."""
    under_way_step: int = -1
    """Steps done when the one under way began; -1 while there is none."""
    step: int = -1
    """Of the last result; -1 before the first."""
    accuracy: float = math.nan
    standard_error: float = math.nan


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot", tag_field="kind"):
    """The whole run, now."""

    seconds: float
    phase: str
    step: int
    """Learner steps done."""
    steps: int
    """Learner steps asked for."""
    version: int
    weights: dict[int, str] = {}
    """Digests of the newest versions as the learner wrote them, by version: what an engine's `weights` must be."""
    engines: list[EngineFacts]
    buffer: BufferFacts
    state: RunState = "running"
    pools: list[PoolFacts] = []
    learner_state: LearnerState
    learner_tokens_per_s: float
    engine_tokens_per_s: float
    """Of all engines together."""
    held_out: HeldOut = HeldOut()
    waits: dict[str, float] = {}
    """Seconds waited since launch by cause (`LEARNER_WAITS`, ...). Where several parts wait for one cause it is their
    mean, so that no cause grows by more than a second per second."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True, tag="evaluation", tag_field="kind"):
    """What the answers to the held-out prompts came to. An estimate is a mean over prompts."""

    seconds: float
    step: int
    """Learner steps done when it began; 0 is the model that the run started from."""
    version: int
    """Of the newest weights that sampled a token of it."""
    oldest_version: int
    """The same as `version` where all of it was answered by one version."""
    answers_over_versions: int
    """Answers with tokens of two or more versions."""
    prompts: int
    rollouts_per_prompt: int
    accuracy: Estimate
    """avg@k: the share of a prompt's answers that are right."""
    pass_at: dict[int, Estimate] = {}
    """By k: the chance that one of k answers is right."""
    maj_at: dict[int, Estimate] = {}
    """By k: the chance that what most of k answers end in is right."""
    reward: Estimate
    tokens: Estimate
    """Of an answer."""
    truncated: Estimate
    """Share of answers that their budget ended."""
    failed: int
    """Answers whose environment or reward gave nothing; they count as wrong."""
    took_s: float


class EvaluationMissed(msgspec.Struct, frozen=True, kw_only=True, tag="evaluation missed", tag_field="kind"):
    """One was due and there is none."""

    seconds: float
    step: int
    version: int
    reason: str


Fact = StepFacts | Snapshot | Evaluation | EvaluationMissed
