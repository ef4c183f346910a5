"""Settings of LoRA and QLoRA, and the rules that they can break. Pure. Called by `config` and the recipe's checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

MOST_ENGINE_RANK = 512
"""Of an adapter that vLLM takes."""


class LoraConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[learner.lora]`: W x becomes W x + alpha / rank B (A x), and A and B alone are trained.

    LoRA, Hu et al. 2021, arXiv:2106.09685; with `quantise = "nf4"` QLoRA, Dettmers et al. 2023, arXiv:2305.14314.
    """

    rank: Annotated[int, msgspec.Meta(ge=1)] = 16
    alpha: Annotated[float, msgspec.Meta(gt=0)] = 32.0
    """The adapter's output is scaled by alpha / rank."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Last names of the linear layers in the decoder's layers that get an adapter: `["q_proj", "v_proj"]`."""
    dropout: float = 0.0
    """Must be 0; there so that a recipe which sets it is told why."""
    quantise: Literal["none", "nf4"] = "none"
    """`nf4`: every linear layer of the decoder's layers is held in 4 bits, in blocks of 64 with a float32 scale each."""
    sync: Literal["merged", "adapter"] = "merged"
    """What engines get. `merged`: W + alpha / rank B A of the whole model. `adapter`: A and B alone; an engine reads the base
    from `model.path`."""
    seed: int = 0
    """Of the first A; B begins as 0, so that version 0 is the base."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def broken_lora_rules(lora: LoraConfig | None) -> Iterator[tuple[str, str, str]]:
    """(key path, what was found, the way out) of each rule that is broken."""
    if lora is None:
        return
    if lora.dropout != 0:
        yield (
            "learner.lora.dropout",
            str(lora.dropout),
            "must be 0: a token's logprob has to be a function of weights and context alone, as importance weights compare "
            "it with the engine's, which drops nothing; a lower rank or weight_decay regularises instead",
        )
    if not lora.target_modules:
        yield (
            "learner.lora.target_modules",
            "[]",
            'names no layer, so that nothing would be trained: name some, or "all-linear"',
        )
    if lora.sync == "adapter" and lora.quantise != "none":
        yield (
            "learner.lora.sync",
            '"adapter"',
            f'with learner.lora.quantise = "{lora.quantise}" engines would put the adapter on the base of model.path, which is '
            'not the rounded one that it was trained on: set sync = "merged"',
        )
    if lora.sync == "adapter" and lora.rank > MOST_ENGINE_RANK:
        yield (
            "learner.lora.rank",
            str(lora.rank),
            f'engines take adapters of rank {MOST_ENGINE_RANK} at most: lower it, or set sync = "merged"',
        )
