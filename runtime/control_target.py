"""From what is typed to a control socket's endpoint and key; and why a run does not answer, with the way out.

Called by the commands to a run. Problems carry the exit code of the command: 2 for what was written wrong, else 1.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from asyncrl.buffer.keys import CLIENT_FILE, ClientKeys, KeysRefused, read_client_file, read_client_keys
from asyncrl.runtime.control_client import ControlFault
from asyncrl.runtime.control_place import Place, read_place
from asyncrl.runtime.find_run import NoSuchRun, find_run, listening_beside
from asyncrl.runtime.plain_view import clock
from asyncrl.runtime.run_folder import RunFolder
from asyncrl.runtime.summary import read_summary


class Unreached(RuntimeError):
    """There is nobody to ask, or no key to ask with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Whom to ask."""

    endpoint: str
    keys: ClientKeys
    folder: RunFolder | None = None
    """None where the run is asked from elsewhere."""


class Ending(msgspec.Struct, frozen=True):
    """What became of a run that has no control socket."""

    text: str
    outcome: str = ""
    """`finished`, `drained`, `stopped` or `failed`; "" where nobody knows: it may also be about to start or to end."""


def target_run(text: str) -> Target:
    """Of a run on this machine, by its folder or its name. Raises Unreached."""
    try:
        folder = find_run(text)
    except NoSuchRun as error:
        raise Unreached(str(error), 2) from error
    try:
        place = read_place(folder.control)
        if place is None:
            raise Unreached(ending(folder).text, 1)
        return Target(endpoint=place.endpoint, keys=read_client_keys(folder.keys), folder=folder)
    except KeysRefused as error:
        raise Unreached(str(error), 2) from error
    except ValueError as error:  # of a place or a summary that cannot be read
        raise Unreached(str(error), 1) from error


def target_at(address: str, key: Path) -> Target:
    """Of a run anywhere. Raises Unreached."""
    try:
        return Target(endpoint=address, keys=read_client_file(key))
    except KeysRefused as error:
        raise Unreached(
            f"--key {key} cannot be used: {error}; --key takes a copy of the run's keys/{CLIENT_FILE}", 2
        ) from error


def why(target: Target, fault: ControlFault) -> str:
    """What is to be said of a run that did not answer; of one in a folder, what its folder shows."""
    folder = target.folder
    if folder is None:
        return str(fault)
    try:
        place = read_place(folder.control)
        seen = ending(folder).text if place is None else _silence(folder, place)
    except ValueError as error:
        seen = str(error)
    return f"run {name_of(folder)} does not answer: {fault}; {seen}"


def ending(folder: RunFolder) -> Ending:
    """Of a run that has no control socket. Raises ValueError for a summary that cannot be read."""
    name, others = name_of(folder), listening_beside(folder)
    there = f"; of the runs beside it {', '.join(others)} can be asked" if others else ""
    if not folder.summary.is_file():
        return Ending(
            f"run {name} has no control socket: it is just starting, is just ending, or was killed at its start; "
            f"its logs are in {folder.logs}{there}"
        )
    summary = read_summary(folder.summary)
    return Ending(
        f"run {name} has ended: {summary.outcome}, {summary.steps_done} of {summary.run.steps} steps done in "
        f"{clock(summary.seconds)}; `asyncrl report {folder.path}` shows its summary{there}",
        summary.outcome.partition(":")[0],
    )


def name_of(folder: RunFolder) -> str:
    return folder.path.resolve().name


def _silence(folder: RunFolder, place: Place) -> str:
    """Why nobody answers at a place that was left, as far as it can be seen from here."""
    if place.host != socket.gethostname():
        return (
            f"it was started on {place.host}, and this is {socket.gethostname()}: ask from there, or give the recipe a "
            f"run.control_host and ask with --address and --key {folder.keys / CLIENT_FILE}"
        )
    if _lives(place.pid):
        return f"its process {place.pid} is there and may be stuck: see {folder.logs}"
    return (
        f"its process {place.pid} is gone and did not end in order: it was killed, or the machine went down; "
        f"`asyncrl resume {folder.path}` goes on from its last checkpoint, `asyncrl inspect {folder.path}` shows what it had, its "
        f"logs are in {folder.logs}"
    )


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
