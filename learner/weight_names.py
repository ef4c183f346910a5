"""Which names in a folder's safetensors files belong to which parameter of the model.

The rules are those of transformers: its renamings, and its converters where a layout differs. Invariant: every name in the
files and in the model is accounted for before anything is read. Called by `loading`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from asyncrl.learner.weight_files import Source, WeightFiles

_NAMED = 6
"""How many names an error lists."""


def find_sources(
    lm: PreTrainedModel, files: WeightFiles, *, fresh: Collection[str] = (), spare: Collection[str] = ()
) -> dict[str, Source]:
    """For each parameter and persistent buffer of `lm`, tied ones under every name, where it stands in `files`.

    `fresh` are names of the model that the files need not have, `spare` names of the files that the model has no use for.
    Raises ValueError if a name is left over on either side, a shape differs, or weights are tied in the model and different
    in the files.
    """
    mapping = get_model_conversion_mapping(lm)
    expected = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    sources, unexpected = _assign(files.names, mapping, expected, lm.base_model_prefix)
    for names in _tied(lm):
        _tie(names, sources, files)
    missing = sorted(expected.keys() - sources.keys() - set(fresh))
    surplus = [key for key in unexpected if key not in spare and not _ignored(lm, key)]
    if missing or surplus:
        raise ValueError(
            f"{files.folder} is not a {type(lm).__name__}: it lacks {_some(missing) or 'nothing'} and has "
            f"{_some(surplus) or 'nothing'} beside; save it with save_pretrained of the model that config.json describes"
        )
    _check_shapes(sources, files, expected)
    # As from_pretrained notes it: saving then writes the names that were read.
    lm._weight_conversions = [each for each in mapping if each.was_used()]  # type: ignore[assignment]
    return sources


def _assign(
    names: Iterable[str],
    mapping: list[WeightTransform],
    expected: Mapping[str, tuple[int, ...]],
    prefix: str,
) -> tuple[dict[str, Source], list[str]]:
    """Sources by the model's names, and the names of the files that belong nowhere."""
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    sources: dict[str, Source] = {}
    unexpected = []
    for key in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, dict(expected))
        if name not in expected and key in expected:
            name, pattern = key, None  # a rule for files of another layout met the model's own name
        if name not in expected:
            unexpected.append(key)
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        source = sources.setdefault(name, Source(converter=converter))
        if source.keys and (converter is None or source.converter is not converter):
            raise ValueError(f"{name} stands twice in the weights: as {source.keys[0][1]} and as {key}")
        if converter is not None and (
            len(converter.target_patterns) > 1 or "*" in converter.target_patterns[0]
        ):
            raise ValueError(
                f"{key}: one tensor in the files is several in the model, which the learner does not read; save the model "
                "with save_pretrained of transformers 5"
            )
        source.keys.append((pattern or key, key))
    return sources, unexpected


def _tied(lm: PreTrainedModel) -> Iterator[list[str]]:
    """Names of one and the same parameter, where there are several."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    yield from (names for names in by_id.values() if len(names) > 1)


def _tie(names: list[str], sources: dict[str, Source], files: WeightFiles) -> None:
    """Each of `names` comes from what is there of them."""
    there = [name for name in names if name in sources]
    if not there:
        return
    first = sources[there[0]]
    for name in there[1:]:
        keys = [key for source in (first, sources[name]) for _, key in source.keys]
        if len(keys) != 2 or not files.same(*keys):
            raise ValueError(
                f"{files.folder}: {there[0]} and {name} are one weight by its config.json and differ in its files: set "
                "tie_word_embeddings = false there"
            )
    sources.update(dict.fromkeys(names, first))


def _ignored(lm: PreTrainedModel, key: str) -> bool:
    """What transformers passes over as well: parts that training does not use, and constants that old files hold."""
    patterns = [
        *(lm._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    return any(re.search(pattern, key) for pattern in patterns)


def _check_shapes(
    sources: Mapping[str, Source], files: WeightFiles, expected: Mapping[str, tuple[int, ...]]
) -> None:
    for name, source in sources.items():
        if source.by_row:
            _check_experts(name, source, files, expected[name][0])
        found = files.shape(source.keys[0][1])
        if source.converter is None and found != expected[name]:
            raise ValueError(
                f"{files.folder}: {source.keys[0][1]} has shape {found}, config.json makes {name} {expected[name]}"
            )


def _check_experts(name: str, source: Source, files: WeightFiles, experts: int) -> None:
    for pattern, count in Counter(pattern for pattern, _ in source.keys).items():
        if count != experts:
            raise ValueError(
                f"{files.folder} has {count} of {pattern} for {name}, and config.json makes {experts} experts"
            )


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
