"""Shows a `Summary`: a table on a terminal, the same lines without decoration elsewhere. Pure but for `show_summary`."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from asyncrl.recipes.sizes import amount
from asyncrl.runtime.plain_view import clock
from asyncrl.runtime.summary import Accuracy, BufferUse, Spread, Summary

LABEL_WIDTH = 20
NOT_MEASURED = "not measured"
QUIET, GOOD, BAD = "bright_black", "green", "red"


class Row(NamedTuple):
    label: str
    text: str
    style: str = ""


def show_summary(summary: Summary, console: Console) -> None:
    """Writes the summary to `console`."""
    groups = summary_rows(summary)
    if not console.is_terminal:
        for group in groups:
            for row in group:
                console.file.write(f"{row.label:<{LABEL_WIDTH}} {row.text}\n")
        console.file.flush()
        return
    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL_WIDTH, style=QUIET)
    table.add_column(ratio=1)
    for index, group in enumerate(groups):
        if index:
            table.add_row("", "")
        for row in group:
            table.add_row(row.label, Text(row.text, row.style))
    title = Text.assemble((" asyncrl ", "bold"), ("· ", QUIET), (f"{summary.run.name} ", "bold"))
    width = min(console.width, 110)
    console.print(
        Panel(table, title=title, title_align="left", border_style=QUIET, padding=(0, 1), width=width)
    )


def summary_rows(summary: Summary) -> list[list[Row]]:
    """The lines of the table in groups: the run, what it learned, its rollouts, its soundness, its speed, the rest."""
    return [
        _run(summary),
        _learned(summary),
        _rollouts(summary),
        _sound(summary),
        _speed(summary),
        _rest(summary),
    ]


def _run(summary: Summary) -> list[Row]:
    style = {"finished": GOOD, "drained": GOOD, "stopped": "yellow"}.get(summary.outcome, BAD)
    return [
        Row("outcome", summary.outcome, style),
        Row("run", summary.run.name),
        Row("model", summary.run.model),
        Row("steps", f"{summary.steps_done} of {summary.run.steps} in {clock(summary.seconds)}"),
    ]


def _learned(summary: Summary) -> list[Row]:
    first, last, missed = summary.reward_first, summary.reward_last, summary.evaluations_missed
    reward = NOT_MEASURED
    if first is not None and last is not None:
        reward = f"{first:.3f} -> {last:.3f} (mean of the first and of the last step)"
    return [
        Row("held out before", _accuracy(summary.held_out_before), "bold"),
        Row("held out after", _accuracy(summary.held_out_after), "bold"),
        *([Row("evaluations", _evaluations(summary))] if summary.evaluations > 2 or missed else []),
        Row("reward", reward),
    ]


def _accuracy(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return NOT_MEASURED
    version = f"version {accuracy.version}"
    if accuracy.oldest_version != accuracy.version:
        version = f"versions {accuracy.oldest_version} to {accuracy.version}"
    prompts = f"{accuracy.prompts} prompts"
    if accuracy.rollouts_per_prompt > 1:
        prompts += f" x {accuracy.rollouts_per_prompt}"
    text = f"{accuracy.accuracy:.3f} (95 % interval {accuracy.low:.3f} to {accuracy.high:.3f}, {prompts}, {version})"
    for name, by_k in (("pass", accuracy.pass_at), ("maj", accuracy.maj_at)):
        text += "".join(f", {name}@{k} {estimate.value:.3f}" for k, estimate in by_k.items())
    return text + (f"; {accuracy.failed:,} answers could not be scored" if accuracy.failed else "")


def _evaluations(summary: Summary) -> str:
    missed = summary.evaluations_missed
    return f"{summary.evaluations}" + (f", and {missed} that came to nothing" if missed else "")


def _rollouts(summary: Summary) -> list[Row]:
    counts = summary.conservation
    trained = summary.rollouts_trained
    drops, quarantined = summary.buffer.drops_by_length_decile, summary.buffer.quarantined_prompts
    failed = _reasons(counts.failed) + (f"; {quarantined:,} prompts quarantined" if quarantined else "")
    spanning = f"{summary.rollouts_over_versions:,} span two or more versions"
    if trained:
        spanning += f", at most {summary.versions_in_rollout_max}"
    return [
        Row("versions published", f"{summary.versions_published:,}"),
        Row("rollouts trained", f"{trained:,}, of which {spanning}"),
        Row("tokens trained", f"{summary.tokens_trained:,}, masked as over-stale {summary.tokens_masked:,}"),
        Row("dropped", _reasons(counts.dropped)),
        *([Row("dropped by length", _deciles(drops))] if drops else []),
        Row("failed", failed, BAD if any(counts.failed.values()) else ""),
    ]


def _reasons(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if count)
    return f"{total:,} ({reasons})" if reasons else "0"


def _deciles(drops: list[int]) -> str:
    return f"{' '.join(f'{count:,}' for count in drops)} (deciles of answer length, the shortest first)"


def _sound(summary: Summary) -> list[Row]:
    past, counts = summary.tokens_past_bound, summary.conservation
    equation = (
        f"{counts.admitted:,} admitted = {counts.trained:,} trained + {sum(counts.dropped.values()):,} dropped "
        f"+ {sum(counts.failed.values()):,} failed + {counts.live:,} live"
    )
    stale = summary.staleness
    bound = f"bound {summary.run.max_staleness_versions}"
    staleness = f"mean {stale.mean:.2f}, max {stale.max:.0f} versions" if stale else NOT_MEASURED
    return [
        Row(
            "conservation",
            f"{'holds' if counts.holds else 'BROKEN'}: {equation}",
            GOOD if counts.holds else BAD,
        ),
        Row("trained past bound", f"{past:,} tokens" + (": BROKEN" if past else ""), BAD if past else GOOD),
        Row("staleness", f"{staleness} ({bound})"),
        *([Row("buffer restarts", _restarts(summary), "yellow")] if summary.buffer.recoveries else []),
        _mismatch(summary),
    ]


def _restarts(summary: Summary) -> str:
    count = summary.buffer.recoveries
    return f"{count:,}: {'a process' if count == 1 else 'processes'} died and went on from the log"


def _mismatch(summary: Summary) -> Row:
    found = summary.mismatch
    if found is None:
        return Row("engine vs learner", NOT_MEASURED)
    text = (
        f"|logprob difference| max {found.max:.1e}, mean {found.mean:.1e}, p95 {found.p95:.1e} "
        f"over {found.tokens:,} tokens"
    )
    if found.steps_not_finite:
        return Row("engine vs learner", f"{text}; NOT FINITE in {found.steps_not_finite} steps", BAD)
    return Row("engine vs learner", text)


def _speed(summary: Summary) -> list[Row]:
    engines, learner = _rate(summary.engine_tokens_per_s), _rate(summary.learner_tokens_per_s)
    waits = ", ".join(f"{cause} {s:.0f} s" for cause, s in summary.waits.items() if s >= 0.5)
    if summary.waits and not waits:
        waits = "none"
    return [
        Row(
            "engine tokens/s",
            f"{engines}" + (", all engines, in training" if summary.engine_tokens_per_s else ""),
        ),
        Row("learner tokens/s", f"{learner}" + (", while it trains" if summary.learner_tokens_per_s else "")),
        Row("weight sync", _sync(summary)),
        Row("engine stall", _seconds(summary.engine_stall_seconds)),
        Row("tokens held", _memory(summary.buffer)),
        Row("waits", waits or NOT_MEASURED),
        Row(
            "phases",
            ", ".join(f"{name} {s:.1f} s" for name, s in summary.phase_seconds.items()) or NOT_MEASURED,
        ),
    ]


def _memory(use: BufferUse) -> str:
    if not use.memory_bytes:
        return NOT_MEASURED
    return f"at most {amount(use.held_bytes_max)} of {amount(use.memory_bytes)}"


def _rate(rate: float | None) -> str:
    return NOT_MEASURED if rate is None else f"{rate:,.0f}"


def _seconds(spread: Spread | None) -> str:
    return NOT_MEASURED if spread is None else f"mean {spread.mean:.3f} s, max {spread.max:.3f} s"


def _sync(summary: Summary) -> str:
    waited = summary.lag_wait_seconds
    behind = (
        f"; for engines too far behind {_seconds(waited)}" if waited is not None and waited.max > 0 else ""
    )
    return _seconds(summary.weight_sync_seconds) + behind


def _rest(summary: Summary) -> list[Row]:
    packages = ", ".join(f"{name} {version}" for name, version in summary.packages.items())
    return [Row("packages", packages or NOT_MEASURED), Row("folder", summary.run.folder)]
