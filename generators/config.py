"""Settings of what makes rollouts: prompts, sampling, environment, pools of engines, rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from asyncrl.generators.fake_speech import Lengths

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
PositiveSeconds = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeSeconds = Annotated[float, msgspec.Meta(ge=0)]
WORKER_MEMORY_BYTES = 2 * 2**30
"""What functions import at their module's level is not counted; importing torch while answering takes 0.6 GiB of it."""
AUTO_START = 8
"""Slots per engine with which `concurrency = "auto"` begins."""


class PromptsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[prompts]`: where prompts come from, in which order, how many a step."""

    source: str
    """`sums:train` (a generated task), a `.jsonl` or `.parquet` file, or `hf:NAME[:SPLIT]` (Hugging Face datasets)."""
    prompts_per_step: Positive = 16
    rollouts_per_prompt: Positive = 8
    seed: int = 0
    """Order of the prompts; the same seed gives the same order, also after a resume."""
    prompt_field: str = "question"
    answer_field: str = "answer"
    chat_template: bool = False
    """Wrap each prompt as one user message with the tokenizer's chat template."""
    system: str = ""
    """System message, with `chat_template` only."""
    task: dict[str, int] = {}
    """Settings of a generated task, such as `min_terms` and `max_terms` of `sums`."""


class SamplingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[sampling]`: truncated sampling (top-p, top-k) is left out on purpose: it biases the importance ratio."""

    max_new_tokens: Positive = 256
    temperature: PositiveSeconds = 1.0
    flush_tokens: Positive = 32
    """A segment is sent to the buffer after so many tokens at the latest: what a crash may lose of one rollout."""


class EnvironmentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[environment]`: what answers the model between its turns (`docs/environments.md`)."""

    function: str = "single_turn"
    """`single_turn` (the first turn is the answer), `calculator`, or an import path `package.module:factory`."""
    settings: dict[str, Any] = {}
    """Given to the factory."""
    max_turns: Positive = 8
    """Turns of the model; after so many the environment is not asked any more and the rollout ends."""
    timeout_s: PositiveSeconds = 10.0
    """One reply may take so long; then its worker is killed and the rollout fails with that reason."""
    workers: Positive = 1
    """Worker processes per engine."""
    memory_bytes: NonNegative = WORKER_MEMORY_BYTES
    """Address space that a worker may take on top of what loading the environment took; 0: no limit."""
    stop_tokens: list[str] = []
    """Texts of further tokens that end a turn; each is one token of the model's tokenizer."""


class FakeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[pools.fake]`: how engines with `engine = "fake"` behave."""

    step_s: Annotated[float, msgspec.Meta(ge=0)] = 0.002
    """One decode step."""
    tokens_per_step: Positive = 1
    """For each rollout at work."""
    lengths: Lengths = Lengths()
    """Of the answers."""
    kv_capacity_tokens: Positive = 2**24
    """What its KV cache would hold; past it rollouts are preempted."""


class PoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[pools]]` entry: engines of one shape."""

    name: str
    engines: Positive = 1
    """Wanted from the start on; `asyncrl scale` changes it while the run goes on."""
    min_engines: NonNegative = 0
    """The run begins when so many are up, and the others join when machines have room for them. 0: all of `engines`."""
    engine: Literal["vllm", "fake"] = "vllm"
    """`fake` is the deterministic engine of the tests; it speaks nonsense at a set speed."""
    fake: FakeConfig = FakeConfig()
    device: Literal["cpu", "cuda"] = "cuda"
    concurrency: Positive | Literal["auto"] = 64
    """Slots per engine: how many rollouts it works on at once. `auto`: as KV cache, learner and staleness allow."""
    max_concurrency: Positive = 256
    """Slots that an engine is built for, the most that `asyncrl scale` and `auto` may give it."""
    tensor_parallel: Positive = 1
    memory_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.85
    """Share of each GPU that weights and KV cache may take (CUDA)."""
    gpu_share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Part of a GPU that an engine takes on Ray's books; below 1 it shares one with the learner or other engines, and
    `memory_fraction` must leave them room. Above one GPU (`tensor_parallel`) it is 1."""
    kv_cache_bytes: Positive = 2**30
    """KV cache of each engine (CPU)."""
    cores: Positive = 1
    """Cores that each engine computes on (CPU)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    start_timeout_s: PositiveSeconds = 600.0
    gpu_type: str = ""
    """As Ray names accelerator types, such as `H100` or `A100`: only machines with it are used. Empty: any."""
    resources: dict[str, float] = {}
    """Custom resources of Ray that each engine takes, such as `{ spot = 1.0 }`."""
    max_deaths: NonNegative = 5
    """More deaths of this pool's engines within `deaths_within_s`, and it has failed; the run goes on with the others."""
    deaths_within_s: PositiveSeconds = 600.0

    @property
    def first_concurrency(self) -> int:
        """Slots per engine at the start."""
        return min(AUTO_START, self.max_concurrency) if self.concurrency == "auto" else self.concurrency

    @property
    def engines_to_begin(self) -> int:
        return min(self.min_engines or self.engines, self.engines)


class RewardModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`serving = { ... }` of a reward term with `model`."""

    gives: Literal["reward", "cost"] = "reward"
    """What its number is. A cost adds nothing to the reward."""
    device: Literal["cpu", "cuda"] = "cuda"
    """`cuda`: the first GPU of the engine that it stands beside, whose `memory_fraction` must leave room for it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    cores: Positive = 1
    """Threads that it computes with on a CPU. They are not set aside for it: it shares the machine with the engines."""
    chat_template: bool = True
    """Show it question and answer as a talk in its own chat template; else as one text, the answer right behind the question."""
    tokens_per_batch: Positive = 16384
    """Most tokens of one forward pass, padding included; a single text that is longer is a batch of its own."""
    wait_s: NonNegativeSeconds = 0.02
    """How long an answer may wait for others to fill a batch with, while the model has nothing to do."""
    timeout_s: PositiveSeconds = 60.0
    """One answer may wait and be read for so long; then its rollout fails with that reason."""
    start_timeout_s: PositiveSeconds = 600.0
    """For loading the weights."""


class RewardTerm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[rewards.terms]]` entry: a rule or a model."""

    function: str = ""
    """`sums`, `math`, `format`, or an import path `package.module:function`."""
    model: str = ""
    """Folder of a sequence classifier with one label, in Hugging Face's layout."""
    serving: RewardModelConfig | None = None
    """How `model` is served; left out: as the settings' defaults say."""
    weight: float = 1.0
    """Of its reward, and of its cost where it gives one."""

    @property
    def name(self) -> str:
        """For people: what it is reported by."""
        return self.function or self.model

    @property
    def served(self) -> RewardModelConfig:
        return self.serving or RewardModelConfig()

    @property
    def broken_rule(self) -> str:
        """What is wrong with it as a whole; empty where nothing is."""
        if bool(self.function) == bool(self.model):
            return (
                "a term has one of `function` and `model`: name the one, and make another term for the other"
            )
        if self.function and self.serving is not None:
            return "`serving` is for a term with `model`, and this has a function: leave it out"
        return ""


class RewardsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[rewards]`: the weighted sum of the terms is the reward; timeout, workers and memory are the functions'."""

    terms: list[RewardTerm]
    timeout_s: PositiveSeconds = 10.0
    """One answer's scoring may take so long; then its worker is killed and the rollout fails with that reason."""
    workers: Positive = 1
    """Worker processes per engine."""
    memory_bytes: NonNegative = WORKER_MEMORY_BYTES
    """Address space that a worker may take on top of what loading the functions took; 0: no limit."""
