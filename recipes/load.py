"""From a TOML file and overrides to a `Recipe`, or to every problem at once.

msgspec stops at the first error; a user wants them all. So the raw tables are walked beside the structs' fields, each
leaf is converted by itself, and only when nothing is wrong is the whole converted. Called by the CLI.
"""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import msgspec

from asyncrl.recipes.recipe import Problem, Recipe, cross_check


class RecipeError(ValueError):
    """A recipe that cannot run. The message names file, key path, value and the way out, for every problem."""

    def __init__(self, file: str, problems: Sequence[Problem | str]) -> None:
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{file}: {count}", *(f"  {problem}" for problem in self.problems)]))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks. `overrides` are `a.b=value` as given to `--set`. Raises RecipeError."""
    try:
        raw = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), [f"cannot be read: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(str(path), [f"is not TOML: {error}"]) from error
    for override in overrides:
        apply_override(raw, override)
    return recipe_from(raw, str(path))


def recipe_from(raw: dict[str, Any], file: str) -> Recipe:
    """Checks tables that are already read; `file` is for the messages."""
    problems = list(_walk(raw, Recipe, ""))
    if problems:
        raise RecipeError(file, problems)
    recipe = msgspec.convert(raw, Recipe)
    broken = cross_check(recipe)
    if broken:
        raise RecipeError(file, broken)
    return recipe


def dump_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain tables, for the run folder and for telemetry."""
    tables: dict[str, Any] = msgspec.to_builtins(recipe)
    return tables


# ---- overrides -----------------------------------------------------------------------------------------------------


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one value in place; `pools.0.concurrency=8` reaches into a list. Raises RecipeError."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError("--set", [f"{override!r}: expected KEY.KEY=VALUE, such as run.steps=10"])
    place: Any = raw
    for key in keys[:-1]:
        place = _enter(place, key, override)
    last = _index(place, keys[-1], override) if isinstance(place, list) else keys[-1]
    place[last] = _value(text.strip())


def _enter(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, override)]
    inner = place.setdefault(key, {})
    if not isinstance(inner, dict | list):
        raise RecipeError("--set", [f"{override!r}: {key} is a value, {inner!r}, and has no keys of its own"])
    return inner


def _index(place: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise RecipeError(
            "--set", [f"{override!r}: {key!r} is no index; the list has entries 0 to {len(place) - 1}"]
        )
    return int(key)


def _value(text: str) -> Any:
    """A TOML value; what is none is taken as a string, so that quotes can be left out in a shell."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


# ---- every problem at once -------------------------------------------------------------------------------------------


def _walk(value: Any, kind: Any, path: str) -> Iterator[Problem]:
    bare = _bare(kind)
    if value is None and type(None) in get_args(kind):
        return
    choices = _tagged(bare)
    if choices and isinstance(value, dict):
        yield from _walk_choice(value, choices, path)
        return
    if isinstance(bare, type) and issubclass(bare, msgspec.Struct):
        if not isinstance(value, dict):
            yield Problem(path, repr(value), "expected a table")
            return
        yield from _walk_struct(value, bare, path)
    elif get_origin(bare) is list and isinstance(value, list) and _is_struct(get_args(bare)[0]):
        yield from (
            _leaf([None] * len(value), Annotated[list[None], *_meta(kind)], path) if _meta(kind) else ()
        )
        for i, item in enumerate(value):
            yield from _walk(item, get_args(bare)[0], f"{path}[{i}]")
    else:
        yield from _leaf(value, kind, path)


def _walk_struct(table: dict[str, Any], struct: type[msgspec.Struct], path: str) -> Iterator[Problem]:
    hints = get_type_hints(struct, include_extras=True)
    fields = {f.name: f for f in msgspec.structs.fields(struct)}
    tag_field = struct.__struct_config__.tag_field
    known = [*fields, *([tag_field] if tag_field else [])]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            yield Problem(_join(path, key), repr(table[key]), f"unknown key; {hint}")
    if tag_field and table.get(tag_field) != struct.__struct_config__.tag:
        tag = struct.__struct_config__.tag
        yield Problem(_join(path, tag_field), repr(table.get(tag_field)), f"expected {tag!r}")
    for name, field in fields.items():
        if name in table:
            yield from _walk(table[name], hints[name], _join(path, name))
        elif field.required:
            yield Problem(_join(path, name), "", f"is missing; expected {_describe(hints[name])}")


def _walk_choice(
    table: dict[str, Any], choices: dict[str, type[msgspec.Struct]], path: str
) -> Iterator[Problem]:
    """A table of one of several kinds, told apart by its tag."""
    field = next(iter(choices.values())).__struct_config__.tag_field
    assert field is not None
    tag = table.get(field)
    if isinstance(tag, str) and tag in choices:
        yield from _walk_struct(table, choices[tag], path)
        return
    found = repr(tag) if field in table else ""
    near = difflib.get_close_matches(tag, choices, 1) if isinstance(tag, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    missing = "" if field in table else "is missing; "
    yield Problem(
        _join(path, field), found, f"{missing}expected one of {', '.join(map(repr, choices))}{hint}"
    )


def _leaf(value: Any, kind: Any, path: str) -> Iterator[Problem]:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        yield Problem(path, repr(value), str(error))


def _meta(kind: Any) -> tuple[Any, ...]:
    return get_args(kind)[1:] if get_origin(kind) is Annotated else ()


def _bare(kind: Any) -> Any:
    """Without Annotated and without None."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        inner = [k for k in get_args(kind) if k is not type(None)]
        return _bare(inner[0]) if len(inner) == 1 else kind
    return kind


def _tagged(bare: Any) -> dict[str, type[msgspec.Struct]]:
    """Structs by their tags, of a union of nothing but tagged structs; else empty."""
    inner = get_args(bare) if get_origin(bare) in (Union, types.UnionType) else ()
    structs = [k for k in inner if isinstance(k, type) and issubclass(k, msgspec.Struct)]
    tagged = {str(k.__struct_config__.tag): k for k in structs if k.__struct_config__.tag_field}
    return tagged if len(tagged) == len(inner) else {}


def _is_struct(kind: Any) -> bool:
    bare = _bare(kind)
    return isinstance(bare, type) and issubclass(bare, msgspec.Struct)


def _describe(kind: Any) -> str:
    bare = _bare(kind)
    if _is_struct(bare):
        return "a table"
    if get_origin(bare) is list:
        return "a list of tables" if _is_struct(get_args(bare)[0]) else "a list"
    return {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}.get(
        bare, str(bare)
    )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
