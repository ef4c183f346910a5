"""The live view: one panel on a terminal, redrawn a few times a second.

What is shown is a frozen `Screen`, replaced as a whole by each fact; `draw` makes the panel of it and knows no clock
and no terminal. So the thread of rich's `Live`, which redraws so that clock and spinner move while a phase takes
long, never sees half a fact. The supervisor calls `LiveView` from one thread.
"""

from __future__ import annotations

import time

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from asyncrl.recipes.sizes import amount
from asyncrl.runtime.bars import compact, shares, sparkline
from asyncrl.runtime.bottleneck import bottleneck
from asyncrl.runtime.engines_table import engines_table
from asyncrl.runtime.facts import BufferFacts, Snapshot, StepFacts
from asyncrl.runtime.plain_view import clock, held_out_text

WAITS_WINDOW = 10
"""Snapshots over which waits are averaged: a step's wait comes in one piece, and one second of it says little."""
HISTORY = 240
"""Steps and snapshots kept for the sparklines: more than the widest of them is."""
REFRESHES_PER_S = 4.0
LABEL_WIDTH = 10
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"

ENGINES, LEARNER, REWARD, QUIET, WARN = "cyan", "magenta", "green", "bright_black", "yellow"
BUFFER_STATES = (
    ("queued", "bright_black"),
    ("leased", "cyan"),
    ("complete", "blue"),
    ("scored", "green"),
    ("batched", "magenta"),
)


class Screen(msgspec.Struct, frozen=True, kw_only=True):
    """All that the panel shows, but for the clock."""

    run: str
    bound: int
    phase: str = "starting"
    snapshots: tuple[Snapshot, ...] = ()
    """The last `WAITS_WINDOW`, newest last."""
    last_step: StepFacts | None = None
    rewards: tuple[float, ...] = ()
    engine_rates: tuple[float, ...] = ()
    learner_rates: tuple[float, ...] = ()
    step_marks: tuple[tuple[int, float], ...] = ()
    """(step, seconds) of the last steps, for the time that is left."""


def with_snapshot(screen: Screen, snapshot: Snapshot) -> Screen:
    return msgspec.structs.replace(
        screen,
        phase=snapshot.phase or screen.phase,
        snapshots=(*screen.snapshots, snapshot)[-WAITS_WINDOW:],
        engine_rates=(*screen.engine_rates, snapshot.engine_tokens_per_s)[-HISTORY:],
    )


def with_step(screen: Screen, facts: StepFacts) -> Screen:
    return msgspec.structs.replace(
        screen,
        last_step=facts,
        rewards=(*screen.rewards, facts.reward_mean)[-HISTORY:],
        learner_rates=(*screen.learner_rates, facts.learner_tokens_per_s)[-HISTORY:],
        step_marks=(*screen.step_marks, (facts.step, facts.seconds))[-20:],
    )


class LiveView:
    """Draws on `console` until it is closed; the last drawing stays. Notes and other output scroll above it."""

    def __init__(self, run: str, console: Console, *, bound: int) -> None:
        self._console = console
        self._screen = Screen(run=run, bound=bound)
        self._started = time.monotonic()
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=REFRESHES_PER_S, transient=False
        )
        self._live.start()

    def phase(self, text: str) -> None:
        if text:
            self._screen = msgspec.structs.replace(self._screen, phase=text)

    def update(self, snapshot: Snapshot) -> None:
        self._screen = with_snapshot(self._screen, snapshot)

    def step(self, facts: StepFacts) -> None:
        self._screen = with_step(self._screen, facts)

    def note(self, text: str) -> None:
        self._console.print(Text(text, style=QUIET))

    def close(self) -> None:
        """Draws once more and gives the terminal back; a second call does nothing."""
        self._live.stop()

    def _draw(self) -> RenderableType:
        return draw(self._screen, time.monotonic() - self._started, self._console.width)


def draw(screen: Screen, elapsed_s: float, width: int) -> RenderableType:
    """The panel for a terminal `width` columns wide, `elapsed_s` seconds after the launch."""
    inner = width - 4  # the panel's border and padding
    rows: list[RenderableType] = [_header(screen, elapsed_s, inner)]
    now = screen.snapshots[-1] if screen.snapshots else None
    if now is not None:
        rows += [Text(), _facts(screen, now, inner), Text(), engines_table(now.engines, now.version, inner)]
    title = Text.assemble((" asyncrl ", "bold"), ("· ", QUIET), (f"{screen.run} ", "bold"))
    return Panel(
        Group(*rows), title=title, title_align="left", border_style=QUIET, padding=(0, 1), width=width
    )


def _header(screen: Screen, elapsed_s: float, width: int) -> RenderableType:
    spinner = SPINNER[int(elapsed_s * REFRESHES_PER_S) % len(SPINNER)]
    phase = Text.assemble((f"{spinner} ", ENGINES), (screen.phase, "bold"))
    if not screen.snapshots:
        return _ends(phase, Text(clock(elapsed_s), QUIET), width)
    now = screen.snapshots[-1]
    left = eta_s(screen.step_marks, now.step, now.steps, now.seconds)
    right = Text(f"{clock(elapsed_s)}  eta {clock(left)}" if left is not None else clock(elapsed_s), QUIET)
    done = now.step / now.steps if now.steps else 0.0
    label = f"step {now.step:>{len(str(now.steps))}}/{now.steps}"
    figures = f" {done:>4.0%}  version {now.version if now.version >= 0 else '-'}"
    bar = max(10, width - len(label) - len(figures) - 2)
    filled = round(done * bar)
    steps = Text.assemble(
        (label, "bold"), "  ", ("━" * filled, REWARD), ("─" * (bar - filled), QUIET), figures
    )
    return Group(_ends(phase, right, width), steps)


def eta_s(marks: tuple[tuple[int, float], ...], step: int, steps: int, seconds: float) -> float | None:
    """Seconds left at the pace of the last steps; None before the second step and after the last one."""
    if len(marks) < 2 or step >= steps or marks[-1][0] <= marks[0][0]:
        return None
    pace = (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])
    return max(0.0, pace * (steps - marks[-1][0]) - max(0.0, seconds - marks[-1][1]))


def _facts(screen: Screen, now: Snapshot, width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL_WIDTH, style=QUIET)
    table.add_column(width=width - LABEL_WIDTH - 1)
    room = width - LABEL_WIDTH - 1
    table.add_row("reward", _reward(screen, room))
    table.add_row("tokens/s", _rates(screen, now, room))
    table.add_row("buffer", _buffer_bar(now.buffer, room))
    table.add_row("", _buffer_ends(now.buffer))
    table.add_row("memory", _memory(now.buffer))
    table.add_row("staleness", _staleness(screen, room))
    table.add_row("learner", _learner(screen, now))
    if now.held_out.wanted and room > 50:
        table.add_row("held out", Text(held_out_text(now.held_out)))
    table.add_row("waits", Text(bottleneck(screen.snapshots[0], now), WARN))
    return table


def _reward(screen: Screen, room: int) -> Text:
    if not screen.rewards:
        return Text("no step yet", QUIET)
    figure = f"{screen.rewards[-1]:6.3f}  "
    low, high = f"{min(screen.rewards):.2f} ", f" {max(screen.rewards):.2f}"
    spark = sparkline(screen.rewards, room - len(figure) - len(low) - len(high))
    return Text.assemble((figure, "bold"), (low, QUIET), (spark, REWARD), (high, QUIET))


def _rates(screen: Screen, now: Snapshot, room: int) -> Text:
    spark = max(6, (room - 38) // 2)
    return Text.assemble(
        ("engines ", QUIET),
        (f"{now.engine_tokens_per_s:>8,.0f} ", "bold"),
        (f"{sparkline(screen.engine_rates, spark, low=0.0):<{spark}}", ENGINES),
        ("  learner ", QUIET),
        (f"{now.learner_tokens_per_s:>8,.0f} ", "bold"),
        (f"{sparkline(screen.learner_rates, spark, low=0.0):<{spark}}", LEARNER),
    )


def _buffer_bar(buffer: BufferFacts, room: int) -> Group:
    counts = [(name, getattr(buffer, name), style) for name, style in BUFFER_STATES]
    bar = Text()
    for (_, _, style), cells in zip(counts, shares([count for _, count, _ in counts], room), strict=True):
        bar.append("█" * cells, style)
    roomy = room >= 75
    legend = Text(no_wrap=True, overflow="ellipsis")
    for name, count, style in counts:
        legend.append("■ " if roomy else "■", style)
        legend.append(f"{name} ", QUIET)
        legend.append(f"{count:,}  " if roomy else f"{compact(count)} ")
    return Group(bar if buffer.live else Text("─" * room, QUIET), legend)


def _buffer_ends(buffer: BufferFacts) -> Text:
    dropped, failed = sum(buffer.dropped.values()), sum(buffer.failed.values())
    return Text.assemble(
        ("groups held ", QUIET),
        f"{buffer.held_groups}/{buffer.capacity_groups}",
        ("  trained ", QUIET),
        f"{buffer.trained:,}",
        ("  dropped ", QUIET),
        (f"{dropped:,}", WARN if dropped else ""),
        ("  failed ", QUIET),
        (f"{failed:,}", "red" if failed else ""),
    )


def _memory(buffer: BufferFacts) -> Text:
    text = Text(amount(buffer.held_bytes), no_wrap=True, overflow="ellipsis")
    text.append(" of ", QUIET).append(amount(buffer.memory_bytes))
    for label, count, shown in (
        ("quarantined prompts", buffer.quarantined_prompts, f"{buffer.quarantined_prompts:,}"),
        ("restarts", buffer.recoveries, f"{buffer.recoveries:,}"),
    ):
        if count:
            text.append(f"  {label} ", QUIET)
            text.append(shown, WARN)
    return text


def _staleness(screen: Screen, room: int) -> Text:
    facts = screen.last_step
    if facts is None:
        return Text(f"bound {screen.bound} versions", QUIET)
    split = f"in flight {facts.staleness_in_flight_mean:.2f} · in queue {facts.staleness_in_queue_mean:.2f}"
    text = Text.assemble(
        ("mean ", QUIET),
        f"{facts.staleness_mean:.2f}",
        ("  max ", QUIET),
        f"{facts.staleness_max}",
        (f" of {screen.bound}", QUIET),
        (f"  {split}", QUIET),
    )
    if facts.tokens_masked and room > 70:
        text.append(f"  masked {facts.tokens_masked:,}", WARN)
    return text


def _learner(screen: Screen, now: Snapshot) -> Text:
    facts = screen.last_step
    state = Text.assemble((now.learner_state, LEARNER))
    if facts is None:
        return state
    return state + Text.assemble(
        ("  wait ", QUIET),
        f"{facts.wait_s:.1f}",
        (" s · train ", QUIET),
        f"{facts.train_s:.1f}",
        (" s · sync ", QUIET),
        f"{facts.publish_s:.2f}",
        (" s", QUIET),
    )


def _ends(left: Text, right: Text, width: int) -> Table:
    grid = Table.grid(expand=False)
    grid.add_column(width=max(1, width - right.cell_len), no_wrap=True)
    grid.add_column(width=right.cell_len, justify="right", no_wrap=True)
    grid.add_row(left, right)
    return grid
