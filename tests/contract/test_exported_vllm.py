"""vLLM loads an exported checkpoint as any model folder: its logprobs are those of the learner that wrote the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny

DEADLINE_S = 280
TOKENS = [3, 10, 4, 11, 7, 0, 12, 30, 5]

LEARN = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import torch
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.export import export_model
    from asyncrl.learner.step import Learner

    model, checkpoint, out, tokens = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    config = LearnerConfig(device="cpu")
    learner = Learner(config, model, 1.0)
    torch.manual_seed(1)
    with torch.no_grad():  # as steps would move them
        for parameter in learner.trained["policy"].parameters.values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    learner.checkpoint(checkpoint)
    assert learner.checkpoint_finished(60) == checkpoint
    print(json.dumps(learner.logprobs(tokens)))
    learner.close()
    export_model(config, model, checkpoint, out)
    sys.stdout.flush()
    os._exit(0)
    """
)

SERVE = textwrap.dedent(
    """
    import json, sys
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        tokens = json.loads(sys.argv[2])
        llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, enforce_eager=True, max_num_seqs=4)
        (out,) = llm.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=1, prompt_logprobs=0))
        logprobs = [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], tokens[1:])]
        print(json.dumps(logprobs), flush=True)
    """
)


def _run(script: str, *arguments: str) -> list[float]:
    """The last line that the script prints."""
    environment = {
        **os.environ,
        "PYTHONSAFEPATH": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
def test_vllm_serves_the_exported_model(tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", tied=True)
    out = tmp_path / "out"
    want = _run(LEARN, str(base), str(tmp_path / "step-1"), str(out), json.dumps(TOKENS))
    assert _run(SERVE, str(out), json.dumps(TOKENS)) == pytest.approx(want, abs=1e-3)
