"""Broadcast or pulled, by the machines that there are when a run starts."""

from pathlib import Path

import pytest

from asyncrl.recipes import load_recipe
from asyncrl.runtime.sync_choice import broadcasts

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"
CUDA = ('learner.device="cuda"', 'pools=[{ name = "a", device = "cuda", engines = 2, concurrency = 8 }]')


@pytest.mark.parametrize(
    ("overrides", "learners", "machines", "expected"),
    [
        ((), ["a"], [], False),
        (('weight_sync.transport="collective"',), ["a"], [], True),
        (('weight_sync.transport="tcp"', *CUDA), ["a"], ["a", "b"], False),
        (CUDA, ["a"], ["a"], False),
        (CUDA, ["a", "a"], ["a", "b"], True),
        (CUDA, ["a"], ["b"], True),
        ((*CUDA, "weight_sync.max_lag_versions=1"), ["a"], ["a", "b"], False),
        ((*CUDA, "weight_sync.max_lag_versions=0"), ["a"], ["a", "b"], True),
        ((CUDA[0],), ["a"], ["a", "b"], False),
        ((CUDA[1],), ["a"], ["a", "b"], False),
    ],
)
def test_gpus_on_several_machines_are_broadcast_to(overrides, learners, machines, expected):
    assert broadcasts(load_recipe(QUICKSTART, overrides), learners, machines) is expected
