"""Starting `asyncrl launch` as a user does, as a process of its own, and looking at what it leaves."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil

from asyncrl.learner.tiny_model import character_tokenizer, new_model
from asyncrl.runtime.guard import GUARD_VARIABLE

SHARED_MEMORY = Path("/dev/shm")

RECIPE = """
[run]
name = "test"
steps = 3
folder = "{runs}"
[model]
path = "{model}"
max_context_tokens = 128
[prompts]
source = "sums:train"
prompts_per_step = 4
rollouts_per_prompt = 4
task = {{ max_terms = 6 }}
[evaluation]
source = "sums:test"
prompts = 16
[sampling]
max_new_tokens = 48
flush_tokens = 8
[[pools]]
name = "fake"
engine = "fake"
engines = 2
device = "cpu"
concurrency = 8
dtype = "float32"
[rewards]
terms = [{{ function = "sums" }}]
[learner]
device = "cpu"
learning_rate = 1e-4
tokens_per_microbatch = 1024
[weight_sync]
verify = "never"   # fake engines do not compute with the weights
"""


class Run:
    """One launch under way, or one resume: `start` says which."""

    def __init__(self, tmp_path: Path, model: Path, *overrides: str, start: str = "launch") -> None:
        recipe = tmp_path / "recipe.toml"
        self.runs = tmp_path / "runs"
        recipe.write_text(RECIPE.format(runs=self.runs, model=model))
        what = {
            "resume": ["resume", str(self.folder)],
            "launch --resume": ["launch", str(recipe), "--resume"],
        }
        command = [
            sys.executable,
            "-P",
            "-m",
            "asyncrl.runtime.cli",
            *what.get(start, ["launch", str(recipe)]),
        ]
        for override in overrides:
            command += ["--set", override]
        self.output = tmp_path / "output.txt"
        self.began = time.time()
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
            )
        self.tree = psutil.Process(self.process.pid)
        self.run_id = run_id_of(self.process)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def folder(self) -> Path:
        return self.runs / "test"

    @property
    def summary(self) -> dict:
        return msgspec.json.decode((self.folder / "summary.json").read_bytes())

    def wait_for_step(self, timeout_s: float = 120.0) -> None:
        """Until a step is done."""
        self.wait_for(r"^step +\d+/", timeout_s=timeout_s)

    def wait_for(self, line: str, times: int = 1, timeout_s: float = 120.0) -> None:
        """Until so many lines of the output match; fails with the output when the run ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while len(re.findall(line, self.text, re.MULTILINE)) < times:
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"no line {line!r}:\n{self.text}"
            time.sleep(0.1)

    def wait_until(
        self, condition: Callable[[], bool], timeout_s: float = 120.0, every_s: float = 0.2
    ) -> None:
        """Asks again and again; fails with the output when the run ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.text}"
            assert time.monotonic() < deadline, f"it did not come to be:\n{self.text}"
            time.sleep(every_s)

    def command(self, name: str, *arguments: str, expect: int = 0) -> str:
        """`asyncrl NAME RUN ...` from another process; its output."""
        command = [sys.executable, "-P", "-m", "asyncrl.runtime.cli", name, str(self.folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == expect, f"{done.returncode}: {done.stdout}{done.stderr}\n{self.text}"
        return done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        """As `asyncrl status --json` says it."""
        found: dict[str, Any] = msgspec.json.decode(self.command("status", "--json"))
        return found

    def descendants(self) -> list[psutil.Process]:
        return self.tree.children(recursive=True)

    def part(self, word: str) -> psutil.Process:
        """The process of a part, by Ray's title of it."""
        for process in self.descendants():
            try:
                if word in " ".join(process.cmdline()):
                    return process
            except psutil.NoSuchProcess:
                continue
        raise AssertionError(f"no process named {word}: {[p.cmdline() for p in self.descendants()]}")

    def engine(self, engine_id: str) -> psutil.Process | None:
        """The process that writes the log of this life of an engine, once there is one."""
        log = str(self.folder / "logs" / f"{engine_id}.log")
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/fd/1") == log and "EnginePart" in " ".join(
                    process.cmdline()
                ):
                    return process
            except (OSError, psutil.Error):
                continue
        return None

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def end(self, timeout_s: float = 120.0) -> int:
        return self.process.wait(timeout_s)

    def left_over(self, processes: list[psutil.Process], grace_s: float = 3.0) -> list[psutil.Process]:
        """Those of `processes` that still run after a short grace."""
        _, alive = psutil.wait_procs(processes, timeout=grace_s)
        return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def kill(self) -> None:
        """All of it with SIGKILL, the guard included: as a machine that goes down, or the end of a test that failed."""
        for process in [*self.descendants(), self.tree] if self.process.poll() is None else []:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)


def run_id_of(guard: subprocess.Popen[bytes], timeout_s: float = 60.0) -> str | None:
    """The id under which shared memory of this call of `asyncrl` is named. It gives it to its child, the launcher: waits until
    there is one, or until it ended without (None)."""
    deadline = time.monotonic() + timeout_s
    while guard.poll() is None:
        for child in psutil.Process(guard.pid).children():
            with contextlib.suppress(psutil.Error):
                if found := child.environ().get(GUARD_VARIABLE):
                    return found.partition(":")[2]
        assert time.monotonic() < deadline, "the guard started no launcher"
        time.sleep(0.02)
    return None


def shared_memory_of(run_id: str | None) -> list[Path]:
    """What this run has there, and no other that goes on beside it."""
    return sorted(SHARED_MEMORY.glob(f"asyncrl-{run_id}-*")) if run_id else []


VLLM = (
    "pools.0.engine=vllm",
    "pools.0.engines=1",
    "pools.0.concurrency=16",
    "pools.0.kv_cache_bytes=134217728",
)
"""Overrides for one real engine."""


@contextlib.contextmanager
def launched(tmp_path: Path, model: Path, *overrides: str, start: str = "launch") -> Iterator[Run]:
    """A run that is gone at the end, with its shared memory, however it ended."""
    run = Run(tmp_path, model, *overrides, start=start)
    try:
        yield run
    except BaseException:
        run.kill()
        for path in shared_memory_of(run.run_id):
            path.unlink(missing_ok=True)
        raise
    run.kill()
    assert "was never retrieved" not in run.text and "never awaited" not in run.text, run.text
    assert shared_memory_of(run.run_id) == []


def tiny_model(folder: Path) -> Path:
    """One that speaks of sums, with weights as they come."""
    tokenizer = character_tokenizer("0123456789+=;")
    tokenizer.save_pretrained(folder)
    new_model(tokenizer, hidden_size=64, layers=2, heads=2, max_tokens=256, seed=0).save_pretrained(folder)
    return folder
