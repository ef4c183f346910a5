"""Settings of objectives: `[learner] objective = { type = "grpo", ... }`, one struct per type, and what all of them share.

A type fixes advantages and surrogate; correction, aggregation, entropy, KL and overlong punishment go with each of them.
What an objective needs follows in `objective_needs`, its formulas are in the modules named in `objective`. No torch here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
LowerClip = Annotated[float, msgspec.Meta(gt=0, le=1)]
DualClip = Annotated[float, msgspec.Meta(gt=1)]

Level = Literal["token", "sequence"]
Aggregation = Literal["token_mean", "sequence_sum", "sequence_mean", "fixed_divisor"]


class NoCorrection(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="none"):
    """`{ type = "none" }`: tokens count as sampled by the learner at batch start. Only where they are (staleness bound 0)."""


class Truncated(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="truncated"):
    """`{ type = "truncated", level = "token", cap = 2.0 }`: min(pi_proximal / pi_behaviour, cap)."""

    level: Level = "token"
    """Weigh each token by its own ratio, or all tokens of a rollout by the product of theirs."""
    cap: PositiveFloat = 2.0


class Masked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="masked"):
    """`{ type = "masked", level = "token", low = 0.5, high = 5.0 }`: the ratio within the bounds, else 0 (IcePop)."""

    level: Level = "token"
    low: NonNegativeFloat = 0.5
    high: PositiveFloat = 5.0


class Decoupled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="decoupled"):
    """`{ type = "decoupled", proximal = "recomputed" }`: decoupled PPO, weights without a cap unless one is set."""

    proximal: Literal["recomputed", "interpolated"] = "recomputed"
    """`recomputed`: by the learner at batch start. `interpolated`: between behaviour and current, by the token's age, which
    saves the forward pass over the minibatches after the first."""
    cap: PositiveFloat | None = None


Correction = NoCorrection | Truncated | Masked | Decoupled


class Overlong(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Soft overlong punishment (DAPO): the reward falls in a straight line once an answer is longer than `free_tokens`."""

    free_tokens: PositiveInt
    ramp_tokens: PositiveInt
    """After so many more the whole penalty is taken off."""
    penalty: PositiveFloat = 1.0


class KL(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """KL to a reference policy."""

    estimator: Literal["k1", "k2", "k3"]
    coefficient: PositiveFloat
    place: Literal["loss", "reward"]


class CostLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Safe RLHF: rewards are maximised while the mean cost of a rollout stays at or below `limit`."""

    limit: float
    multiplier: PositiveFloat = 1.0
    """Lagrange multiplier to begin with."""
    multiplier_rate: PositiveFloat = 0.1
    max_multiplier: PositiveFloat = 10.0


class _Objective(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """What every objective has."""

    compares_rollouts: ClassVar[bool] = True
    """Its advantages compare the rollouts of one prompt."""

    correction: Correction = msgspec.field(default_factory=Truncated)
    """For tokens that another policy sampled than the one whose gradient is taken."""
    aggregation: Aggregation = "token_mean"
    divisor_tokens: PositiveInt | None = None
    """For `aggregation = "fixed_divisor"`: tokens that a rollout counts for, whatever its length."""
    entropy_bonus: NonNegativeFloat = 0.0
    """Subtracted from a token's loss: so many times the entropy of its distribution, in nats."""
    overlong: Overlong | None = None
    kl: KL | None = None
    cost: CostLimit | None = None


class GRPO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="grpo"):
    """Group-relative policy optimisation (arXiv:2402.03300), with the upper clip of DAPO and a mean over all tokens."""

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.28
    dual_clip: DualClip | None = None
    normalise_std: bool = True
    """Divide the centred rewards of a group by their standard deviation."""


class DrGRPO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="dr_grpo"):
    """GRPO done right (arXiv:2503.20783): centred rewards as they are, and no division by a rollout's own length."""

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.2
    aggregation: Aggregation = "fixed_divisor"


class DAPO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="dapo"):
    """Decoupled clip and dynamic sampling (arXiv:2503.14476); goes with `buffer.dynamic_sampling = true` and `overlong`."""

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.28


class RLOO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="rloo"):
    """REINFORCE with the other rollouts' mean as baseline (arXiv:2402.14740)."""

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.2
    aggregation: Aggregation = "sequence_sum"


class ReMax(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="remax"):
    """REINFORCE with the greedy answer's reward as baseline (arXiv:2310.10505)."""

    compares_rollouts: ClassVar[bool] = False

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.2
    aggregation: Aggregation = "sequence_sum"


class ReinforcePP(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="reinforce_pp"):
    """REINFORCE++ (arXiv:2501.03262): discounted returns, normalised over the batch; also with one rollout per prompt."""

    compares_rollouts: ClassVar[bool] = False

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.2
    discount: Fraction = 1.0


class ReinforcePPBaseline(
    _Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="reinforce_pp_baseline"
):
    """REINFORCE++ with the group's mean as baseline, then normalised over the batch."""

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.2


class GSPO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="gspo"):
    """Group sequence policy optimisation (arXiv:2507.18071): ratio and clip of whole rollouts."""

    clip_low: LowerClip = 3e-4
    clip_high: PositiveFloat = 4e-4
    normalise_std: bool = True
    aggregation: Aggregation = "sequence_mean"


class CISPO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="cispo"):
    """Clipped importance weights, no token without a gradient (MiniMax-M1, arXiv:2506.13585)."""

    clip_low: LowerClip = 1.0
    """1: no lower bound, as in the paper."""
    clip_high: PositiveFloat = 4.0
    normalise_std: bool = True


class PPO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="ppo"):
    """Proximal policy optimisation (arXiv:1707.06347) with a critic and GAE."""

    compares_rollouts: ClassVar[bool] = False

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: DualClip | None = None
    discount: Fraction = 1.0
    gae_lambda: Fraction = 1.0
    value_clip: PositiveFloat | None = 0.2


class VAPO(_Objective, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="vapo"):
    """Value-augmented PPO (arXiv:2504.05118): lambda by length for the policy, another for the critic, imitation of what
    was right."""

    compares_rollouts: ClassVar[bool] = False

    clip_low: LowerClip = 0.2
    clip_high: PositiveFloat = 0.28
    discount: Fraction = 1.0
    length_factor: PositiveFloat = 0.05
    """The policy's lambda is 1 - 1 / (length_factor x tokens)."""
    critic_lambda: Fraction = 1.0
    value_clip: PositiveFloat | None = 0.2
    imitation: NonNegativeFloat = 0.1
    """Weight of the loss on what was answered right."""
    right_above: float = 0.0
    """A rollout is right where its reward, before any shaping, is above."""


Objective = (
    GRPO | DrGRPO | DAPO | RLOO | ReMax | ReinforcePP | ReinforcePPBaseline | GSPO | CISPO | PPO | VAPO
)
