"""A user's function by its name in a recipe: a built-in name or an import path. Called by `rewards` and `environment`,
in worker processes: importing foreign code is theirs to do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


class FunctionError(ValueError):
    """A function that cannot be found or made, or that gave what it must not; the message says the way out."""


def load_function(kind: str, name: str, built_in: Mapping[str, str]) -> Callable[..., Any]:
    """The function of a built-in name or of an import path `package.module:function`; `kind` is for the messages, such as
    "reward function". Raises `FunctionError`."""
    module_name, colon, function_name = built_in.get(name, name).partition(":")
    if not colon or not module_name or not function_name:
        raise FunctionError(f"no {kind} {name!r}; expected {', '.join(built_in)}, or package.module:function")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise FunctionError(
            f"{kind} {name!r}: importing {module_name!r} failed: {error}. Put its folder on PYTHONPATH or "
            "install its package."
        ) from error
    except AttributeError as error:
        raise FunctionError(f"{kind} {name!r}: {error}") from error
    if not callable(function):
        raise FunctionError(f"{kind} {name!r} is a {type(function).__name__}, which cannot be called")
    return function
