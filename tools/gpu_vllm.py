"""The part `vllm_nccl` of `gpu_check`: vLLM's own `nccl` weight transfer engine, packed, this process the trainer.

    python tools/gpu_vllm.py vllm_nccl OUT --mb 988

Model and engine stand on one GPU if there is one: two NCCL ranks that talk through sockets then (`tests/one_gpu.py`), so the rate is
no figure of what this engine does between GPUs. It receives between start and finish, when the model cannot compute: that time is
its stall. Needs torch, transformers and vLLM (0.26 or later), nothing of asyncrl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import one_gpu
import torch
from gpu_model import config_of, random_weights

ROUNDS = 5
BUCKET_BYTES = 256 * 2**20
JOIN_S = 300.0
Weights = dict[str, torch.Tensor]


def fields_of(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Those that this version of vLLM has: it has moved the sizes of buffers from one message to another."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def opened(address: dict[str, Any]) -> Any:
    """The trainer's end of the group, rank 0: blocks until the worker has joined."""
    from vllm.distributed.weight_transfer import nccl_engine

    if hasattr(nccl_engine.NCCLWeightTransferEngine, "trainer_init"):
        return nccl_engine.NCCLWeightTransferEngine.trainer_init(address)
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init(address)


def seconds_of_update(
    llm: Any, info: dict[str, Any], weights: Weights, group: Any, workers: ThreadPoolExecutor
) -> float:
    from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer

    torch.cuda.synchronize()
    started = time.perf_counter()
    llm.start_weight_update()
    receiving = workers.submit(llm.update_weights, {"update_info": info})
    packed_nccl_broadcast_producer(
        iterator=iter(weights.items()),
        group=group,
        src=0,
        post_iter_func=lambda item: item[1],
        buffer_size_bytes=BUCKET_BYTES,
        num_buffers=2,
    )
    receiving.result(timeout=JOIN_S)
    llm.finish_weight_update()
    return time.perf_counter() - started


def start(folder: str, environment: dict[str, str]) -> Any:
    """Its processes inherit `environment`, this one gets it back as it was."""
    os.environ.update(environment, VLLM_WORKER_MULTIPROC_METHOD="spawn", VLLM_NO_USAGE_STATS="1")
    from vllm import LLM
    from vllm.config import WeightTransferConfig

    llm = LLM(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=512,
        gpu_memory_utilization=0.3,
        skip_tokenizer_init=True,
        weight_transfer_config=WeightTransferConfig(backend="nccl"),
    )
    for name in environment:
        del os.environ[name]
    return llm


def measure(folder: str, mb: int) -> dict[str, float | str]:
    import vllm
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    config = config_of(mb)
    config.save_pretrained(folder)
    llm = start(folder, one_gpu.environment(1))
    os.environ.update(one_gpu.environment(0))
    torch.cuda.set_device(0)
    weights = random_weights(config, torch.device("cuda", 0))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
    packing = {"packed": True, "packed_buffer_size_bytes": BUCKET_BYTES, "packed_num_buffers": 2}
    described = {
        "names": list(weights),
        "dtype_names": ["bfloat16"] * len(weights),
        "shapes": [list(weight.shape) for weight in weights.values()],
    }
    with ThreadPoolExecutor(1) as workers:
        init = fields_of(NCCLWeightTransferInitInfo, {**address, "rank_offset": 1, **packing})
        started = time.perf_counter()
        joining = workers.submit(llm.init_weight_transfer_engine, {"init_info": init})
        group = opened(address)
        joining.result(timeout=JOIN_S)
        group_s = time.perf_counter() - started
        info = fields_of(NCCLWeightTransferUpdateInfo, {**described, **packing})
        update: Callable[[], float] = lambda: seconds_of_update(llm, info, weights, group, workers)  # noqa: E731
        seconds = statistics.median([update() for _ in range(ROUNDS + 1)][1:])
    size = sum(weight.nbytes for weight in weights.values())
    return {
        "vllm": vllm.__version__,
        "version_mb": size / 1e6,
        "group_s": group_s,
        "stall_s": seconds,
        "gb_per_s": size / 1e9 / seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("out", type=Path)
    parser.add_argument("--mb", type=int, default=988)
    parser.add_argument("--tensors", type=int, help="not used: the model's shapes say how many")
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        args.out.write_text(json.dumps(measure(folder, args.mb)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
