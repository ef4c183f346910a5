"""What a run shows while it goes on: the `View` protocol, and the choice between the live and the plain view.

The supervisor calls a view from one thread; views only show, they never decide and never wait.
"""

from __future__ import annotations

from typing import Protocol

from rich.console import Console

from asyncrl.runtime.facts import Snapshot, StepFacts
from asyncrl.runtime.live_view import LiveView
from asyncrl.runtime.plain_view import PlainView


class View(Protocol):
    """Shows a run. `close` ends it, leaves the terminal as it was, and may be called twice."""

    def phase(self, text: str) -> None: ...

    def update(self, snapshot: Snapshot) -> None:
        """The run now. A phase other than the one shown is shown, as by `phase`."""

    def step(self, facts: StepFacts) -> None: ...

    def note(self, text: str) -> None:
        """One line that stays, such as an evaluation's result or a warning."""

    def close(self) -> None: ...


def open_view(run: str, console: Console, *, bound: int, plain: bool = False) -> View:
    """The live view if `console` is a terminal that can show it and `plain` is not asked for; else the plain view.

    `run` is the run's name, `bound` its `max_staleness_versions`. A terminal that is dumb or not UTF-8 is plain.
    """
    unicode = console.encoding.lower().replace("-", "") == "utf8"
    if plain or not console.is_terminal or console.is_dumb_terminal or not unicode:
        return PlainView(run, console)
    return LiveView(run, console, bound=bound)
