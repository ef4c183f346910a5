"""What an engine's processes are told, and that it is told to them alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from asyncrl.generators import vllm_settings
from asyncrl.generators.child_processes import bound_to, environment_for_children
from asyncrl.generators.config import PoolConfig
from asyncrl.learner.lora_config import MOST_ENGINE_RANK


def pool(**settings: object) -> PoolConfig:
    return PoolConfig(name="small", **settings)  # type: ignore[arg-type]


def test_cpu_and_cuda_arguments() -> None:
    cpu = vllm_settings.arguments(pool(device="cpu", kv_cache_bytes=123, max_concurrency=8), "m", 64, 1)
    assert cpu["kv_cache_memory_bytes"] == 123
    assert cpu["enforce_eager"] is True
    assert cpu["max_num_seqs"] == 9
    assert "gpu_memory_utilization" not in cpu
    cuda = vllm_settings.arguments(pool(memory_fraction=0.5, tensor_parallel=2), "m", 64, 1)
    assert cuda["gpu_memory_utilization"] == 0.5
    assert cuda["distributed_executor_backend"] == "mp"
    assert "kv_cache_memory_bytes" not in cuda


def test_weights_never_come_from_the_folder() -> None:
    for device in ("cpu", "cuda"):
        chosen = vllm_settings.arguments(pool(device=device), "m", 64, 1)
        assert chosen["load_format"] == "dummy" and "enable_lora" not in chosen


@pytest.mark.parametrize(("longest", "at_once"), [(64, 2048), (8192, 8192)])
def test_where_requests_have_seeds_no_prompt_is_computed_in_pieces(longest: int, at_once: int) -> None:
    chosen = vllm_settings.arguments(pool(device="cpu"), "m", longest, 1, whole_prompts=True)
    assert chosen["max_num_batched_tokens"] == at_once
    assert "max_num_batched_tokens" not in vllm_settings.arguments(pool(device="cpu"), "m", longest, 1)


def test_but_the_base_of_adapters_does() -> None:
    for rank, room in ((1, 1), (2, 8), (8, 8), (33, 64), (129, 256), (512, 512)):
        chosen = vllm_settings.arguments(pool(), "m", 64, 1, adapter_rank=rank)
        assert chosen["load_format"] == "auto"
        assert (chosen["enable_lora"], chosen["max_loras"], chosen["max_lora_rank"]) == (True, 1, room)
    with pytest.raises(ValueError, match="up to 512"):
        vllm_settings.arguments(pool(), "m", 64, 1, adapter_rank=MOST_ENGINE_RANK + 1)


def test_the_prefix_cache_is_as_the_recipe_says() -> None:
    assert vllm_settings.arguments(pool(), "m", 64, 1)["enable_prefix_caching"] is True
    off = vllm_settings.arguments(pool(), "m", 64, 1, prefix_cache=False)
    assert off["enable_prefix_caching"] is False


def test_cores() -> None:
    assert vllm_settings.cores(pool(device="cpu", cores=2), None) is None
    assert vllm_settings.cores(pool(device="cpu", cores=2, tensor_parallel=2), 4) == {4, 5, 6, 7}
    assert vllm_settings.cores(pool(device="cuda"), 4) is None


def test_environment_binds_one_list_of_cores_per_worker() -> None:
    bound = vllm_settings.environment(
        pool(device="cpu", cores=2, tensor_parallel=2), 4, 1, "/tmp/x", "WARNING"
    )
    assert bound["VLLM_CPU_OMP_THREADS_BIND"] == "4-5|6-7"
    free = vllm_settings.environment(pool(device="cpu", cores=3), None, 1, "/tmp/x", "WARNING")
    assert free["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in vllm_settings.environment(
        pool(device="cuda"), None, 1, "/tmp/x", "WARNING"
    )


def test_children_alone_see_the_environment() -> None:
    os.environ["ASYNCRL_TEST_KEPT"] = "before"
    try:
        with environment_for_children({"ASYNCRL_TEST_KEPT": "inside", "ASYNCRL_TEST_NEW": "1"}):
            os.environ["ASYNCRL_TEST_OTHER"] = "set by somebody within"
            script = "import os; print(os.environ['ASYNCRL_TEST_KEPT'], os.environ['ASYNCRL_TEST_NEW'])"
            seen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
        assert seen.stdout.split() == ["inside", "1"]
        assert os.environ["ASYNCRL_TEST_KEPT"] == "before"
        assert not {"ASYNCRL_TEST_NEW", "ASYNCRL_TEST_OTHER"} & os.environ.keys()
    finally:
        del os.environ["ASYNCRL_TEST_KEPT"]


def test_children_inherit_the_cores_and_this_thread_gets_its_own_back() -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    with bound_to({one}):
        script = "import os; print(sorted(os.sched_getaffinity(0)))"
        seen = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert seen.stdout.strip() == f"[{one}]"
    assert os.sched_getaffinity(0) == before


def test_a_core_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="99999"), bound_to({99999}):
        pass


def test_importing_the_engine_does_not_import_vllm() -> None:
    script = "import sys, asyncrl.generators.vllm_engine; print([m for m in ('vllm', 'torch') if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert seen.stdout.strip() == "[]", seen.stderr
