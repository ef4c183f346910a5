"""Which requests have their KV cache computed anew: the formula's sides, each pulled alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.in_flight import (
    LOSS_PER_VERSION,
    PREFILL_SHARE,
    AnswerLengths,
    RequestFacts,
    expected_tokens,
    is_recomputed,
)

counts = st.integers(0, 100_000)
facts_of = st.builds(
    RequestFacts,
    prefix_tokens=counts,
    answered_tokens=counts,
    left_tokens=counts,
    drift_versions=st.integers(0, 50),
)
means = st.none() | st.floats(1, 50_000)


def facts(prefix=1000, answered=500, left=4000, drift=1):
    return RequestFacts(
        prefix_tokens=prefix, answered_tokens=answered, left_tokens=left, drift_versions=drift
    )


@given(facts_of, means)
def test_keep_and_recompute_do_not_ask(some, mean):
    assert is_recomputed("recompute", some, mean)
    assert not is_recomputed("keep", some, mean)


@given(facts_of, means)
def test_what_is_expected_is_within_the_budget(some, mean):
    assert 0 <= expected_tokens(some, mean) <= some.left_tokens


def test_what_is_expected():
    assert expected_tokens(facts(answered=100), 1000) == 900
    assert expected_tokens(facts(answered=500), 1000) == 500
    assert expected_tokens(facts(answered=3000), 1000) == 3000
    assert expected_tokens(facts(answered=3000, left=10), 1000) == 10
    assert expected_tokens(facts(), None) == 4000


def test_the_boundary_is_where_gain_equals_cost():
    # 32 * 1/32 = 1 token of cost; 20 expected * 0.05 = 1 token of gain.
    prefix, expected = round(1 / PREFILL_SHARE), round(1 / LOSS_PER_VERSION)
    assert is_recomputed("auto", facts(prefix=prefix, answered=0, left=expected), None)
    assert not is_recomputed("auto", facts(prefix=prefix + 1, answered=0, left=expected), None)
    assert not is_recomputed("auto", facts(prefix=prefix, answered=0, left=expected - 1), None)
    assert is_recomputed("auto", facts(prefix=2 * prefix, answered=0, left=expected, drift=2), None)


@given(facts_of, means)
def test_an_older_cache_and_a_shorter_prefix_never_speak_against(some, mean):
    if is_recomputed("auto", some, mean):
        older = facts(some.prefix_tokens, some.answered_tokens, some.left_tokens, some.drift_versions + 1)
        shorter = facts(some.prefix_tokens // 2, some.answered_tokens, some.left_tokens, some.drift_versions)
        assert is_recomputed("auto", older, mean) and is_recomputed("auto", shorter, mean)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60))
def test_the_first_answers_count_alike(lengths):
    seen = AnswerLengths()
    for tokens in lengths:
        seen.add(tokens)
    assert seen.mean_tokens == pytest.approx(sum(lengths) / len(lengths))


def test_the_mean_follows_answers_that_grow():
    seen = AnswerLengths()
    for _ in range(1000):
        seen.add(100)
    for _ in range(200):
        seen.add(1000)
    assert 900 < seen.mean_tokens < 1000
