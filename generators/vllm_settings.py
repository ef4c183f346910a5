"""From a pool to vLLM's own settings: arguments, environment, cores. Pure; imports no vLLM. Called by `vllm_start`."""

from __future__ import annotations

import math
from typing import Any

from asyncrl.generators.config import PoolConfig
from asyncrl.weight_sync.float8 import quantization_config

WORKER_EXTENSION = "asyncrl.weight_sync.vllm_worker.WorkerExtension"
WEIGHT_BACKEND = "asyncrl"
ADAPTER_ID = 1
"""As in `asyncrl.weight_sync.vllm_adapter`; the same in every version, as an adapter takes the place of the one before."""
_ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Room for an adapter that vLLM can be built with."""
_BATCHED_TOKENS = 2048
"""vLLM's own default of what one step computes at most, where it is the smaller one."""
OWNER_VARIABLE = "ASYNCRL_ENGINE_OWNER"
"""As in `asyncrl.weight_sync.vllm_worker`, which cannot be imported without vLLM."""


def arguments(
    pool: PoolConfig,
    model_path: str,
    max_model_len: int,
    seed: int,
    *,
    prefix_cache: bool = True,
    whole_prompts: bool = False,
    adapter_rank: int = 0,
    float8: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs`, but for the weight transfer configuration.

    `whole_prompts`: no prompt is computed in pieces. The CPU's model runner ends with an error at a request that has a seed and
    whose prompt is in pieces. `adapter_rank`: versions are LoRA adapters of this rank, on the base of `model_path`; 0: they are
    whole models. `float8`: of these, linear weights are codes and scales. Raises ValueError for a rank that vLLM has no room for.
    """
    on_cpu = pool.device == "cpu"
    device = (
        {"kv_cache_memory_bytes": pool.kv_cache_bytes}
        if on_cpu
        else {"gpu_memory_utilization": pool.memory_fraction}
    )
    return {
        "model": model_path,
        "dtype": pool.dtype,
        "seed": seed,
        "max_model_len": max_model_len,
        "max_num_seqs": pool.max_concurrency + 1,  # one more for a probe
        "load_format": "auto" if adapter_rank else "dummy",
        "generation_config": "vllm",
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": prefix_cache,
        "enforce_eager": on_cpu,
        "tensor_parallel_size": pool.tensor_parallel,
        # Named, as vLLM would choose Ray by itself when it finds itself in an actor.
        "distributed_executor_backend": "uni" if pool.tensor_parallel == 1 else "mp",
        "worker_extension_cls": WORKER_EXTENSION,
        **({"max_num_batched_tokens": max(_BATCHED_TOKENS, max_model_len)} if whole_prompts else {}),
        **_adapter(adapter_rank),
        **({"hf_overrides": {"quantization_config": quantization_config()}} if float8 else {}),
        **device,
    }


def _adapter(rank: int) -> dict[str, Any]:
    """Room for the one adapter that every request has."""
    if not rank:
        return {}
    room = next((most for most in _ADAPTER_RANKS if most >= rank), None)
    if room is None:
        raise ValueError(f"an adapter of rank {rank}: vLLM takes ranks up to {_ADAPTER_RANKS[-1]}")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}


def environment(
    pool: PoolConfig, first_core: int | None, owner: int, folder: str, log_level: str
) -> dict[str, str]:
    """Environment variables of the engine's processes. They end when the process `owner` does, and keep their sockets
    and other short-lived files in `folder`."""
    variables = {
        OWNER_VARIABLE: str(owner),
        "VLLM_RPC_BASE_PATH": folder,
        "TMPDIR": folder,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": log_level,
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(pool.start_timeout_s)),
        "TQDM_DISABLE": "1",
    }
    if pool.device == "cpu":
        variables["OMP_NUM_THREADS"] = str(pool.cores)
        # One small function of the sampler is compiled otherwise, at the first token: 19 s with a cold cache.
        variables["TORCHDYNAMO_DISABLE"] = "1"
        if pool.tensor_parallel == 1:
            # Lets the worker live in the engine core's process ("uni"). vLLM forbids that on the CPU unless the core
            # is in the caller's process, as it would not set OpenMP up; here the variables above do.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        else:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = _bindings(pool, first_core)
    return variables


def cores(pool: PoolConfig, first_core: int | None) -> set[int] | None:
    """The cores that the engine's processes may run on; None: all of them, as the kernel sees fit."""
    if pool.device != "cpu" or first_core is None:
        return None
    return set(range(first_core, first_core + pool.cores * pool.tensor_parallel))


def _bindings(pool: PoolConfig, first_core: int | None) -> str:
    if first_core is None:
        return "nobind"
    starts = [first_core + rank * pool.cores for rank in range(pool.tensor_parallel)]
    return "|".join(f"{start}-{start + pool.cores - 1}" for start in starts)
