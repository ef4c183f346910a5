"""A run whose holder is killed ends in order, whatever that holder was.

Linux tells a process of its parent's death once for each of the parent's threads that ends before it, not once.
"""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

CHILD = """
import asyncio, os, sys, time
from pathlib import Path
from asyncrl.runtime.attempt import on_signals
from asyncrl.runtime.guard import follow_parent

follow_parent(int(sys.argv[1]))

async def main():
    stop, notes = asyncio.Event(), []
    on_signals(stop, notes.append)
    Path(sys.argv[2]).write_text("up")
    async with asyncio.timeout(30):
        await stop.wait()
    await asyncio.sleep(0.3)
    Path(sys.argv[2]).write_text("in order, " + str(len(notes)))

asyncio.run(main())
"""

PARENT = """
import subprocess, sys, threading, os, time
for _ in range(40):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
sys.exit(subprocess.Popen([sys.executable, "-P", "-c", sys.argv[1], str(os.getpid()), sys.argv[2]]).wait())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_death_of_a_parent_with_many_threads_is_one_request_to_stop(tmp_path, number):
    said = tmp_path / "said"
    command = [sys.executable, "-P", "-c", textwrap.dedent(PARENT), textwrap.dedent(CHILD), str(said)]
    parent = subprocess.Popen(command)
    try:
        wait_for(lambda: said.exists() and said.read_text() == "up")
        (child,) = psutil.Process(parent.pid).children()
        os.kill(parent.pid, number)
        parent.wait(10)
        wait_for(lambda: not child.is_running())
        assert said.read_text() == "in order, 1"
    finally:
        parent.kill()
        parent.wait(10)


def wait_for(condition, timeout_s=40.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.05)
