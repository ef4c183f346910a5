"""How the tests are dealt out to the workers of pytest-xdist (`make test` starts two): `--dist loadgroup` reads it.

- A file's tests stay together, in order: they share what is slow to start, such as an engine.
- Whole runs are dealt out one by one: they share nothing, and take up to minutes each. They come first (`tests/chaos`, then
  `tests/contract`, `tests/e2e`, and the many short ones of `tests/unit` last), so that no worker ends long before the other.
- What is marked `alone` compares times, which a neighbour would spoil: `make test` runs it afterwards, in one process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

DEALT_OUT = ("chaos", "e2e")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        path = item.path.relative_to(here)
        if path.parts[0] not in DEALT_OUT:
            item.add_marker(pytest.mark.xdist_group(path.as_posix()))
