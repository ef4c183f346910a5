"""The part `engine` of `gpu_check`: a real vLLM engine on this GPU takes versions of one model over `ipc` and over `shm`.

    python tools/gpu_engine.py engine OUT --mb 988

Each round writes a version, stages it while the engine runs and applies it. The stall is from the request to pause to the
resumption; a decode step is that of one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from device_peers import write
from gpu_model import config_of, random_weights
from tiny import character_tokenizer

from asyncrl.generators.config import PoolConfig
from asyncrl.generators.engine import GenerationRequest
from asyncrl.generators.vllm_engine import VLLMEngine
from asyncrl.weight_sync.cuda_memory import device_uuid
from asyncrl.weight_sync.device_memory import DeviceSlots, slots_on
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import Plan, make_plan
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer, SharedFile

ROUNDS = 5
BUCKET_BYTES = 256 * 2**20
MAX_TOKENS = 512
Weights = dict[str, torch.Tensor]


def write_shared(slots: Slots, plan: Plan, version: int, weights: Weights) -> Offer:
    slot = slots.next()
    sums = tuple(slot.fill(bucket, cut(plan, bucket, weights)) for bucket in plan.buckets)
    slots.committed()
    return Offer(version=version, source=SharedFile(path=str(slot.path)), plan=plan, checksums=sums)


async def step_s(engine: VLLMEngine) -> float:
    """Of one stream: seconds from its first token to its last, by token."""
    request = GenerationRequest(
        request_id="steps", tokens=[1, 2, 3], max_new_tokens=200, temperature=1.0, stop_token_ids=()
    )
    marks = [time.perf_counter() async for _ in engine.generate(request)]
    return (marks[-1] - marks[0]) / 199


async def rounds(
    engine: VLLMEngine, name: str, first: int, written: Callable[[int], Offer]
) -> dict[str, float]:
    seen: dict[str, list[float]] = {"write_s": [], "stage_s": [], "stall_s": []}
    for version in range(first, first + ROUNDS + 1):
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        offer = written(version)
        marks.append(time.perf_counter())
        await engine.stage(offer)
        marks.append(time.perf_counter())
        seen["stall_s"].append(await engine.apply(offer))
        seen["write_s"].append(marks[1] - marks[0])
        seen["stage_s"].append(marks[2] - marks[1])
    return {f"{name}_{what}": statistics.median(values[1:]) for what, values in seen.items()}


async def measure(folder: str, mb: int) -> dict[str, float | str]:
    gpu = torch.device("cuda", 0)
    config = config_of(mb)
    config.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    weights = random_weights(config, gpu)
    plan = make_plan([(name, "bfloat16", tuple(w.shape)) for name, w in weights.items()], BUCKET_BYTES)
    pool = PoolConfig(name="check", device="cuda", memory_fraction=0.3, dtype="bfloat16")
    engine = VLLMEngine(pool, folder, "check", MAX_TOKENS)
    with contextlib.ExitStack() as stack:
        try:
            await engine.start()
            if await engine.gpus() != (device_uuid(gpu),):
                raise RuntimeError(
                    f"the engine is on {await engine.gpus()}, this process on {device_uuid(gpu)}"
                )
            device: DeviceSlots = stack.enter_context(contextlib.closing(slots_on(gpu, plan)))
            shared: Slots = stack.enter_context(contextlib.closing(Slots(f"check-{os.getpid()}", plan)))
            over_ipc = await rounds(engine, "ipc", 0, lambda v: write(device, plan, v, weights))
            over_shm = await rounds(engine, "shm", 100, lambda v: write_shared(shared, plan, v, weights))
            step = await step_s(engine)
        finally:
            await engine.shutdown()
    stalls = {
        f"{name}_stall_steps": figures[f"{name}_stall_s"] / step
        for name, figures in (("ipc", over_ipc), ("shm", over_shm))
    }
    return {"version_mb": plan.total_bytes / 1e6, "decode_step_s": step, **over_ipc, **over_shm, **stalls}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part")
    parser.add_argument("out", type=Path)
    parser.add_argument("--mb", type=int, default=988)
    parser.add_argument("--tensors", type=int, help="not used: the model's shapes say how many")
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        args.out.write_text(json.dumps(asyncio.run(measure(folder, args.mb))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
