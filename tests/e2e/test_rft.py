"""`asyncrl rft`, as a user types it: killed while it samples, and taken up again; the engines are fake ones."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import msgspec
import psutil
import pyarrow.parquet as parquet
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.buffer.reading import read_log, rollouts_table
from tests.e2e.runs import RECIPE, run_id_of, shared_memory_of, tiny_model

RFT = """
[rft]
out = "{out}"
prompts = 12
rollouts_per_prompt = 4
max_per_prompt = 2
steps = 2
pairs_per_step = 4
"""
REWARD = "def reward(answer_text, payload):\n    return float(len(answer_text) % 3 > 0)\n"
SLOW = (
    "--set",
    "pools.0.fake.step_s=0.02",
    "--set",
    "pools.0.fake.lengths={ median_tokens = 20, sigma = 0.4 }",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def rft(tmp_path, *arguments):
    """A call under way, gone at the end with all that it started."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "asyncrl.runtime.cli",
        "rft",
        str(tmp_path / "recipe.toml"),
        *arguments,
    ]
    with (tmp_path / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=tmp_path, start_new_session=True
        )
    tree = psutil.Process(process.pid)
    try:
        run_id = run_id_of(process)
        yield process
    finally:
        for left in [*tree.children(recursive=True), tree] if process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(10)
    assert run_id is not None and shared_memory_of(run_id) == []


def test_killed_while_it_samples_and_taken_up_again(tmp_path, model):
    out, runs = tmp_path / "made", tmp_path / "runs"
    (tmp_path / "recipe.toml").write_text(RECIPE.format(runs=runs, model=model) + RFT.format(out=out))
    (tmp_path / "odd.py").write_text(REWARD)
    own = ("--set", 'rewards.terms=[{ function = "odd:reward" }]', *SLOW)
    states = runs / "test-rft" / "round-1" / "rollouts" / "0" / "states-000001.arrows"

    def output():
        return (tmp_path / "output.txt").read_text(errors="replace")

    def scored():
        return (
            {}
            if not states.exists()
            else {
                row["rollout_id"]: row["tokens"]
                for row in rollouts_table(read_log(states.parents[1])).to_pylist()
                if row["reward"] is not None
            }
        )

    with rft(tmp_path, *own) as process:
        deadline = time.monotonic() + 100
        while not scored():
            assert process.poll() is None and time.monotonic() < deadline, output()
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=45)
        assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
    before = scored()
    assert 0 < len(before) < 48
    with rft(tmp_path, *own) as process:
        assert process.wait(150) == 0, output()
    assert "goes on in" in output()
    samples = parquet.read_table(runs / "test-rft" / "round-1" / "samples.parquet").to_pylist()
    assert len(samples) == len({s["rollout_id"] for s in samples}) == 48
    assert before.items() <= {s["rollout_id"]: s["tokens"] for s in samples}.items()
    check_made(runs / "test-rft", out, model)


def check_made(folder, out, model):
    summary = msgspec.json.decode((folder / "summary.json").read_bytes())
    (done,) = summary["rounds"]
    kept = parquet.read_table(folder / "round-1" / "kept.parquet").to_pylist()
    assert len(kept) == done["kept"] > 0 and (done["samples"], done["steps"]) == (48, 2)
    assert all(row["reward"] == 1.0 and row["finish_reason"] == "stop" for row in kept)
    assert done["accuracy"] is not None and summary["accuracy"] is not None
    made, before = (AutoModelForCausalLM.from_pretrained(path) for path in (out, model))
    assert any((a != b).any() for a, b in zip(made.parameters(), before.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).decode([1, 2]) is not None
