from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.buffer.schema import BATCH, ENVIRONMENT
from asyncrl.learner.batch import make_microbatches, read_table, split_groups
from asyncrl.learner.division import divide
from asyncrl.learner.rows import assemble, rows_of

TOKENS = st.lists(st.integers(0, 50), min_size=1, max_size=12)


def test_columns_are_the_tables_lists_end_to_end(make_table: Callable[..., pa.Table]) -> None:
    table = make_table()
    # Several chunks and an offset into them: what a table looks like after slicing and concatenating.
    batch = read_table(pa.concat_tables([table.slice(0, 3), table.slice(3, 9), table.slice(12)]).slice(2, 13))
    rows = table.slice(2, 13).to_pylist()
    assert batch.rows == 13 and batch.tokens == sum(len(row["tokens"]) for row in rows)
    assert batch.sequences.prompts.tolist() == [t for row in rows for t in row["prompt_tokens"]]
    assert batch.sequences.answers.tolist() == [t for row in rows for t in row["tokens"]]
    assert batch.versions.tolist() == [v for row in rows for v in row["versions"]]
    assert batch.trainable.tolist() == [f for row in rows for f in row["trainable"]]
    np.testing.assert_array_equal(batch.behaviour, np.float32([x for row in rows for x in row["logprobs"]]))
    owner = batch.sequences.row_of_token()
    assert owner.tolist() == [i for i, row in enumerate(rows) for _ in row["tokens"]]


def test_number_columns_share_memory_with_the_table(make_table: Callable[..., pa.Table]) -> None:
    table = make_table()
    batch = read_table(table)
    address = table.column("logprobs").chunk(0).values.buffers()[1].address
    assert batch.behaviour.__array_interface__["data"][0] == address


def test_what_is_no_batch_is_refused(make_table: Callable[..., pa.Table]) -> None:
    table = make_table()
    with pytest.raises(ValueError, match="must have the schema"):
        read_table(table.drop_columns(["reward"]))
    with pytest.raises(ValueError, match="no rows"):
        read_table(table.slice(0, 0))
    short = table.column("logprobs").to_pylist()
    short[5] = short[5][:-1]
    broken = table.set_column(4, BATCH.field("logprobs"), pa.array(short, BATCH.field("logprobs").type))
    with pytest.raises(ValueError, match="rollout 105: logprobs has"):
        read_table(broken)
    empty = table.column("prompt_tokens").to_pylist()
    empty[2] = []
    broken = table.set_column(
        2, BATCH.field("prompt_tokens"), pa.array(empty, BATCH.field("prompt_tokens").type)
    )
    with pytest.raises(ValueError, match="rollout 102 has no prompt tokens"):
        read_table(broken)


def test_a_trainable_token_of_the_environment_is_refused(make_table: Callable[..., pa.Table]) -> None:
    table = make_table(masked=0.0)
    versions = table.column("versions").to_pylist()
    versions[3][-1] = ENVIRONMENT
    field = BATCH.field("versions")
    broken = table.set_column(BATCH.names.index("versions"), field, pa.array(versions, field.type))
    place = len(versions[3]) - 1
    with pytest.raises(ValueError, match=f"rollout 103: token {place} is the environment's"):
        read_table(broken)


def test_costs_and_baselines_are_read_and_a_baseline_is_never_trained(
    make_table: Callable[..., pa.Table],
) -> None:
    table = make_table()
    trainable, greedy = table.column("trainable").to_pylist(), [i % 4 == 0 for i in range(table.num_rows)]
    trainable = [[False] * len(t) if g else t for t, g in zip(trainable, greedy, strict=True)]
    for name, values in (("greedy", greedy), ("trainable", trainable)):
        column = pa.array(values, BATCH.field(name).type)
        table = table.set_column(BATCH.names.index(name), BATCH.field(name), column)
    batch = read_table(pa.concat_tables([table.slice(0, 3), table.slice(3)]).slice(2))
    assert batch.greedy.dtype == bool and batch.greedy.tolist() == greedy[2:]
    assert batch.cost.dtype == np.float32 and batch.cost.tolist() == table.column("cost").to_pylist()[2:]
    trainable[4][-1] = True
    column = pa.array(trainable, BATCH.field("trainable").type)
    broken = table.set_column(BATCH.names.index("trainable"), BATCH.field("trainable"), column)
    with pytest.raises(
        ValueError, match="rollout 104: it is its group's greedy baseline and has trainable tokens"
    ):
        read_table(broken)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.integers(1, 12))
def test_minibatches_hold_whole_groups(sizes: list[int], minibatches: int) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    parts = split_groups(group, minibatches)
    assert len(parts) == min(minibatches, len(sizes))
    assert np.concatenate(parts).tolist() == list(range(len(group)))
    counts = [len(set(group[part].tolist())) for part in parts]
    assert sum(counts) == len(sizes) and max(counts) - min(counts) <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.lists(st.integers(0, 50), max_size=12)), min_size=1, max_size=8))
def test_a_forward_pass_predicts_each_answer_token_from_what_came_before(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    part = assemble(rows_of(pairs), np.arange(len(pairs)))
    ends = np.cumsum(part.packing.lengths)
    assert ends[-1] == part.input_ids.shape[1] == part.position_ids.shape[1]
    want = []
    for (prompt, answer), end, length in zip(pairs, ends, part.packing.lengths, strict=True):
        start, full = end - length, [*prompt, *answer]
        assert part.input_ids[0, start:end].tolist() == (full[:-1] or full)
        assert part.position_ids[0, start:end].tolist() == list(range(length))
        want += [(start + len(prompt) - 1 + j, token) for j, token in enumerate(answer)]
    seen = list(zip(part.predictors.tolist(), part.targets.tolist(), strict=True))
    assert seen == want
    assert part.padding == 0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_answer_token_is_on_one_rank_once(make_table: Callable[..., pa.Table], ranks: int) -> None:
    batch = read_table(make_table(groups=3))
    rows = np.arange(batch.rows)
    passes = [make_microbatches(batch, rows, 64, rank, ranks) for rank in range(ranks)]
    assert len({len(own) for own in passes}) == 1
    places = np.concatenate([part.place.numpy() for own in passes for part in own])
    assert sorted(places.tolist()) == list(range(batch.tokens))
    for part in (part for own in passes for part in own):
        np.testing.assert_array_equal(batch.sequences.answers[part.place.numpy()], part.targets.numpy())


def test_more_ranks_than_rows_leaves_empty_passes(make_table: Callable[..., pa.Table]) -> None:
    batch = read_table(make_table(groups=1, rollouts=2))
    (part,) = make_microbatches(batch, np.arange(2), 1000, 2, 3)
    assert part.input_ids.shape == (1, 1) and not len(part.targets)


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_a_long_tail_is_computed_with_hardly_any_padding(ranks: int) -> None:
    """All that runs is counted: rows of every rank's passes, the empty ones too, and attention's rectangles."""
    random = np.random.default_rng(ranks)
    lengths = np.exp(random.normal(6.5, 1.0, 256)).clip(16, 10_240).astype(int)
    rows = rows_of([([1] * 8, [2] * (length - 8)) for length in lengths])
    passes = [[assemble(rows, part) for part in own] for own in divide(rows.lengths, 16_384, ranks, 12_288.0)]
    parts = [part for own in passes for part in own]
    assert lengths.max() > 5_000 and len({len(own) for own in passes}) == 1
    computed = sum(part.input_ids.numel() for part in parts)
    attended = sum(count * length for part in parts for count, length in part.packing.runs())
    tokens = int(lengths.sum())
    # The last token of a rollout predicts nothing and does not run.
    assert computed == attended == tokens - len(lengths) + sum(part.padding for part in parts)
    assert sum(part.padding for part in parts) <= 0.05 * tokens


def test_what_runs_for_nothing_is_counted_as_padding() -> None:
    rows = rows_of([([1, 2], [3, 4])])
    passes = [[assemble(rows, part) for part in own] for own in divide(rows.lengths, 100, 3)]
    assert sorted(part.padding for own in passes for part in own) == [0, 1, 1]
