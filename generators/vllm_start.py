"""Starts and ends vLLM's processes: from a pool to a running `AsyncLLM`. Called by `vllm_core`, in a thread of its own.

Importing this module does not import vLLM; `launch` does, in the environment that its processes are to have.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from asyncrl.generators import vllm_settings
from asyncrl.generators.child_processes import bound_to, environment_for_children
from asyncrl.generators.config import PoolConfig
from asyncrl.generators.vllm_stream import CoreStats

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

SHUTDOWN_TIMEOUT_S: Final = 5.0
_START = threading.Lock()
"""Held while `os.environ` is changed for the children of one engine."""


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's processes, before they are there."""

    engine_id: str
    pool: PoolConfig
    model_path: str
    max_model_len: int
    seed: int
    first_core: int | None
    prefix_cache: bool
    whole_prompts: bool
    adapter_rank: int
    """Versions are adapters of this rank; 0: whole models."""
    float8: bool = False
    """Linear weights come, and are held, in float8."""
    folder: str
    """For sockets and other short-lived files."""


def launch(wanted: Launch, stats: CoreStats) -> AsyncLLM:
    """Start the processes and build the model with dummy weights; the engine core then tells `stats` of each step."""
    began = time.perf_counter()
    variables = vllm_settings.environment(
        wanted.pool,
        wanted.first_core,
        owner=os.getpid(),
        folder=wanted.folder,
        log_level=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    )
    cores = vllm_settings.cores(wanted.pool, wanted.first_core)
    with _START, environment_for_children(variables), bound_to(cores):
        from vllm.v1.engine.async_llm import AsyncLLM

        config = _config(wanted)
        imported = time.perf_counter()
        loggers: list[Any] = [stats.logger]
        llm = AsyncLLM.from_vllm_config(config, stat_loggers=loggers, disable_log_stats=True)
        _listen_to(llm, stats)
    times = (imported - began, time.perf_counter() - imported)
    logger.info("engine=%s started import_s=%.1f processes_s=%.1f", wanted.engine_id, *times)
    return llm


def _listen_to(llm: AsyncLLM, stats: CoreStats) -> None:
    # A logger makes the core tell its KV use with each step, and every preemption with the request's next token. The
    # statistics that vLLM would make of every token in this process, and its Prometheus counters, cost 10 us a token:
    # off, before its output handler starts. In their place stands a look at each output's events, of which most have none.
    manager: Any = stats
    llm.logger_manager = manager
    llm.log_stats = llm.output_processor.log_stats = False
    processor: Any = llm.output_processor
    processor._update_stats_from_output = stats.count_preemptions
    cache = llm.vllm_config.cache_config
    stats.kv_capacity_tokens = (cache.num_gpu_blocks or 0) * cache.block_size


def _config(wanted: Launch) -> VllmConfig:
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    if wanted.pool.device == "cpu":
        _inspect_here(wanted.model_path)
    chosen = vllm_settings.arguments(
        wanted.pool,
        wanted.model_path,
        wanted.max_model_len,
        wanted.seed,
        prefix_cache=wanted.prefix_cache,
        whole_prompts=wanted.whole_prompts,
        adapter_rank=wanted.adapter_rank,
        float8=wanted.float8,
    )
    transfer = WeightTransferConfig(backend=vllm_settings.WEIGHT_BACKEND)
    return AsyncEngineArgs(**chosen, weight_transfer_config=transfer).create_engine_config()


def adapter_request() -> LoRARequest:
    """What makes a request run with the adapter that `asyncrl.weight_sync.vllm_adapter` keeps in the workers."""
    from vllm.lora.request import LoRARequest

    name = "asyncrl"
    # The path is never read: the adapter is there under its id from the first version on.
    return LoRARequest(lora_name=name, lora_int_id=vllm_settings.ADAPTER_ID, lora_path=f"/{name}")


def _inspect_here(model_path: str) -> None:
    """Have vLLM look at the model's class in this process. It would start one of its own for that (8 s), so as not to
    initialise CUDA here: no matter on the CPU."""
    from vllm.model_executor.models import ModelRegistry

    config = Path(model_path) / "config.json"
    if not config.is_file():
        return
    for name in json.loads(config.read_text(encoding="utf-8")).get("architectures") or []:
        if name in ModelRegistry.models:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def stop(llm: AsyncLLM, pool: PoolConfig) -> None:
    """End every process of the engine."""
    # A core without devices and workers has nothing to put in order, and takes 3 s for it; vLLM warns of the kill.
    alone = pool.device == "cpu" and pool.tensor_parallel == 1
    if alone:
        logging.getLogger("vllm.v1.utils").setLevel(logging.ERROR)
    processes = list(getattr(llm.engine_core.resources.engine_manager, "processes", ()))
    llm.shutdown(timeout=0.0 if alone else SHUTDOWN_TIMEOUT_S)
    for process in processes:
        process.join(SHUTDOWN_TIMEOUT_S)
