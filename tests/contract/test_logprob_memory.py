"""At a vocabulary of 150,000 the logprobs of a pass never hold [tokens, vocabulary]: measured, forward and backward."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

TOKENS, VOCABULARY, WIDTH = 4096, 150_000, 32
WHOLE_BYTES = 4 * TOKENS * VOCABULARY
"""Of one [tokens, vocabulary] in float32: 2.5 GB."""

SCRIPT = textwrap.dedent(
    """
    import json, os, sys
    from pathlib import Path
    import torch
    from asyncrl.learner.logprobs import token_logprobs, token_logprobs_and_entropies

    def resident(field):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field + ":"))

    kind, dtype, tokens, vocabulary, width = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    before = resident("VmRSS")
    if kind == "whole":
        with torch.no_grad():
            torch.log_softmax(hidden @ weight.T, -1)
    elif kind == "entropy":
        logprobs, entropies = token_logprobs_and_entropies(hidden, weight, targets, 1.0)
        (logprobs.sum() + entropies.sum()).backward()
    else:
        token_logprobs(hidden, weight, targets, 1.0).sum().backward()
    print(json.dumps(resident("VmHWM") - before))

    """
)


def _peak_bytes(kind: str, dtype: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, dtype, *map(str, (TOKENS, VOCABULARY, WIDTH))],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak: int = json.loads(done.stdout)
    return peak


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["logprobs", "entropy"])
def test_tokens_by_vocabulary_is_never_there(kind: str, dtype: str) -> None:
    """A few chunks of 64 MiB, and the gradient of the weight in float32: under a sixth of one such tensor."""
    assert _peak_bytes(kind, dtype) < WHOLE_BYTES / 6


def test_the_measure_sees_it_where_it_is() -> None:
    assert _peak_bytes("whole", "float32") > WHOLE_BYTES
