"""What `[weight_sync]` must be with the rest of a recipe, and the lag that follows where it says nothing."""

from pathlib import Path

import pytest

from asyncrl.recipes import RecipeError, load_recipe

QUICKSTART = Path(__file__).resolve().parents[3] / "recipes" / "quickstart.toml"


def sync_problems(*overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "lag"),
    [
        ([], 0),
        (["staleness.max_staleness_versions=2"], 1),
        (["staleness.max_staleness_versions=7"], 1),
        (["weight_sync.max_lag_versions=1"], 1),
        (["weight_sync.max_lag_versions=0"], 0),
        (['weight_sync.transport="collective"', "staleness.max_staleness_versions=2"], 0),
        (["staleness.max_staleness_versions=0"], 0),
    ],
)
def test_the_lag_where_nothing_is_said(overrides, lag):
    assert load_recipe(QUICKSTART, overrides).max_lag_versions == lag


def test_a_deterministic_run_has_no_lag():
    assert "weight_sync.max_lag_versions = 1" in sync_problems(
        "run.deterministic=true", "weight_sync.max_lag_versions=1"
    )
    assert "max_lag_versions" not in sync_problems("run.deterministic=true")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weight_sync.max_lag_versions=3"], "must be at most staleness.max_staleness_versions = 1"),
        (['weight_sync.transport="collective"', "weight_sync.max_lag_versions=1"], "to all engines at once"),
        (['weight_sync.senders="all"', "learner.lora={}"], "with adapters that are merged"),
        (['weight_sync.senders="all"', 'weight_sync.wire_dtype="float8"'], "a block of 128 x 128"),
        (['weight_sync.transport="ipc"'], 'needs learner.device = "cuda"'),
        (
            ['weight_sync.transport="ipc"', 'learner.device="cuda"'],
            "needs vLLM engines on CUDA, pools[0] is not",
        ),
        (['weight_sync.transport="ipc"'], "learner.gpu_share = 1: must be below 1"),
        (['weight_sync.transport="ipc"'], "pools[0].gpu_share = 1: must be below 1"),
        (["pools.0.gpu_share=0.5", "pools.0.tensor_parallel=2"], "must be 1 with tensor_parallel above 1"),
        (["weight_sync.bucket_bytes=100"], "bucket_bytes"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    assert message in sync_problems(*overrides)


def test_the_versions_in_shared_memory():
    slots = {
        (): 2,
        ("staleness.max_staleness_versions=4", "weight_sync.max_lag_versions=3"): 3,
        ('weight_sync.transport="tcp"',): 2,
        ('weight_sync.transport="collective"',): 0,
    }
    assert {key: load_recipe(QUICKSTART, key).version_slots for key in slots} == slots


@pytest.mark.parametrize(
    "overrides",
    [
        [
            'weight_sync.transport="ipc"',
            'learner.device="cuda"',
            "learner.gpu_share=0.5",
            'pools=[{ name = "a", device = "cuda", concurrency = 8, gpu_share = 0.5, memory_fraction = 0.4 }]',
        ],
        ['weight_sync.senders="all"', "learner.ranks=2"],
        ['weight_sync.senders="all"', 'learner.lora={ sync = "adapter" }'],
        ['weight_sync.transport="tcp"', "weight_sync.delta=false"],
    ],
)
def test_what_goes_together_is_not(overrides):
    load_recipe(QUICKSTART, overrides)
