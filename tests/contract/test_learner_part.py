"""The learner's process with engines that come while it is busy: they run the present version before it is free again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

from asyncrl.learner.tiny_model import character_tokenizer, new_model

SCRIPT = textwrap.dedent(
    """
    import json, os, sys, time
    from functools import partial
    from pathlib import Path
    from buffers import buffer_service
    from engine_threads import Engines
    from asyncrl.buffer.keys import make_keys, secure_client
    from asyncrl.recipes import load_recipe
    from asyncrl.runtime.learner_part import LearnerPart
    from asyncrl.runtime.placement import free_port

    folder = Path(sys.argv[1])
    recipe = load_recipe(folder / "recipe.toml", [])
    part = LearnerPart(recipe, str(folder), 0, f"127.0.0.1:{free_port('127.0.0.1')}", f"test-{os.getpid()}", "127.0.0.1")
    _, keys = make_keys(folder / "keys")
    engines = Engines(part.start(), partial(secure_client, keys=keys))
    with buffer_service(folder) as (buffer, _):
        part.meet(buffer.address)
        seen = [sorted(part.publish(0).engines)]
        began = time.monotonic()
        engines.start("late")
        engines.do(engines.wait_for(0, timeout_s=20))  # this thread, the learner's, does nothing meanwhile
        waited_s = time.monotonic() - began
        report = part.publish(1)
        seen += [[report.engines["late"].outcome, engines.engines["late"].stats().version]]
        seen += [[sorted(each.engines) for each in part._welcomer.take_reports()]]
        part.close()
        engines.close()
    (folder / "told").write_text(json.dumps({"seen": seen, "waited_s": waited_s}))
    os._exit(0)  # as Ray ends its workers
    """
)

RECIPE = """
[run]
name = "test"
steps = 1
[model]
path = "{folder}"
max_context_tokens = 64
[prompts]
source = "sums:train"
[sampling]
max_new_tokens = 16
[[pools]]
name = "fake"
engine = "fake"
device = "cpu"
dtype = "float32"
[rewards]
terms = [{{ function = "sums" }}]
[learner]
device = "cpu"
[weight_sync]
verify = "never"
max_lag_versions = 0
"""


def test_an_engine_that_comes_while_the_learner_is_busy_is_welcomed(tmp_path: Path) -> None:
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(tmp_path)
    new_model(tokenizer, hidden_size=32, layers=1, heads=1, max_tokens=64, seed=3).save_pretrained(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE.format(folder=tmp_path))
    (tmp_path / "logs").mkdir()
    seen = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert seen.returncode == 0, f"{seen.stderr[-3000:]} (more in {tmp_path}/logs)"
    told = json.loads((tmp_path / "told").read_text())
    assert told["seen"] == [[], ["applied", 1], [["late"]]]
    assert told["waited_s"] < 5.0
