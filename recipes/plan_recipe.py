"""A plan as a recipe: the user's own tables with pools, learner and staleness replaced, as TOML with comments. Pure.

What the plan does not decide is left as it was written; comments of the first file are not kept. Called by `cli_plan`,
which checks the result like any recipe before it is written.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from asyncrl.recipes.gpus import ClusterEntry
from asyncrl.recipes.plan import Plan

_DECIDED = (
    "name",
    "engines",
    "min_engines",
    "engine",
    "device",
    "concurrency",
    "max_concurrency",
    "tensor_parallel",
    "kv_cache_bytes",
    "cores",
    "dtype",
    "gpu_type",
)
"""Of a pool; its other settings are those of the recipe's first pool."""
HALF_TOLERANCE = 0.15
"""weight_sync.verify_tolerance where the recipe has none and engines compute in half precision: the default is for float32."""
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def planned_tables(raw: Mapping[str, Any], plan: Plan, cluster: Sequence[ClusterEntry]) -> dict[str, Any]:
    """`raw`: the recipe as its TOML was read, overrides applied."""
    tables, best = copy.deepcopy(dict(raw)), plan.best
    kept = {k: v for k, v in tables["pools"][0].items() if k not in _DECIDED}
    tables["pools"] = [
        {
            "name": pool.name,
            "engines": pool.engines,
            "device": "cuda",
            "gpu_type": pool.ray_name,
            "tensor_parallel": pool.tensor_parallel,
            "concurrency": pool.concurrency,
            "max_concurrency": pool.most_slots,
            "dtype": pool.dtype,
            **kept,
        }
        for pool in best.pools
    ]
    learner = {k: v for k, v in tables.get("learner", {}).items() if k != "cores"}
    learner.update(
        ranks=best.learner.ranks,
        device="cuda",
        dtype=best.learner.dtype,
        tokens_per_microbatch=best.learner.tokens_per_microbatch,
    )
    tables["learner"] = learner
    tables["staleness"] = {
        **tables.get("staleness", {}),
        "max_staleness_versions": best.max_staleness_versions,
    }
    if any(pool.dtype != "float32" for pool in best.pools):
        tables["weight_sync"] = {"verify_tolerance": HALF_TOLERANCE, **tables.get("weight_sync", {})}
    tables["cluster"] = [msgspec.to_builtins(entry) for entry in cluster]
    return tables


def planned_toml(raw: Mapping[str, Any], plan: Plan, cluster: Sequence[ClusterEntry], command: str) -> str:
    """`command`: what made it, for the first line."""
    best, learner = plan.best, plan.best.learner
    comments = {
        "": [
            f"Made by: {command}",
            f"Predicted: {best.step_s:.1f} s a step (generate {best.generate_s:.1f} s, train {best.train_s:.1f} s); taking turns "
            f"{best.synchronous_s:.1f} s.",
            f"Answers of {plan.mean_tokens:,.0f} tokens on average and prompts of {plan.prompt_tokens:,.0f} were assumed. "
            "Estimates: docs/plan.md.",
        ],
        "learner": [
            f"On {learner.ranks} x {learner.gpu_type}: {learner.memory_bytes_per_gpu / 1e9:.1f} GB a GPU, of it state "
            f"{learner.state_bytes / 1e9:.1f} and activations {learner.activation_bytes / 1e9:.1f}; publishing a version "
            f"{learner.publish_s:.1f} s.",
        ],
        "staleness": [
            "rollouts in slots x (longest of a group / mean) / rollouts a step + train / step time <= this + 1"
        ],
    }
    for i, pool in enumerate(best.pools):
        comments[f"pools[{i}]"] = [
            f"On {pool.gpu_type}. Weights {pool.weights_bytes_per_gpu / 1e9:.1f} GB a GPU; the KV cache of an engine holds {pool.kv_tokens:,} tokens = "
            f"{pool.most_slots} rollouts; {pool.tokens_per_s:,.0f} tokens/s from the pool at this concurrency."
        ]
    return to_toml(planned_tables(raw, plan, cluster), comments)


def to_toml(tables: Mapping[str, Any], comments: Mapping[str, Sequence[str]]) -> str:
    """TOML of plain tables, lists, strings, numbers and truth values. `comments` by key path (`pools[0]`), "" for the top."""
    lines = [f"# {line}" for line in comments.get("", ())]
    lines += [
        f"{_key(k)} = {_value(v)}" for k, v in tables.items() if not _is_table(v) and not _are_tables(v)
    ]
    for key, value in tables.items():
        if _is_table(value):
            lines += _table(_key(key), value, comments.get(key, ()), header="[{}]")
        elif _are_tables(value):
            for i, item in enumerate(value):
                lines += _table(_key(key), item, comments.get(f"{key}[{i}]", ()), header="[[{}]]")
    return "\n".join(lines) + "\n"


def _table(key: str, table: Mapping[str, Any], comments: Sequence[str], header: str) -> Iterator[str]:
    yield ""
    yield from (f"# {line}" for line in comments)
    yield header.format(key)
    for name, value in table.items():
        yield f"{_key(name)} = {_value(value)}"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _text(text: str) -> str:
    """JSON's escapes are TOML's, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"no TOML for {type(value).__name__}: {value!r}")
