"""Broadcast or pulled, by the machines and GPUs that there are when a run starts."""

from pathlib import Path

import pytest

from asyncrl.recipes import load_recipe
from asyncrl.runtime.sync_choice import is_over_nccl, way_of

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"
CUDA = ('learner.device="cuda"', 'pools=[{ name = "a", device = "cuda", engines = 2, concurrency = 8 }]')
SHARED = (
    'learner.device="cuda"',
    "learner.gpu_share=0.5",
    'pools=[{ name = "a", device = "cuda", concurrency = 8, gpu_share = 0.5, memory_fraction = 0.4 }]',
)


@pytest.mark.parametrize(
    ("overrides", "learners", "gpus", "expected"),
    [
        ((), ["a"], {}, "host"),
        (('weight_sync.transport="collective"',), ["a"], {}, "collective"),
        (('weight_sync.transport="tcp"', *CUDA), ["a"], {"a": 8, "b": 8}, "host"),
        (('weight_sync.transport="ipc"', *SHARED), ["a"], {"a": 8}, "device"),
        (SHARED, ["a"], {"a": 1}, "device"),
        (('weight_sync.transport="shm"', *CUDA), ["a"], {"a": 1}, "host"),
        (CUDA, ["a"], {"a": 8}, "host"),
        (CUDA, ["a", "a"], {"a": 8, "b": 8}, "collective"),
        (CUDA, ["a"], {"a": 1, "b": 1}, "collective"),
        ((*CUDA, "weight_sync.max_lag_versions=1"), ["a"], {"a": 8, "b": 8}, "host"),
        ((*CUDA, "weight_sync.max_lag_versions=0"), ["a"], {"a": 8, "b": 8}, "collective"),
        ((CUDA[0],), ["a"], {"a": 8, "b": 8}, "host"),
        ((CUDA[1],), ["a"], {"a": 1}, "host"),
        (SHARED, ["a"], {"a": 1, "b": 1}, "host"),
        ((SHARED[0], SHARED[2]), ["a"], {"a": 8, "b": 8}, "host"),
        ((*CUDA, 'pools.0.engine="fake"'), ["a"], {"a": 8, "b": 8}, "host"),
    ],
)
def test_the_way_of_the_weights(overrides, learners, gpus, expected):
    assert way_of(load_recipe(QUICKSTART, overrides), learners, gpus) == expected


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), False),
        (CUDA, True),
        (CUDA[:1], False),
        (CUDA[1:], False),
        (SHARED, False),
        ((*CUDA, "learner.gpu_share=0.5"), False),
        ((*CUDA, "pools.0.gpu_share=0.5"), False),
        ((*CUDA, 'pools.0.engine="fake"'), False),
    ],
)
def test_nccl_needs_a_gpu_for_each_rank(overrides, expected):
    assert is_over_nccl(load_recipe(QUICKSTART, overrides)) == expected
