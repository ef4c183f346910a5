"""Each part writes to a file of its own in the run folder: its logging, and whatever its libraries and children print.

Called first thing in every part's process.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

_TAIL_BYTES = 3000


def write_log_to(path: Path) -> None:
    """Points file descriptors 1 and 2 at `path`, so that children write there as well."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    quiet_libraries()
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr, force=True)


def quiet_libraries() -> None:
    """No progress bars of libraries, here or in children. Before they are imported."""
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1", TRANSFORMERS_VERBOSITY="error")


def tail(path: Path) -> str:
    """The end of a log, for an error report; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace").strip()
