"""Where a run's control socket listens, as its folder says.

It is written when the socket answers and taken away when the run ends in order: a place with nobody at it is a run that
was killed. Called by the control server and by those who look for it.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

from asyncrl.buffer import base


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Content of `endpoints/control`."""

    endpoint: str
    """As this machine's own clients reach it."""
    host: str
    """Name of the machine."""
    pid: int
    """Of the supervisor."""


def leave_place(path: Path, endpoint: str) -> None:
    place = Place(endpoint=endpoint, host=socket.gethostname(), pid=os.getpid())
    path.parent.mkdir(parents=True, exist_ok=True)
    base.write(path, msgspec.json.encode(place) + b"\n", fsync=False)


def remove_place(path: Path) -> None:
    base.remove(path)


def read_place(path: Path) -> Place | None:
    """None where no run listens. Raises ValueError that names the file if it holds something else."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Place)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: expected where a run's control socket listens: {error}") from error
