"""Processes that were in a group of the `collective` transport end with status 0 and soon, whatever became of the group. They used
to be aborted: a thread that freed a group came back from torch's code when the interpreter was ending.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from engine_processes import EngineProcess

SCRIPT = Path(__file__).parent / "ending_process.py"
SOON_S = 8.0
"""For a process to end: far less than a group waits for a broadcast."""


class Side:
    """A process of `ending_process.py`."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": str(EngineProcess.folder), "PYTHONSAFEPATH": "1", "PATH": ""},
        )

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)

    def line(self) -> str:
        """The next one that it prints. A silent process is killed, which ends the wait."""
        assert self.process.stdout is not None
        watchdog = threading.Timer(60, self.process.kill)
        watchdog.start()
        try:
            return self.process.stdout.readline().strip()
        finally:
            watchdog.cancel()

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def ended(self, within_s: float = SOON_S) -> tuple[int, str]:
        """Exit status and stderr."""
        code = self.process.wait(within_s)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class Run:
    """A learner and the engines `a` and `b`, which run version 0."""

    def __init__(self, stack: ExitStack) -> None:
        self.learner = side(stack, "learner")
        endpoint = self.learner.line()
        self.engines = {name: side(stack, "engine", endpoint, name) for name in "ab"}
        self.learner.tell("a b")
        self.learner.tell("send 0")
        assert self.learner.line() == "committed 2"
        assert [engine.line() for engine in self.engines.values()] == ["version 0"] * 2


def side(stack: ExitStack, *arguments: str) -> Side:
    made = Side(*arguments)
    stack.callback(made.kill)
    return made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def check_ends(*sides: Side) -> None:
    for each in sides:
        each.end()
    for each in sides:
        code, errors = each.ended()
        assert code == 0, errors
        assert "terminate called" not in errors


def test_after_a_clean_close(stack):
    run = Run(stack)
    check_ends(run.learner, *run.engines.values())


def test_after_an_engine_stood_still_mid_bucket(stack):
    run = Run(stack)
    run.learner.tell("half 1")
    assert run.learner.line() == "half"
    run.engines["b"].process.send_signal(signal.SIGSTOP)
    run.learner.tell("rest")
    assert run.learner.line() == "aborted"
    check_ends(run.learner, run.engines["a"])


def test_after_an_engine_was_killed_mid_bucket(stack):
    run = Run(stack)
    run.learner.tell("half 1")
    assert run.learner.line() == "half"
    run.engines["b"].process.kill()
    run.learner.tell("rest")
    assert run.learner.line() == "aborted"
    run.learner.tell("send 1")
    assert run.learner.line() == "committed 1"
    check_ends(run.learner, run.engines["a"])


def test_an_engine_whose_learner_dies_mid_bucket(stack):
    run = Run(stack)
    run.learner.tell("half 1")
    assert run.learner.line() == "half"
    run.learner.process.kill()
    check_ends(*run.engines.values())


def test_while_a_group_is_made_the_store_answers_and_its_thread_is_waited_for(stack):
    lone = side(stack, "meeting")
    assert float(lone.line()) < 1.5, "its wait for a member that does not come holds nobody else's question"
    check_ends(lone)
