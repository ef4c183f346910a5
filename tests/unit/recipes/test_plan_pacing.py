"""The planner's rule for how many rollouts may be under way, against the pacing itself played out event by event."""

import heapq
import itertools
import random

import numpy as np
import pytest

from asyncrl.buffer.staleness import admission_capacity
from asyncrl.recipes.plan_lengths import Lengths
from asyncrl.recipes.plan_pacing import WAITING

TOKEN_S = 0.01


def played(prompts, group, bound, mean, longest, train_s, steps=300):
    """Seconds a step: groups are admitted as the buffer admits them, generated at once, trained when a batch is complete."""
    lengths, rng = Lengths(mean, longest), random.Random(1)
    now, held, ready, done, training = 0.0, 0, 0, [], None
    heap, left, ids = [], {}, itertools.count()
    while len(done) < steps:
        for _ in range(admission_capacity(held, prompts, bound)):
            name, held = next(ids), held + 1
            left[name] = group
            for _ in range(group):
                at = int(np.searchsorted(1 - lengths.survival, rng.random()))
                tokens = lengths.middles[min(at, len(lengths.middles) - 1)]
                heapq.heappush(heap, (now + tokens * TOKEN_S, name))
        if training is None and ready >= prompts:
            ready, training = ready - prompts, now + train_s
        if training is not None and (not heap or training <= heap[0][0]):
            now, training, held = training, None, held - prompts
            done.append(now)
            continue
        now, name = heapq.heappop(heap)
        left[name] -= 1
        if not left[name]:
            ready += 1
            del left[name]
    third = steps // 3
    return (done[-1] - done[third]) / (steps - 1 - third)


def predicted(prompts, group, bound, mean, longest, train_s):
    """The step time at which C s / R + WAITING + train / step = K + 1, or the training if that takes longer."""
    lengths = Lengths(mean, longest)
    low, high = train_s, 1e6
    for _ in range(100):
        step = (low + high) / 2
        groups = (bound + 1 - WAITING - train_s / step) * prompts
        generate = prompts * lengths.mean_of_longest(group) * TOKEN_S / groups
        low, high = (low, step) if max(generate, train_s) < step else (step, high)
    return high


@pytest.mark.parametrize(
    "setting",
    [
        (16, 8, 1, 300, 2000, 2.0),
        (16, 8, 2, 300, 2000, 2.0),
        (16, 8, 4, 300, 2000, 2.0),
        (64, 8, 1, 300, 2000, 0.5),
        (64, 8, 2, 300, 2000, 4.0),
        (64, 16, 3, 100, 4000, 1.0),
        (32, 4, 8, 900, 2000, 1.0),
        (16, 8, 4, 300, 2000, 20.0),
    ],
)
def test_the_step_time_that_the_bound_allows(setting):
    assert predicted(*setting) == pytest.approx(played(*setting), rel=0.1)
