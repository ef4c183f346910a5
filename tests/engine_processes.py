"""Fake engines with their receivers, each a process of its own (`unit/weight_sync/engine_process.py`). Used by the tests of weight
sync.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

SCRIPT = Path(__file__).parent / "unit" / "weight_sync" / "engine_process.py"


class EngineProcess:
    """One engine process and the lines it has printed."""

    folder = Path(__file__).parent
    """Of what tests share."""

    def __init__(self, endpoint: str, engine_id: str, *faults: dict[str, object]) -> None:
        self.engine_id = engine_id
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), endpoint, engine_id, json.dumps(faults)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )

    def versions(self, count: int) -> list[tuple[int, str]]:
        """The first `count` versions it ran and its probe's answers. A silent process is killed, which ends the wait."""
        watchdog = threading.Timer(30, self.process.kill)
        watchdog.start()
        try:
            lines = [self.process.stdout.readline() for _ in range(count + 1)]
        finally:
            watchdog.cancel()
        return [(int(line.split()[1]), line.split(" probe ")[1]) for line in lines[1:]]

    def error_line(self, holding: str) -> str:
        """The next line of its stderr that holds this. A silent process is killed, which ends the wait."""
        watchdog = threading.Timer(30, self.process.kill)
        watchdog.start()
        try:
            return next((line for line in self.process.stderr if holding in line), "")
        finally:
            watchdog.cancel()

    def ended(self) -> tuple[str, str]:
        """stdout and stderr, after the process has ended by itself."""
        return self.process.communicate(timeout=30)

    def kill(self) -> tuple[str, str]:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        return ("", "") if self.process.stdout.closed else self.process.communicate(timeout=30)
