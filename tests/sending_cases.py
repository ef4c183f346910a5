"""One learner rank that sends in every way that there is, and compares with the full tensors. A script for `run_ranks`:

FOLDER OUT RANK RANKS ADDRESS REPLICAS cpu|cuda        writes what was wrong to OUT/wrong-RANK, as JSON
"""

from __future__ import annotations

import textwrap

SENDS = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from one_gpu import environment
    device = sys.argv[7]
    if device == "cuda":
        os.environ |= environment(int(sys.argv[3]))  # before anything uses CUDA
    import msgspec, torch
    from safetensors.torch import save_file
    from asyncrl.learner import collecting
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.sharding_config import ShardingConfig
    from asyncrl.learner.step import Learner
    from gathered import write_version
    from asyncrl.weight_sync.pieces import whole

    folder, out, rank, ranks, address = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    config = LearnerConfig(
        device=device, ranks=ranks, sharding=ShardingConfig(replicas=int(sys.argv[6])), start_timeout_s=60, step_timeout_s=60,
    )
    learner = Learner(config, folder, 0.9, rank, ranks, address)
    masters = {n.removeprefix("lm."): p.detach().full_tensor() for n, p in learner._policy.named_parameters()}
    wrong, versions = [], {}
    for wire in (None, "bfloat16"):
        for senders in ("one", "all"):
            for bucket_bytes, large, packed in ((20_000, 4096, 9000), (5000, 500, 700), (2**20, 2**20, 2**20)):
                collecting.LARGE_BYTES, collecting.PACKED_BYTES = large, packed
                plan = learner.plan(bucket_bytes, wire, senders)
                for again in range(2):  # buffers are used again
                    version = torch.zeros(plan.total_bytes, dtype=torch.uint8)
                    sent = write_version(version, learner, plan)
                    pieces = sum(len(bucket.pieces) for bucket in plan.of(rank))
                    if sent != pieces:
                        wrong.append(f"{senders} {bucket_bytes}: {sent} of {pieces} pieces")
                # What the ranks sent, together: no two write the same byte.
                together = version.to(device)
                torch.distributed.all_reduce(together)
                version = together.cpu()
                if {spec.name for spec in plan.tensors} != set(masters):
                    wrong.append("names")
                for spec in plan.tensors:
                    want = masters[spec.name].to(getattr(torch, spec.dtype)).cpu()
                    if not torch.equal(whole(version, spec), want):
                        wrong.append(f"{senders} {wire} {bucket_bytes}: {spec.name}")
    (out / f"wrong-{rank}").write_bytes(msgspec.json.encode(wrong))
    learner.close()
    os._exit(0)  # past a thread of torch's that can abort the process on the way out of the interpreter
    """
)
