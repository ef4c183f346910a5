"""`asyncrl status` in time: once, or every second until Ctrl-C or the run's end. Called by the command line.

On a terminal one picture is redrawn; on a pipe each status is printed below the last. What is no status (why there is
none yet, how the run ended) goes to stderr, so that a pipe gets data alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import msgspec
from rich.console import Console
from rich.live import Live

from asyncrl.runtime.control import CommandRefused, RunStatus
from asyncrl.runtime.control_client import ControlClient, ControlFault, NobodyThere
from asyncrl.runtime.control_place import read_place
from asyncrl.runtime.control_target import Ending, Target, ending, why
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.status_view import draw_status

EVERY_S = 1.0
SUMMARY_S = 30.0
"""From the end of a run's control socket to its summary: processes end and the report is drawn meanwhile."""
_ROWS_BESIDE = 18
"""Rows of a status that are no engines, as far as a terminal's height is concerned."""
_LOOK_S = 0.2


def show(client: ControlClient, out: Console, *, as_json: bool) -> int:
    """Raises as `ControlClient.ask`."""
    _print(client.status(), client.endpoint, out, as_json=as_json)
    return 0


def watch(target: Target, client: ControlClient, out: Console, *, as_json: bool) -> int:
    """The exit code: 0 when the run has finished, was drained or stopped, 1 when it failed or vanished."""
    errors = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        if out.is_terminal and not as_json:
            live = stack.enter_context(Live(console=out, auto_refresh=False))
            most = max(1, out.height - _ROWS_BESIDE)

            def put(run: RunStatus) -> None:
                live.update(draw_status(run, client.endpoint, out.width, most), refresh=True)
        else:

            def put(run: RunStatus) -> None:
                _print(run, client.endpoint, out, as_json=as_json, apart=True)

        fault, last = _follow(client, put, errors)
    text, code = _end(target, fault, last)
    _say(errors, text)
    return code


def _follow(
    client: ControlClient, put: Callable[[RunStatus], None], errors: Console
) -> tuple[ControlFault, RunStatus | None]:
    """Puts each status; what ended it, and the last one."""
    last, said = None, ""
    # Waits for the run's answers, one each second; ends with the first that does not come, or with Ctrl-C.
    while True:
        began = time.monotonic()
        try:
            last = client.status()
            put(last)
        except CommandRefused as refusal:
            if said != str(refusal):
                said = str(refusal)
                _say(errors, said)
        except ControlFault as fault:
            return fault, last
        time.sleep(max(0.0, EVERY_S - (time.monotonic() - began)))


def _end(target: Target, fault: ControlFault, last: RunStatus | None) -> tuple[str, int]:
    """What to say of a run that answered before and does not any more, and the exit code."""
    if target.folder is None:
        return _end_elsewhere(fault, last)
    try:
        found = _wait_for_summary(target.folder)
    except ValueError as error:
        return str(error), 1
    if found is None:
        return why(target, fault), 1
    return found.text, 0 if found.outcome in ("finished", "drained", "stopped") else 1


def _end_elsewhere(fault: ControlFault, last: RunStatus | None) -> tuple[str, int]:
    if last is None or not isinstance(fault, NobodyThere):
        return str(fault), 1
    now = last.snapshot
    if now.state in ("stopping", "draining") or now.step >= now.steps:
        return f"run {last.name} has ended; it was {now.state} at step {now.step}/{now.steps}", 0
    return f"run {last.name} was {now.state} at step {now.step}/{now.steps} and is gone: {fault}", 1


def _wait_for_summary(folder: RunFolder) -> Ending | None:
    """None where the control socket was not closed in order. Raises ValueError for files that cannot be read."""
    deadline = time.monotonic() + SUMMARY_S
    # Waits for the launching process to write the summary, its last deed but the report; ends with it or at a deadline.
    while read_place(folder.control) is None:
        if folder.summary.is_file() or time.monotonic() >= deadline:
            return ending(folder)
        time.sleep(_LOOK_S)
    return None


def _print(run: RunStatus, endpoint: str, out: Console, *, as_json: bool, apart: bool = False) -> None:
    if as_json:
        out.file.write(msgspec.json.encode(run).decode() + "\n")
    else:
        with out.capture() as drawn:
            out.print(draw_status(run, endpoint, out.width), highlight=False)
        lines = (
            line.rstrip() + "\n" for line in drawn.get().splitlines()
        )  # tables fill their lines with blanks
        out.file.write("".join(lines) + ("\n" if apart else ""))
    out.file.flush()


def _say(errors: Console, text: str) -> None:
    errors.print(text, highlight=False, markup=False, soft_wrap=True)
