"""The plain view, for pipes, logs and simple terminals: one line of fixed columns per step and one per phase.

ASCII only, so that a log can be grepped and cut. It keeps nothing but two snapshots. Called by the supervisor, from
one thread; `asyncrl.runtime.view.open_view` makes it.
"""

from __future__ import annotations

from rich.console import Console

from asyncrl.runtime.bottleneck import bottleneck
from asyncrl.runtime.facts import TRAINING, HeldOut, Snapshot, StepFacts

HEADER_EVERY = 25
"""Steps after which the names of the columns come again."""


class PlainView:
    """Writes to `console.file`. Also the waits over the whole of the training, when it closes."""

    def __init__(self, run: str, console: Console) -> None:
        self._console = console
        self._first: Snapshot | None = None
        self._last: Snapshot | None = None
        self._phase = ""
        self._steps_shown = 0
        self._closed = False
        self._line(f"run   {run}")

    def phase(self, text: str) -> None:
        if text and text != self._phase:
            self._phase = text
            self._line(f"phase {text}")

    def update(self, snapshot: Snapshot) -> None:
        if snapshot.phase == TRAINING:
            self._first = self._first or snapshot
            self._last = snapshot
        self.phase(snapshot.phase)

    def step(self, facts: StepFacts) -> None:
        if self._steps_shown % HEADER_EVERY == 0:
            self._line(STEP_HEADER)
        self._steps_shown += 1
        self._line(step_line(facts, self._last))

    def note(self, text: str) -> None:
        self._line(f"note  {text}")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._first is not None and self._last is not None and self._last is not self._first:
            self._line(f"waits {bottleneck(self._first, self._last)}")

    def _line(self, text: str) -> None:
        self._console.file.write(text.rstrip().encode("ascii", "replace").decode() + "\n")
        self._console.file.flush()


_COLUMNS = (
    ("step", 9),
    ("time", 7),
    ("reward", 6),
    ("loss", 8),
    ("grad", 6),
    ("tokens", 6),
    ("stale", 5),
    ("max", 3),
    ("masked", 6),
    ("gen/s", 7),
    ("learn/s", 7),
    ("wait_s", 6),
    ("train_s", 7),
    ("sync_s", 6),
    ("stall_s", 7),
)
STEP_HEADER = "      " + " ".join(f"{name:>{width}}" for name, width in _COLUMNS)


def step_line(facts: StepFacts, now: Snapshot | None) -> str:
    """One step in the columns of `STEP_HEADER`: `tokens` is the mean answer length, `stale` and `max` the staleness
    in versions, `gen/s` and `learn/s` tokens per second of each side; `-` where nothing is known."""
    cells = (
        f"{facts.step}/{now.steps}" if now else str(facts.step),
        clock(facts.seconds),
        f"{facts.reward_mean:.3f}",
        f"{facts.loss:+.4f}",
        f"{facts.grad_norm:.3f}",
        f"{facts.response_tokens_mean:.1f}",
        f"{facts.staleness_mean:.2f}",
        str(facts.staleness_max),
        str(facts.tokens_masked),
        f"{now.engine_tokens_per_s:.0f}" if now else "-",
        f"{facts.learner_tokens_per_s:.0f}",
        f"{facts.wait_s:.2f}",
        f"{facts.train_s:.2f}",
        f"{facts.publish_s:.3f}",
        f"{facts.engine_stall_s:.3f}",
    )
    return "step  " + " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def held_out_text(now: HeldOut) -> str:
    """The last result, and whether one is under way."""
    said = []
    if now.step >= 0:
        error = f" +- {now.standard_error:.3f}" if now.standard_error >= 0 else ""
        said.append(f"accuracy {now.accuracy:.3f}{error} at step {now.step}")
    if now.under_way_step >= 0:
        said.append(f"that of step {now.under_way_step} is under way")
    return "; ".join(said) or "nothing yet"


def clock(seconds: float) -> str:
    """Seconds as `m:ss`, from an hour on `h:mm:ss`; `-` if they are not a finite number of at least 0."""
    if not 0 <= seconds < float("inf"):
        return "-"
    whole = int(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
