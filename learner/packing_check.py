"""Whether a model keeps packed rollouts apart, found out by running it: once, when it is loaded.

That a model's attention is told apart (`attention`) does not say that the model is: it may ignore the attention that it was
given, carry a state along the row, or count positions of its own. Each would train on wrong logprobs without a word.
Called by `model`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from asyncrl.learner.rows import MicroBatch, assemble, rows_of

LEAK = 0.02
"""A rollout's outputs may differ by so much of what its own first token makes. Rounding is far below it (a kernel may sum
in another order at another place of the row), another rollout's tokens or other positions are far above."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


def check_kind(lm: torch.nn.Module) -> None:
    """Raises ValueError for models that do not let their attention be given, or that have layers which are no attention over all
    or a window of what came before.

    The probe's rollouts are short: it would not notice attention in chunks of thousands of positions.
    """
    config = lm.config.get_text_config()  # type: ignore[operator, union-attr]
    if not lm._supports_attention_backend:
        raise ValueError(
            f"{type(lm).__name__} has an attention of its own, which does not keep rollouts apart that are packed into one row. "
            "Use another model"
        )
    other = set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES
    chunk = getattr(config, "attention_chunk_size", None)
    if other or chunk:
        what = (
            f"layers of type {', '.join(sorted(other))}"
            if other
            else f"attention in chunks of {chunk} positions"
        )
        raise ValueError(
            f"{type(lm).__name__} has {what}; rollouts that are packed into one row can be kept apart in layers of type "
            f"{', '.join(sorted(LAYER_TYPES))} alone. Use another model"
        )


def check_apart(
    name: str, outputs: Callable[[MicroBatch], torch.Tensor], vocabulary: int, device: torch.device
) -> None:
    """Runs two passes of the same size: a rollout after one and after another one, its beginning alone, and the rollout with
    another first token.

    Args:
        name: the model's, for the error.
        outputs: a number for each answer token of a pass, from the hidden state before it: [tokens]. A collective if that is one.
        vocabulary: token ids are below it.
    Raises ValueError if the first three differ by more than `LEAK` of what the other first token makes.
    """
    random = np.random.default_rng(0)
    probe, before, long, after = (random.integers(0, vocabulary, length).tolist() for length in (9, 6, 14, 5))
    changed = [(probe[0] + 1) % vocabulary, *probe[1:]]
    want = _outputs_of([before, probe, long], outputs, device)[1]
    _, again, begun, other = _outputs_of([after, probe, probe[:6], changed], outputs, device)
    apart = max(float((want - again).abs().max()), float((want[: len(begun)] - begun).abs().max()))
    own = float((want - other).abs().max())
    if not apart <= LEAK * own + 1e-6:
        raise ValueError(
            f"{name} lets a rollout see other ones in the same row, its place there, or what comes after: the outputs of the same "
            f"tokens differ by {apart:.2g} (where another first token makes {own:.2g}). It ignores the attention that it is given, "
            "carries a state along the row, or counts positions by itself. Use another model"
        )


def _outputs_of(
    rollouts: list[list[int]], outputs: Callable[[MicroBatch], torch.Tensor], device: torch.device
) -> list[torch.Tensor]:
    rows = rows_of([(row[:1], row[1:]) for row in rollouts])
    out = outputs(assemble(rows, np.arange(len(rollouts))).to(device)).float().cpu()
    return list(torch.split(out, [len(row) - 1 for row in rollouts]))
