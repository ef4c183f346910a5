"""From what is typed, a folder or a name, to a run's folder. Called by `inspect` and by the commands to a run."""

from __future__ import annotations

import difflib
from pathlib import Path

from asyncrl.runtime.run_folder import RunFolder

_PARENT = Path("runs")


class NoSuchRun(ValueError):
    """Neither a run's folder nor the name of one, or one without what is asked for."""


def find_run(text: str) -> RunFolder:
    """The folder `text`, else `runs/TEXT`; the first that holds a run. Raises `NoSuchRun`."""
    tried = [Path(text), _PARENT / text]
    for path in tried:
        folder = RunFolder(path)
        if folder.recipe.is_file() or folder.rollouts.is_dir():
            return folder
    for path in tried:
        if path.is_dir():
            raise NoSuchRun(f"{path} is no run folder: neither recipe.json nor rollouts/ is in it")
    names = sorted(path.name for path in _PARENT.glob("*") if path.is_dir())
    near = difflib.get_close_matches(text, names, 3)
    there = (
        f"did you mean {' or '.join(near)}?" if near else f"runs that are here: {', '.join(names) or 'none'}"
    )
    raise NoSuchRun(f"no run {text}: there is neither a folder {text} nor {_PARENT / text}; {there}")


def listening_beside(folder: RunFolder) -> list[str]:
    """Names of the other runs in the same place whose control socket is there: one of them may be meant."""
    own = folder.path.resolve()
    others = (RunFolder(path) for path in sorted(own.parent.glob("*")) if path != own)
    return [other.path.name for other in others if other.control.is_file()]
