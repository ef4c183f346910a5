"""From vLLM's deltas to chunks: versions by spans, and the check against the final account."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.vllm_stream import CoreStats, Stream, VersionMismatch, versions_of

VERSIONS = st.lists(st.integers(0, 3), max_size=40).map(sorted)


def spans_of(versions: list[int]) -> list[tuple[str, int]]:
    """The spans that the engine core keeps after sampling tokens of these versions."""
    return [(str(v), index) for index, v in enumerate(versions) if index == 0 or versions[index - 1] != v]


def output(tokens: list[int], reason: str | None = None, final: list[tuple[str, int]] | None = None) -> Any:
    spans = (
        None if final is None else [SimpleNamespace(version=version, start=start) for version, start in final]
    )
    completion = SimpleNamespace(
        token_ids=tokens,
        logprobs=SimpleNamespace(logprobs=[-0.5] * len(tokens)),
        finish_reason=reason,
        weight_versions=spans,
    )
    return SimpleNamespace(outputs=[completion], finished=reason is not None)


@given(VERSIONS, st.data())
def test_versions_of_any_part_are_those_of_its_tokens(versions: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(versions)))
    count = data.draw(st.integers(0, len(versions) - start))
    assert versions_of(spans_of(versions), start, count) == versions[start : start + count]


def test_a_token_before_the_first_span_is_an_error() -> None:
    with pytest.raises(VersionMismatch):
        versions_of([], 0, 1)
    with pytest.raises(VersionMismatch):
        versions_of([("4", 3)], 2, 2)


@given(VERSIONS, st.data())
def test_a_stream_gives_each_token_its_version_however_the_deltas_are_cut(
    versions: list[int], data: st.DataObject
) -> None:
    """The state may know later spans already when an earlier delta is read."""
    state = SimpleNamespace(weight_version_starts=spans_of(versions))
    stream = Stream("r", state)
    got: list[int] = []
    while len(got) < len(versions):
        count = data.draw(st.integers(1, len(versions) - len(got)))
        chunk = stream.chunk(output(list(range(count))))
        assert chunk.tokens == list(range(count))
        assert len(chunk.logprobs) == count
        assert chunk.finish_reason is None
        got += chunk.versions
    assert stream.chunk(output([], "length", spans_of(versions))).finish_reason == "length"
    assert got == versions


def test_a_request_that_ended_before_it_was_looked_up_takes_versions_from_its_final_output() -> None:
    chunk = Stream("r", None).chunk(output([7, 8, 9], "abort", [("1", 0), ("2", 2)]))
    assert chunk.versions == [1, 1, 2]
    assert chunk.finish_reason == "abort"


def test_disagreement_with_the_final_account_raises() -> None:
    stream = Stream("r", SimpleNamespace(weight_version_starts=[("1", 0)]))
    stream.chunk(output([7, 8]))
    with pytest.raises(VersionMismatch, match="request r"):
        stream.chunk(output([9], "stop", [("1", 0), ("2", 1)]))


def test_an_end_that_nobody_asked_for_raises() -> None:
    with pytest.raises(RuntimeError, match="'error'"):
        Stream("r", None).chunk(output([], "error", []))


class Flat:
    """As vLLM's `FlatLogprobs` with one logprob a position: a slice is one again."""

    def __init__(self, logprobs: list[float]) -> None:
        self.logprobs = logprobs

    def __getitem__(self, part: slice) -> Flat:
        return Flat(self.logprobs[part])


@given(VERSIONS, st.data())
def test_the_rest_is_what_arrived_and_was_not_streamed(versions: list[int], data: st.DataObject) -> None:
    tokens = list(range(len(versions)))
    logprobs = Flat([-float(token) for token in tokens])
    state = SimpleNamespace(
        weight_version_starts=spans_of(versions),
        detokenizer=SimpleNamespace(output_token_ids=tokens),
        logprobs_processor=SimpleNamespace(logprobs=logprobs),
    )
    stream = Stream("r", state)
    done = data.draw(st.integers(0, len(versions)))
    if done:
        stream.chunk(output(tokens[:done]))
    rest = stream.rest()
    assert rest.tokens == tokens[done:] and rest.versions == versions[done:] and rest.finish_reason is None
    assert rest.logprobs == [-float(token) for token in tokens[done:]]
    assert stream.rest().tokens == Stream("r", None).rest().tokens == []


def test_core_stats_are_those_of_the_last_step_and_preemptions_add_up() -> None:
    stats = CoreStats()
    stats.record(SimpleNamespace(kv_cache_usage=0.25, num_waiting_reqs=2, num_skipped_waiting_reqs=1), None)
    stats.record(None, None)
    assert (stats.kv_used_fraction, stats.waiting) == (0.25, 3)
    for events in (None, [], [SimpleNamespace(type=2), SimpleNamespace(type=3)], [SimpleNamespace(type=3)]):
        stats.count_preemptions(None, SimpleNamespace(events=events), 0.0, None)
    assert stats.preemptions == 2
