"""A recipe: every setting of a run, composed of one config per folder. Frozen once read, and checked as a whole.

`cross_check` holds the rules that no single setting can show. Pure. Called by `load`, and by everything that runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import msgspec

from asyncrl.buffer.config import BufferConfig, StalenessConfig
from asyncrl.generators.config import (
    EnvironmentConfig,
    PoolConfig,
    PromptsConfig,
    RewardsConfig,
    SamplingConfig,
)
from asyncrl.generators.evaluation_config import EvaluationConfig, broken_evaluation_rules
from asyncrl.learner.config import HEAD_SIZES, LearnerConfig, SFTConfig
from asyncrl.learner.lora_config import broken_lora_rules
from asyncrl.learner.objective_needs import Surroundings, broken_rules, needs_of
from asyncrl.learner.sharding_config import broken_sharding_rules
from asyncrl.recipes.checkpoints_config import CheckpointsConfig
from asyncrl.recipes.deterministic import broken_deterministic_rules
from asyncrl.recipes.gpus import ClusterEntry, GPUConfig, unknown_gpus
from asyncrl.recipes.rft_config import RFTConfig
from asyncrl.recipes.sync_rules import broken_sync_rules, lag_of
from asyncrl.recipes.telemetry_config import TelemetryConfig
from asyncrl.weight_sync.config import WeightSyncConfig

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0)]


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[run]`."""

    name: Name
    """The run's folder is `FOLDER/NAME`, or `FOLDER/NAME-2` and so on where that is taken."""
    steps: Positive
    """Learner steps; each trains one batch and publishes one version."""
    folder: str = "runs"
    ray_address: str = ""
    """Empty: start Ray on this machine for this run. `auto` or an address: join a cluster that is up."""
    control_host: str = "127.0.0.1"
    """Address of this machine on which `asyncrl status` and its like are answered; another than loopback to command the run
    from elsewhere with its key file."""
    deterministic: bool = False
    """The weights at the end are the same bits each time, also of a run that was killed and resumed: one engine, one rank,
    staleness 0, one rollout at a time (`docs/checkpoints.md`)."""
    stall_timeout_s: PositiveSeconds = 900.0
    """The run ends when nothing was generated and no step was made for so long, and says who waits for whom."""


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[model]`."""

    path: str
    """A folder in Hugging Face's layout, or a hub name. Made by `[sft]` where the recipe has that and it is missing."""
    max_context_tokens: Positive = 4096
    """Prompt and answer together; engines reserve for it."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    run: RunConfig
    model: ModelConfig
    prompts: PromptsConfig
    sampling: SamplingConfig = msgspec.field(default_factory=SamplingConfig)
    staleness: StalenessConfig = msgspec.field(default_factory=StalenessConfig)
    pools: Annotated[list[PoolConfig], msgspec.Meta(min_length=1)]
    rewards: RewardsConfig
    environment: EnvironmentConfig | None = None
    evaluation: EvaluationConfig = msgspec.field(default_factory=EvaluationConfig)
    learner: LearnerConfig = msgspec.field(default_factory=LearnerConfig)
    weight_sync: WeightSyncConfig = msgspec.field(default_factory=WeightSyncConfig)
    buffer: BufferConfig = msgspec.field(default_factory=BufferConfig)
    checkpoints: CheckpointsConfig = msgspec.field(default_factory=CheckpointsConfig)
    telemetry: TelemetryConfig = msgspec.field(default_factory=TelemetryConfig)
    sft: SFTConfig | None = None
    rft: RFTConfig | None = None
    cluster: list[ClusterEntry] = []
    """Which GPUs there are, for `asyncrl plan`."""
    gpus: dict[str, GPUConfig] = {}
    """What the planner knows of a GPU, over its built-in table."""

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts.prompts_per_step * self.prompts.rollouts_per_prompt

    @property
    def rollouts_per_group(self) -> int:
        """Sampled for one prompt, spare ones and the baseline included."""
        spare = self.buffer.group_policy.spare_rollouts_per_prompt
        return self.prompts.rollouts_per_prompt + spare + self.greedy_baseline

    @property
    def greedy_baseline(self) -> bool:
        """Each prompt gets one more rollout, sampled greedily: the objective measures the others by its reward."""
        return "greedy rollouts" in needs_of(self.learner.objective).parts

    @property
    def needs_costs(self) -> bool:
        """Each rollout needs a cost, which the objective holds below its limit."""
        return "costs" in needs_of(self.learner.objective).parts

    @property
    def adapter_rank(self) -> int:
        """Of the LoRA adapters that engines get; 0: they get whole models."""
        lora = self.learner.lora
        return lora.rank if lora is not None and lora.sync == "adapter" else 0

    @property
    def max_lag_versions(self) -> int:
        """How far an engine may be behind the learner's version while the learner goes on."""
        return lag_of(self)

    @property
    def version_slots(self) -> int:
        """Versions that the learner's host holds in shared memory for engines to read; 0 where its memory holds none."""
        if self.weight_sync.transport in ("collective", "ipc"):
            return 0
        return max(2, self.max_lag_versions)

    @property
    def held_groups_limit(self) -> int:
        """Prompts that may be under way at once: (max_staleness_versions + 1) x prompts_per_step."""
        return (self.staleness.max_staleness_versions + 1) * self.prompts.prompts_per_step

    @property
    def longest_prompt_tokens(self) -> int:
        """What fits beside the longest answer; longer prompts are passed over."""
        return self.model.max_context_tokens - self.sampling.max_new_tokens

    @property
    def held_out_answer_tokens(self) -> int:
        """Of a held-out answer, at most."""
        return self.evaluation.max_new_tokens or self.sampling.max_new_tokens

    @property
    def slots(self) -> int:
        return sum(pool.engines * pool.first_concurrency for pool in self.pools)

    @property
    def engines(self) -> int:
        return sum(pool.engines for pool in self.pools)


class Problem(msgspec.Struct, frozen=True):
    """Something wrong with a recipe: where, what was found, and the way out."""

    path: str
    """Key path, such as `pools[0].concurrency`."""
    found: str
    advice: str

    def __str__(self) -> str:
        found = f" = {self.found}" if self.found else ""
        return f"{self.path}{found}: {self.advice}"


def cross_check(recipe: Recipe) -> list[Problem]:
    """Every rule that two or more settings break together."""
    checks = (
        _check_objective,
        _check_lora,
        _check_sharding,
        _check_batches,
        _check_buffer,
        _check_lengths,
        _check_evaluation,
        _check_pools,
        _check_rewards,
        _check_sft,
        _check_deterministic,
        _check_weight_sync,
        _check_cluster,
    )
    return [problem for check in checks for problem in check(recipe)]


def _check_objective(recipe: Recipe) -> Iterator[Problem]:
    around = Surroundings(
        max_staleness_versions=recipe.staleness.max_staleness_versions,
        rollouts_per_prompt=recipe.prompts.rollouts_per_prompt,
        dynamic_sampling=recipe.buffer.dynamic_sampling,
        max_new_tokens=recipe.sampling.max_new_tokens,
        steps=recipe.run.steps,
        critic_warmup_steps=recipe.learner.critic.warmup_steps if recipe.learner.critic else None,
        reference=recipe.learner.reference is not None,
    )
    for path, found, advice in broken_rules(recipe.learner.objective, around):
        yield Problem(path, found, advice)


def _check_lora(recipe: Recipe) -> Iterator[Problem]:
    for path, found, advice in broken_lora_rules(recipe.learner.lora):
        yield Problem(path, found, advice)


def _check_weight_sync(recipe: Recipe) -> Iterator[Problem]:
    for path, found, advice in broken_sync_rules(recipe):
        yield Problem(path, found, advice)


def _check_sharding(recipe: Recipe) -> Iterator[Problem]:
    learner = recipe.learner
    for path, found, advice in broken_sharding_rules(learner.sharding, learner.ranks, learner.device):
        yield Problem(path, found, advice)


def _check_batches(recipe: Recipe) -> Iterator[Problem]:
    prompts, learner = recipe.prompts, recipe.learner
    if learner.minibatches_per_step > prompts.prompts_per_step:
        yield Problem(
            "learner.minibatches_per_step",
            str(learner.minibatches_per_step),
            f"a minibatch holds whole groups, and a step has {prompts.prompts_per_step} (prompts.prompts_per_step): "
            "lower the one or raise the other",
        )
    if prompts.system and not prompts.chat_template:
        yield Problem(
            "prompts.system",
            repr(prompts.system),
            "is used by the chat template only: set prompts.chat_template = true",
        )


def _check_buffer(recipe: Recipe) -> Iterator[Problem]:
    buffer, prompts = recipe.buffer, recipe.prompts
    if buffer.shards > prompts.prompts_per_step:
        yield Problem(
            "buffer.shards",
            str(buffer.shards),
            f"each shard gives at least one prompt's group to every batch, and a step has {prompts.prompts_per_step} "
            "(prompts.prompts_per_step): lower the one or raise the other",
        )
    if buffer.dynamic_sampling and prompts.rollouts_per_prompt < 2:
        yield Problem(
            "buffer.dynamic_sampling",
            "true",
            f"drops every group whose rewards are all equal, and with prompts.rollouts_per_prompt = "
            f"{prompts.rollouts_per_prompt} that is every group: set at least 2 rollouts, or false",
        )


def _check_lengths(recipe: Recipe) -> Iterator[Problem]:
    if recipe.sampling.max_new_tokens >= recipe.model.max_context_tokens:
        yield Problem(
            "sampling.max_new_tokens",
            str(recipe.sampling.max_new_tokens),
            f"leaves no room for a prompt within model.max_context_tokens = {recipe.model.max_context_tokens}",
        )
    longest = recipe.model.max_context_tokens
    if recipe.learner.tokens_per_microbatch < longest:
        yield Problem(
            "learner.tokens_per_microbatch",
            str(recipe.learner.tokens_per_microbatch),
            f"one rollout may have model.max_context_tokens = {longest}: set at least that",
        )


def _check_evaluation(recipe: Recipe) -> Iterator[Problem]:
    for path, found, advice in broken_evaluation_rules(recipe.evaluation, recipe.model.max_context_tokens):
        yield Problem(path, found, advice)


def _check_pools(recipe: Recipe) -> Iterator[Problem]:
    names = [pool.name for pool in recipe.pools]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield Problem(f"pools[{i}].name", repr(name), f"pools[{names.index(name)}] has this name already")
    for i, pool in enumerate(recipe.pools):
        if pool.concurrency != "auto" and pool.concurrency > pool.max_concurrency:
            yield Problem(
                f"pools[{i}].concurrency",
                str(pool.concurrency),
                f"is more than pools[{i}].max_concurrency = {pool.max_concurrency}, which the engine is built for: "
                "lower the one or raise the other",
            )
        if pool.min_engines > pool.engines:
            yield Problem(
                f"pools[{i}].min_engines",
                str(pool.min_engines),
                f"is more than pools[{i}].engines = {pool.engines}: lower the one or raise the other",
            )
        if pool.device == "cpu" and pool.tensor_parallel > 1:
            yield Problem(
                f"pools[{i}].tensor_parallel",
                str(pool.tensor_parallel),
                'must be 1 with device = "cpu": raise cores',
            )
        if pool.device == "cpu" and pool.dtype == "float16":
            yield Problem(f"pools[{i}].dtype", '"float16"', 'a CPU computes in "float32" or "bfloat16"')


def _check_rewards(recipe: Recipe) -> Iterator[Problem]:
    terms = recipe.rewards.terms
    names = [term.name for term in terms]
    without_gpu = [p.name for p in recipe.pools if p.device != "cuda" or p.engine != "vllm"]
    for i, term in enumerate(terms):
        if term.broken_rule:
            yield Problem(
                f"rewards.terms[{i}]", f"function {term.function!r}, model {term.model!r}", term.broken_rule
            )
        elif names[i] in names[:i]:
            yield Problem(
                f"rewards.terms[{i}]", repr(names[i]), "is listed twice: add up its weights in one term"
            )
        if term.model and term.served.device == "cuda" and without_gpu:
            yield Problem(
                f"rewards.terms[{i}].serving.device",
                '"cuda"',
                f"a reward model stands beside each engine, on its GPU, and those of pool {without_gpu[0]} have none: "
                'set "cpu"',
            )


def _check_sft(recipe: Recipe) -> Iterator[Problem]:
    sft = recipe.sft
    if sft is not None and not sft.init and sft.hidden_size / sft.heads not in HEAD_SIZES:
        yield Problem(
            "sft.heads",
            str(sft.heads),
            f"sft.hidden_size / sft.heads = {sft.hidden_size / sft.heads:g}; engines know heads of {HEAD_SIZES}",
        )


def _check_deterministic(recipe: Recipe) -> Iterator[Problem]:
    for path, found, advice in broken_deterministic_rules(recipe):
        yield Problem(path, found, advice)


def _check_cluster(recipe: Recipe) -> Iterator[Problem]:
    for path, found, advice in unknown_gpus(recipe.cluster, recipe.gpus):
        yield Problem(path, found, advice)
