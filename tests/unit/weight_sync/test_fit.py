"""Whether a plan is an engine's model, from what its workers took of it."""

from asyncrl.weight_sync.fit import Fit, misfit
from asyncrl.weight_sync.plan import make_plan

PLAN = make_plan([("a", "float32", (8, 4)), ("b", "float32", (4,)), ("c", "float32", ())], 1024)
WHOLE = {"a": 32, "b": 4, "c": 1}


def test_what_one_worker_takes_whole_fits():
    assert misfit(PLAN, [Fit(taken=WHOLE)]) == ""


def test_workers_that_take_slices_of_one_and_copies_of_another_fit():
    assert misfit(PLAN, [Fit(taken={"a": 16, "b": 4, "c": 1})] * 2) == ""
    uneven = [Fit(taken={"a": 28, "b": 4, "c": 1}), Fit(taken={"a": 4, "b": 4, "c": 1})]
    assert misfit(PLAN, uneven) == ""


def test_a_tensor_that_is_cut_is_named():
    assert (
        misfit(PLAN, [Fit(taken=WHOLE | {"a": 24})])
        == "1 too large: a (8, 4) has 32 elements, 24 have a place"
    )
    assert misfit(PLAN, [Fit(taken=WHOLE | {"a": 15})] * 2).startswith("1 too large: a (8, 4)")
    assert misfit(PLAN, [Fit(taken={"a": 32, "b": 4})]).startswith("1 too large: c ()")


def test_a_parameter_without_bytes_is_named_whichever_worker_has_it():
    found = misfit(PLAN, [Fit(taken=WHOLE), Fit(taken=WHOLE, lacking={"qkv": (4, 32)})])
    assert found == "1 lacking: qkv 4 of 32 elements get no bytes"


def test_what_a_loader_refuses_comes_first_with_the_shape_that_was_offered():
    fits = [Fit(refused={"a": "AssertionError: 7 != 8"}, lacking={"q": (1, 1)})]
    assert misfit(PLAN, fits) == "1 refused: a (8, 4): AssertionError: 7 != 8"


def test_many_are_counted_and_three_are_named():
    found = misfit(PLAN, [Fit(taken=WHOLE, lacking={f"p{i}": (1, 2) for i in range(9)})])
    assert (
        found.startswith("9 lacking: p0 ") and "p2" in found and "p3" not in found and found.endswith("; ...")
    )
