"""A writer of checkpoints is killed at random moments, many times: what has a checkpoint's name is always whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROUNDS = 60
DEADLINE_S = 240

SCRIPT = textwrap.dedent(
    """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    from safetensors.torch import load_file
    from asyncrl.learner.checkpoint import Checkpoints
    from asyncrl.learner.checkpoint_folder import check, checkpoints, newest, partial_of, remove, step_of
    from asyncrl.learner.trained import Schedule, Trained

    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)

    module = torch.nn.Linear(512, 256)  # 1.5 MB with its moments
    trained = Trained(module, dict(module.named_parameters()), torch.optim.AdamW(module.parameters()), Schedule(1.0, 0, 0))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trained.optimizer.step()  # before the forks: its first call imports for a second

    def write_for_ever(first, report):
        checkpoints_ = Checkpoints({"policy": trained}, 0, 1, torch.device("cpu"), 60.0)
        step = first
        while True:  # ends with the process, when it is killed
            for tensor in (*module.parameters(), *(s["exp_avg"] for s in trained.optimizer.state.values())):
                tensor.data.fill_(step)
            trained.steps_taken = step
            checkpoints_.write(folder / f"step-{step}", {"step": step})
            for old in checkpoints(folder)[3:]:
                remove(old)
            assert checkpoints_.finished(60) == folder / f"step-{step}"
            os.write(report, step.to_bytes(4, "little"))
            step += 1

    def killed_after(seconds, first):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(first, write)
            finally:
                os._exit(1)
        os.close(write)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status
        reports = os.read(read, 1 << 20)
        os.close(read)
        return int.from_bytes(reports[-4:], "little") if reports else first - 1

    random.seed(int(sys.argv[3]))
    last, halves, steps = 0, 0, []
    for _ in range(rounds):
        told = killed_after(random.uniform(0.005, 0.12), last + 1)
        found = newest(folder)
        step = step_of(found) if found else 0
        assert step in (told, told + 1), (step, told)  # what was told is there; the last may be there and not yet told
        for path in checkpoints(folder):
            manifest = check(path)
            number = step_of(path)
            assert manifest.steps_taken == {"policy": number} and manifest.extra == {"step": number}
            state = load_file(path / "rank-00000.safetensors")
            assert (state["policy/weight/weight"] == number).all() and (state["policy/exp_avg/bias"] == number).all()
        halves += partial_of(folder / f"step-{step + 1}").exists()
        steps.append(step - last)
        last = step
    print(json.dumps({"halves": halves, "steps": steps}))
    """
)


def test_a_killed_writer_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    seed = str(int.from_bytes(os.urandom(4), "little"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "checkpoints"), str(ROUNDS), seed],
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert sum(outcome["steps"]) > ROUNDS / 2, "the writer hardly wrote anything"
    assert outcome["halves"] > 0, f"seed {seed}: no round was cut short in the middle of a checkpoint"
