"""Loading on several ranks: together they hold what from_pretrained loads, bit for bit, and each no more than its share."""

from __future__ import annotations

import textwrap
from pathlib import Path

import msgspec
import pytest
import torch
from rank_processes import run_ranks
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 51,  # odd: the last shard of a replica is smaller, or empty
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = {
    "tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "experts": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
}

WHOLE = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from asyncrl.learner.distributed import init_distributed, leave_distributed
    from asyncrl.learner.model import checkpoint_parameters, load_policy
    from asyncrl.learner.sharding_config import ShardingConfig

    folder, out, rank, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    for address, case in zip(sys.argv[5].split(","), sys.argv[6:], strict=True):
        kind, replicas = case.split(":")
        mesh = init_distributed(rank, ranks, address, "cpu", 60.0, replicas=int(replicas))
        policy = load_policy(f"{folder}/{kind}", mesh, "float32", sharding=ShardingConfig(replicas=int(replicas)))
        whole = {name: p.detach().full_tensor() for name, p in checkpoint_parameters(policy).items()}
        if rank == 0:
            save_file(whole, str(out / case))
        leave_distributed()
    os._exit(0)  # as Ray ends its workers
    """
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind, more in KINDS.items():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **more))
        model.to(torch.bfloat16).save_pretrained(folder / kind, max_shard_size="30KB")
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_ranks_together_hold_what_was_saved(folder: Path, tmp_path: Path, ranks: int) -> None:
    cases = [f"{kind}:{replicas}" for kind in KINDS for replicas in ((1, 2) if ranks == 4 else (1,))]
    run_ranks(WHOLE, folder, tmp_path / "out", ranks, *cases)
    for case in cases:
        kind = case.partition(":")[0]
        want = AutoModelForCausalLM.from_pretrained(folder / kind, dtype=torch.float32)
        found = load_file(tmp_path / "out" / case)
        assert found.keys() == {name for name, _ in want.named_parameters()}
        for name, parameter in want.named_parameters():
            assert torch.equal(found[name], parameter), (case, name)


MEMORY = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    import msgspec, torch
    from asyncrl.learner import attention
    from asyncrl.learner.distributed import init_distributed
    from asyncrl.learner.loading import build, fill
    from asyncrl.learner.sharding import decoder_layers, shard

    def load(folder):
        blueprint = build(folder, attention.NAME)
        shard(blueprint.model, decoder_layers(blueprint.model), mesh, "float32")
        fill(blueprint, torch.device("cpu"))
        return blueprint.model

    def resident(field):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field + ":"))

    folder, out, rank, ranks = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    mesh = init_distributed(rank, ranks, sys.argv[5], "cpu", 60.0)
    load(f"{folder}/small")  # whatever is imported and set up once
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    model = load(f"{folder}/large")
    peak = resident("VmHWM") - before
    bytes_of_all = sum(p.numel() * p.element_size() for p in model.parameters())
    (out / f"told-{rank}").write_bytes(msgspec.json.encode([peak, bytes_of_all]))
    os._exit(0)  # as Ray ends its workers
    """
)


def test_a_rank_holds_its_share_of_the_model_and_never_more(tmp_path: Path) -> None:
    sizes = dict(vocab_size=8000, hidden_size=512, intermediate_size=2048, num_hidden_layers=10)
    for name, more in {"small": {}, "large": sizes}.items():
        config = AutoConfig.for_model(**{**SIZES, **KINDS["untied"], **more})
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
    shares = {}
    for ranks in (1, 2):
        out = tmp_path / f"out-{ranks}"
        run_ranks(MEMORY, tmp_path, out, ranks)
        told = [msgspec.json.decode((out / f"told-{rank}").read_bytes()) for rank in range(ranks)]
        assert all(whole > 180e6 for _, whole in told)
        shares[ranks] = [peak / whole for peak, whole in told]
    # Beside its share a rank has the tensor that it is reading, and what malloc does not give back at once.
    (whole,) = shares[1]
    assert 0.9 < whole < 1.3, shares
    assert all(0.45 < share < 0.7 and share < 0.6 * whole for share in shares[2]), shares
