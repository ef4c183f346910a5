"""The process of a reward model, from its start to its end, as the engine's process sees it. Called by `reward_model`; all of it
may wait, so nothing but its making and `kill` is called on an event loop.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from typing import Final

from asyncrl.generators.config import RewardModelConfig
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_messages import Frames, Load, Loaded, Message, frame

CHUNK_BYTES: Final = 2**20
_EXIT_TIMEOUT_S: Final = 5.0
"""A killed process is gone in that time; one whose socket was closed ends by itself in that time."""


class RewardChild:
    """One process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            module = "asyncrl.generators.reward_model_process"
            command = [sys.executable, "-P", "-m", module, str(theirs.fileno())]
            self._child = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.connection = ours
        self.spoke = time.monotonic()
        """When it last said something."""

    @property
    def pid(self) -> int:
        return self._child.pid

    def load(self, folder: str, config: RewardModelConfig) -> None:
        """Waits until it can read answers. Raises `FunctionError` where it cannot."""
        self.connection.settimeout(config.start_timeout_s)
        frames = Frames()
        try:
            self.connection.sendall(frame(Load(folder, config)))
            found: list[Message] = []
            # Waits for the model to be loaded; ends with the process' word, its death, or the socket's timeout.
            while not found:
                data = self.connection.recv(CHUNK_BYTES)
                if not data:
                    raise EOFError("it closed the socket")
                found = frames.add(data)
        except (EOFError, OSError) as error:
            raise FunctionError(
                f"the process of reward model {folder!r} did not come up ({self.end()} after {error!r}); what it printed above "
                "says why"
            ) from error
        (loaded,) = found
        assert isinstance(loaded, Loaded)
        if loaded.problem:
            self.end()
            raise FunctionError(loaded.problem)
        self.connection.setblocking(False)

    def kill(self) -> None:
        self._child.kill()

    def end(self) -> str:
        """Makes sure that it is gone, and says how it went."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        try:
            code = self._child.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait(_EXIT_TIMEOUT_S)
        return f"exit code {code}" if code >= 0 else f"signal {-code}"
