"""Where a step's time goes. Called by everything that makes up a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

NAMES = ("forward_s", "backward_s", "optimizer_s", "gather_s")


class Stopwatch:
    """Sums of seconds by name, since they were last taken. On CUDA it waits for the device before it looks at the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(NAMES, 0.0)

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self._seconds[name] += self.now() - start

    def take(self) -> dict[str, float]:
        """The sums so far, which begin anew."""
        taken, self._seconds = self._seconds, dict.fromkeys(NAMES, 0.0)
        return taken
