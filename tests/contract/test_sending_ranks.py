"""What 1, 2 and 4 ranks send is each parameter's `full_tensor()`, cast, bit for bit: whoever sends, however it is cut, and in two
buckets of memory."""

from __future__ import annotations

import textwrap
from pathlib import Path

import msgspec
import pytest
from batches import write_folder
from rank_processes import run_ranks
from sending_cases import SENDS

from asyncrl.learner.tiny_model import character_tokenizer, new_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sending")
    write_folder(folder)
    return folder


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_the_bytes_are_those_of_the_full_tensors(
    folder: Path, tmp_path: Path, ranks: int, replicas: int
) -> None:
    run_ranks(SENDS, folder, tmp_path / "out", ranks, str(replicas), "cpu", groups=1)
    wrong = [msgspec.json.decode((tmp_path / "out" / f"wrong-{rank}").read_bytes()) for rank in range(ranks)]
    assert wrong == [[]] * ranks


MEMORY = textwrap.dedent(
    """
    import os, sys, time
    from pathlib import Path
    import msgspec, torch
    from asyncrl.learner import collecting
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.step import Learner
    from asyncrl.weight_sync.pipeline import Pipeline

    def resident(field):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field + ":"))

    folder, out, rank, ranks, address = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    bucket_bytes, kind = int(sys.argv[6]), sys.argv[7]
    collecting.PACKED_BYTES = 2**22
    learner = Learner(LearnerConfig(device="cpu", ranks=ranks, start_timeout_s=60, step_timeout_s=60), folder, 0.9, rank, ranks, address)
    plan = learner.plan(bucket_bytes, "bfloat16" if kind == "cast" else None)
    place = torch.zeros(bucket_bytes, dtype=torch.uint8)  # in the place of shared memory

    def write(pieces):
        for values in pieces:
            place[: values.numel() * values.element_size()].view(values.dtype).copy_(values)

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = resident("VmRSS")
    if kind == "whole":
        for _, parameter in learner._policy.named_parameters():
            parameter.detach().full_tensor()
    else:
        with Pipeline(write) as pipeline:
            for bucket in plan.buckets:
                pipeline.put(learner.gather(plan, bucket), time.monotonic() + 60)
            pipeline.finish(time.monotonic() + 60)
    facts = {"peak": resident("VmHWM") - before, "total": plan.total_bytes, "buckets": len(plan.buckets)}
    (out / f"facts-{rank}").write_bytes(msgspec.json.encode(facts))
    learner.close()
    os._exit(0)  # as above
    """
)
BUCKET_BYTES = 8 * 2**20
SLACK_BYTES = 6 * 2**20
"""4 MiB of packing, gloo's own, and what the allocator keeps."""


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding of 64 MiB, eight times the bucket."""
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    model = new_model(tokenizer, hidden_size=256, layers=2, heads=4, max_tokens=128, seed=3)
    model.resize_token_embeddings(65_536)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["as it is", "cast"])
def test_a_send_takes_two_buckets_of_memory(wide_folder: Path, tmp_path: Path, kind: str) -> None:
    run_ranks(MEMORY, wide_folder, tmp_path / "out", 2, str(BUCKET_BYTES), kind, groups=1)
    facts = [msgspec.json.decode((tmp_path / "out" / f"facts-{rank}").read_bytes()) for rank in range(2)]
    assert facts[0]["buckets"] >= 5 and facts[0]["total"] > 4 * BUCKET_BYTES
    assert facts[0]["peak"] < 2 * BUCKET_BYTES + SLACK_BYTES
    assert facts[1]["peak"] < SLACK_BYTES


def test_the_measure_sees_a_whole_tensor(wide_folder: Path, tmp_path: Path) -> None:
    run_ranks(MEMORY, wide_folder, tmp_path / "out", 2, str(BUCKET_BYTES), "whole", groups=1)
    for rank in range(2):
        facts = msgspec.json.decode((tmp_path / "out" / f"facts-{rank}").read_bytes())
        assert facts["peak"] > 8 * BUCKET_BYTES
