"""`[rft]`: rejection-sampling fine-tuning, and the recipes of the runs that it samples with. Pure. Called by `runtime.rft`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from asyncrl.buffer.config import FullGroups, StalenessConfig
from asyncrl.learner.config import SFTConfig
from asyncrl.learner.objective_config import GRPO

if TYPE_CHECKING:
    from asyncrl.recipes.recipe import Recipe

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


class RFTConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[rft]`: sample with the model, keep the answers that score, imitate them (`docs/evaluation.md`)."""

    out: str
    """Folder of the model that is made; it must not be there."""
    source: str = ""
    """Prompts, named like `prompts.source`; empty: that of the recipe."""
    prompts: Positive = 512
    """Of each round, fewer where the source has fewer."""
    rollouts_per_prompt: Positive = 8
    temperature: PositiveFloat = 1.0
    min_reward: float = 1.0
    """An answer is kept when it ended by itself and its reward is at least that."""
    max_per_prompt: Positive = 4
    """Different answers to one prompt that are kept at most."""
    choose: Literal["random", "shortest"] = "random"
    """Which of more."""
    rounds: Positive = 1
    """Each samples with the model of the one before, to other prompts."""
    epochs: Positive = 2
    """Passes over what was kept."""
    steps: NonNegative = 0
    """Optimizer steps of each round instead; 0: as many as `epochs` takes."""
    pairs_per_step: Positive = 64
    learning_rate: PositiveFloat = 1e-5
    warmup_steps: NonNegative = 5
    cosine_decay: bool = False
    evaluate: bool = True
    """Where `[evaluation]` names a source: measure before each round, and the model that is made."""
    seed: int = 0

    def sft(self, init: str, pairs: int, round_number: int) -> SFTConfig:
        """The settings of one round's training on so many pairs."""
        each = min(self.pairs_per_step, pairs)
        return SFTConfig(
            source=f"rft round {round_number}",
            steps=self.steps or -(-self.epochs * pairs // each),
            pairs_per_step=each,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            cosine_decay=self.cosine_decay,
            seed=self.seed,
            init=init,
        )


def sampling_recipe(
    recipe: Recipe, config: RFTConfig, *, folder: str, name: str, model: str, round_number: int, prompts: int
) -> Recipe:
    """A run that samples `prompts` groups as one batch and trains on none: pools, rewards and environment are the recipe's.

    The learner is there to give the engines their weights, by the way that all weights come: it takes no step. With a bound of
    0 the buffer holds exactly one batch, which is all that is to be sampled.
    """
    replace = msgspec.structs.replace
    return replace(
        recipe,
        run=replace(recipe.run, name=name, folder=folder, steps=1, deterministic=False),
        model=replace(recipe.model, path=model),
        prompts=replace(
            recipe.prompts,
            source=config.source or recipe.prompts.source,
            prompts_per_step=prompts,
            rollouts_per_prompt=config.rollouts_per_prompt,
            seed=recipe.prompts.seed + round_number - 1,
        ),
        sampling=replace(recipe.sampling, temperature=config.temperature),
        staleness=StalenessConfig(max_staleness_versions=0),
        evaluation=replace(
            recipe.evaluation, every_steps=0, source=recipe.evaluation.source if config.evaluate else ""
        ),
        learner=replace(
            recipe.learner, objective=GRPO(), critic=None, reference=None, lora=None, minibatches_per_step=1
        ),
        buffer=replace(
            recipe.buffer,
            group_policy=FullGroups(),
            dynamic_sampling=False,
            keep_log="all",
            shards=min(recipe.buffer.shards, prompts),
        ),
        sft=None,
        rft=None,
    )
