"""A plan: the best split of a question, what else was found, and what did not fit, as figures to print or to write. Pure.

Called by `asyncrl plan` (`asyncrl.runtime.cli_plan`) and tools/check_plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from asyncrl.learner.config import base_is_reference
from asyncrl.learner.objective_needs import needs_of
from asyncrl.recipes.gpus import ClusterEntry, GPUConfig, UnknownGPU, gpu_spec
from asyncrl.recipes.plan_facts import Efficiency, Misfit, PlanError, Workload
from asyncrl.recipes.plan_memory import gigabytes
from asyncrl.recipes.plan_model import ModelShape
from asyncrl.recipes.plan_pacing import Outcome, Question
from asyncrl.recipes.plan_search import Found, search
from asyncrl.recipes.plan_speed import step_tokens
from asyncrl.recipes.recipe import Recipe

DEFAULT_PROMPT_TOKENS = 256
DEFAULT_MEAN_SHARE = 1 / 3
"""Of max_new_tokens, where nobody says how long answers are. A guess: measure it and pass --mean-tokens."""
ALTERNATIVES = 5


class PlannedPool(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    gpu_type: str
    ray_name: str
    """The GPU type as Ray knows it: what a recipe's pool says."""
    engines: int
    tensor_parallel: int
    concurrency: int
    """Slots per engine."""
    most_slots: int
    """What its KV cache holds."""
    dtype: str
    kv_tokens: int
    """Per engine."""
    weights_bytes_per_gpu: float
    tokens_per_s: float
    """Of the whole pool."""
    decode_step_s: float


class PlannedLearner(msgspec.Struct, frozen=True, kw_only=True):
    gpu_type: str
    ranks: int
    dtype: str
    tokens_per_microbatch: int
    memory_bytes_per_gpu: float
    state_bytes: float
    activation_bytes: float
    compute_s: float
    traffic_s: float
    optimizer_s: float
    publish_s: float


class PlannedSplit(msgspec.Struct, frozen=True, kw_only=True):
    """One way to use the GPUs. Seconds are of one learner step."""

    learner: PlannedLearner
    pools: list[PlannedPool]
    gpus: int
    max_staleness_versions: int
    """0: generation and training take turns."""
    generate_s: float
    train_s: float
    """With optimizer and publication."""
    step_s: float
    synchronous_s: float
    """The same GPUs taking turns."""
    tokens_per_s: float
    """Prompt and answer tokens trained."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    parameters: int
    active_parameters: int
    kv_bytes_per_token: int
    rollouts_per_step: int
    prompt_tokens: float
    mean_tokens: float
    max_tokens: int
    best: PlannedSplit
    idle_gpus: int
    alternatives: list[PlannedSplit]
    """The next best, each with another learner."""
    rejected: list[Misfit]
    assumptions: dict[str, float]
    gpu_sources: dict[str, str]


def question_for(
    recipe: Recipe,
    model: ModelShape,
    cluster: Sequence[ClusterEntry],
    eff: Efficiency,
    *,
    mean_tokens: float | None = None,
    prompt_tokens: float | None = None,
    most_staleness: int | None = None,
) -> Question:
    """Raises PlanError."""
    work = workload(recipe, mean_tokens, prompt_tokens)
    limit = model.max_context_tokens
    if limit is not None and work.max_context_tokens > limit:
        raise PlanError(
            f"model.max_context_tokens = {work.max_context_tokens}: the model was made for {limit} at most"
        )
    staleness = recipe.staleness.max_staleness_versions if most_staleness is None else most_staleness
    return ask(model, cluster, recipe.gpus, work, eff, staleness)


def ask(
    model: ModelShape,
    cluster: Sequence[ClusterEntry],
    rows: dict[str, GPUConfig],
    work: Workload,
    eff: Efficiency,
    most_staleness: int,
) -> Question:
    """Raises PlanError for no GPU or an unknown one."""
    if not cluster:
        raise PlanError(
            "which GPUs are there? Add [[cluster]] entries to the recipe, or pass --gpus H100:8x2,L40S:4"
        )
    try:
        gpus = tuple(gpu_spec(entry.gpu_type, rows) for entry in cluster)
    except UnknownGPU as error:
        raise PlanError(str(error)) from error
    return Question(
        model=model, entries=tuple(cluster), gpus=gpus, work=work, eff=eff, most_staleness=most_staleness
    )


def workload(recipe: Recipe, mean_tokens: float | None, prompt_tokens: float | None) -> Workload:
    """Raises PlanError for lengths that the recipe does not allow."""
    longest, sampling = recipe.longest_prompt_tokens, recipe.sampling
    prompt = prompt_tokens if prompt_tokens is not None else float(min(DEFAULT_PROMPT_TOKENS, longest))
    mean = mean_tokens if mean_tokens is not None else DEFAULT_MEAN_SHARE * sampling.max_new_tokens
    if not 0 < mean <= sampling.max_new_tokens:
        raise PlanError(
            f"--mean-tokens {mean:g}: expected more than 0 and at most sampling.max_new_tokens = {sampling.max_new_tokens}"
        )
    if not 0 < prompt <= longest:
        raise PlanError(
            f"--prompt-tokens {prompt:g}: expected more than 0 and at most {longest} "
            "(model.max_context_tokens - sampling.max_new_tokens)"
        )
    needs = needs_of(recipe.learner.objective)
    return Workload(
        prompts_per_step=recipe.prompts.prompts_per_step,
        rollouts_per_prompt=recipe.rollouts_per_group,
        prompt_tokens=prompt,
        mean_tokens=mean,
        max_tokens=sampling.max_new_tokens,
        max_context_tokens=recipe.model.max_context_tokens,
        minibatches_per_step=recipe.learner.minibatches_per_step,
        tokens_per_microbatch=recipe.learner.tokens_per_microbatch,
        memory_fraction=min(pool.memory_fraction for pool in recipe.pools),
        lora=recipe.learner.lora,
        sharding=recipe.learner.sharding,
        critic="critic" in needs.parts,
        reference="reference model" in needs.parts,
        reference_held="reference model" in needs.parts and not base_is_reference(recipe.learner),
        early_proximal=needs.early_proximal,
    )


def make_plan(question: Question) -> Plan:
    """Raises PlanError where nothing fits, naming the nearest miss."""
    found = search(question)
    if not found.outcomes:
        raise PlanError(_nothing_fits(question, found))
    model, work = question.model, question.work
    best, *others = [planned(question, outcome) for outcome in found.outcomes]
    return Plan(
        model=model.name,
        parameters=model.parameters,
        active_parameters=model.active_parameters,
        kv_bytes_per_token=model.kv_bytes_per_token(best.pools[0].dtype),
        rollouts_per_step=work.rollouts,
        prompt_tokens=work.prompt_tokens,
        mean_tokens=work.mean_tokens,
        max_tokens=work.max_tokens,
        best=best,
        idle_gpus=sum(entry.gpus for entry in question.entries) - best.gpus,
        alternatives=others[:ALTERNATIVES],
        rejected=found.misfits,
        assumptions=msgspec.structs.asdict(question.eff),
        gpu_sources={e.gpu_type: g.source for e, g in zip(question.entries, question.gpus, strict=True)},
    )


def _nothing_fits(q: Question, found: Found) -> str:
    """The nearest miss: the least memory lacking on the side of which nothing fits, or that both do not fit together."""
    gpus = ", ".join(f"{e.gpus} x {e.gpu_type}" for e in q.entries)
    start = f"nothing fits {q.model.name} ({q.model.parameters / 1e9:.2f} G parameters) on {gpus}."
    for role in ("learner", "engine"):
        if role in found.roles_that_fit:
            continue
        short = [m for m in found.misfits if m.role == role and m.lacking_bytes is not None]
        near = min(short, key=lambda m: m.lacking_bytes or 0.0)
        return f"{start} Nearest miss: {near.shape} lacks {gigabytes(near.lacking_bytes or 0.0)} a GPU: {near.reason}"
    return f"{start} A learner fits and an engine fits, but not both: every learner that fits leaves too few GPUs for an engine"


def planned(q: Question, outcome: Outcome) -> PlannedSplit:
    split, work = outcome.split, q.work
    time, fit = split.time, split.fit
    learner = PlannedLearner(
        gpu_type=q.entries[split.entry].gpu_type,
        ranks=split.ranks,
        dtype=fit.dtype,
        tokens_per_microbatch=fit.tokens_per_microbatch,
        memory_bytes_per_gpu=fit.total_bytes,
        state_bytes=fit.state_bytes,
        activation_bytes=fit.activation_bytes,
        compute_s=time.compute_s,
        traffic_s=time.traffic_s,
        optimizer_s=time.optimizer_s,
        publish_s=time.publish_s,
    )
    return PlannedSplit(
        learner=learner,
        pools=_pools(q, outcome),
        gpus=split.gpus,
        max_staleness_versions=outcome.staleness,
        generate_s=outcome.generate_s,
        train_s=time.total_s,
        step_s=outcome.step_s,
        synchronous_s=outcome.synchronous_s,
        tokens_per_s=step_tokens(work) / outcome.step_s,
    )


def _pools(q: Question, outcome: Outcome) -> list[PlannedPool]:
    pools, work = [], q.work
    for pool, under_way in zip(outcome.split.pools, outcome.under_way, strict=True):
        each, speed = under_way / pool.engines, pool.speed
        if under_way <= 0:
            continue
        gpu_type = q.entries[pool.entry].gpu_type
        pools.append(
            PlannedPool(
                name=f"{gpu_type.lower()}-{pool.entry}",
                gpu_type=gpu_type,
                ray_name=speed.gpu.ray_name,
                engines=pool.engines,
                tensor_parallel=speed.tensor_parallel,
                concurrency=min(speed.fit.most_slots, max(1, math.ceil(each))),
                most_slots=speed.fit.most_slots,
                dtype=speed.fit.dtype,
                kv_tokens=speed.fit.kv_tokens,
                weights_bytes_per_gpu=speed.fit.weights_bytes,
                tokens_per_s=float(pool.rollouts_per_s(under_way)) * work.lengths.mean,
                decode_step_s=float(speed.step_s(each)),
            )
        )
    return pools
