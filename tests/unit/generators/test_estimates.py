"""avg@k, pass@k and maj@k against counting by hand: over every subset, and over every draw."""

import itertools
import math
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.estimates import maj_at_k, over_prompts, pass_at_k


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right, data):
    k = data.draw(st.integers(1, len(right)))
    brute = mean(float(any(chosen)) for chosen in itertools.combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(brute, abs=1e-12)


@given(st.integers(1, 400), st.data())
def test_pass_at_k_rises_with_k_and_is_the_mean_at_1(answers, data):
    right = data.draw(st.integers(0, answers))
    values = [pass_at_k(answers, right, k) for k in range(1, answers + 1)]
    assert values[0] == pytest.approx(right / answers, abs=1e-12)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] == float(right > 0)


@pytest.mark.parametrize(("answers", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 5), (4, 2, 0)])
def test_pass_at_k_refuses_what_cannot_be(answers, right, k):
    with pytest.raises(ValueError, match="expected 0 <= right <= answers"):
        pass_at_k(answers, right, k)


def brute_majority(finals, right):
    """Draws a tied answer, then one of those that gave it: over all draws."""
    if not any(finals):
        return 0.0
    counts = {final: finals.count(final) for final in finals if final}
    winners = [final for final, count in counts.items() if count == max(counts.values())]
    return mean(
        mean(float(r) for final, r in zip(finals, right, strict=True) if final == winner)
        for winner in winners
    )


@given(
    st.lists(st.tuples(st.sampled_from(["", "1", "2", "3"]), st.booleans()), min_size=1, max_size=9),
    st.data(),
)
def test_maj_at_k_is_the_mean_over_parts_of_what_drawing_gives(answers, data):
    finals, right = [f for f, _ in answers], [r for _, r in answers]
    k = data.draw(st.integers(1, len(answers)))
    parts = [
        brute_majority(finals[i * k : i * k + k], right[i * k : i * k + k]) for i in range(len(finals) // k)
    ]
    assert maj_at_k(finals, right, k) == pytest.approx(mean(parts), abs=1e-12)


@given(st.lists(st.sampled_from("abc"), min_size=3, max_size=5), st.data())
def test_maj_at_k_has_no_bias(finals, data):
    """Over every order of the answers the parts give what every subset of k gives."""
    k = data.draw(st.integers(1, len(finals)))
    right = [final == "a" for final in finals]
    orders = itertools.permutations(finals)
    found = mean(maj_at_k(list(order), [final == "a" for final in order], k) for order in orders)
    subsets = itertools.combinations(zip(finals, right, strict=True), k)
    assert found == pytest.approx(
        mean(brute_majority([f for f, _ in s], [r for _, r in s]) for s in subsets), abs=1e-9
    )


@pytest.mark.parametrize(
    ("finals", "right", "expected"),
    [
        (["7", "7", "8"], [True, True, False], 1.0),
        (["7", "8", "8"], [True, False, False], 0.0),
        (["7", "8"], [True, False], 0.5),  # a tie: one of the two is drawn
        (["", "", "8"], [False, False, True], 1.0),  # no answer, no vote
        (["", ""], [False, False], 0.0),
    ],
)
def test_majorities(finals, right, expected):
    assert maj_at_k(finals, right, len(finals)) == expected


@pytest.mark.parametrize(("finals", "right", "k"), [(["1"], [True], 2), (["1"], [], 1), (["1"], [True], 0)])
def test_maj_at_k_refuses_what_cannot_be(finals, right, k):
    with pytest.raises(ValueError, match="expected 1 <= k <= answers"):
        maj_at_k(finals, right, k)


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_the_standard_error_is_that_of_the_mean(values):
    found = over_prompts(values)
    assert found.value == pytest.approx(mean(values), abs=1e-9)
    assert found.standard_error == pytest.approx(stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_one_prompt_has_no_spread():
    found = over_prompts([0.5])
    assert found.value == 0.5 and math.isnan(found.standard_error)
