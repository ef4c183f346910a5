"""The log read back: torn ends, shards and generations, failed attempts, and files that are gone."""

import asyncio
import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.buffer import BufferClient, reading, wire
from asyncrl.buffer.log import LAYOUTS
from asyncrl.buffer.reading import LogError, RolloutLog, generations, read_log, rollouts_table
from tests import rollout_logs
from tests.buffers import admit_all, buffer_service, segment
from tests.rollout_logs import LogWriter


def rows(folder, **options):
    return {r["rollout_id"]: r for r in rollouts_table(read_log(folder), **options).to_pylist()}


def test_the_writer_of_the_run_and_of_these_tests_agree_on_the_layout():
    assert {name: dict(zip(s.names, s.types, strict=True)) for name, s in LAYOUTS.items()} == {
        name: dict(zip(s.names, s.types, strict=True)) for name, s in rollout_logs.LAYOUTS.items()
    }


def test_a_whole_life_becomes_one_row(tmp_path):
    log = LogWriter(tmp_path)
    log.state(0, "PUBLISHED", group_id=0)
    log.admit(1, [4, 5], tokens=[7, 8, 9])
    log.state(4, "LEASED", lease_id=1, engine_id="a-0")
    log.segment(4, 0, [10, 11], version=0, lease_id=1, logprob=-0.25)
    log.state(4, "QUEUED", reason="engine lost", engine_id="")
    log.state(4, "LEASED", lease_id=3, engine_id="b-1", version=1)
    log.segment(4, 2, [12], version=1, lease_id=3)
    log.segment(4, 3, [], version=1, lease_id=3, finish="stop")
    log.state(4, "COMPLETE", lease_id=3, engine_id="b-1", version=1, reason="stop")
    log.state(4, "SCORED", lease_id=3, engine_id="b-1", version=1, reward=0.5, cost=0.25)
    log.state(4, "BATCHED", batch_id=9, version=1)
    log.state(4, "TRAINED", batch_id=9, version=2)
    table = rollouts_table(read_log(tmp_path))
    trained, queued = table.to_pylist()
    assert trained == {
        "rollout_id": 4,
        "group_id": 1,
        "prompt_id": "sums#1",
        "state": "TRAINED",
        "reward": 0.5,
        "cost": 0.25,
        "greedy": False,
        "finish_reason": "stop",
        "attempts": 0,
        "engines": ["a-0", "b-1"],
        "tokens_count": 3,
        "environment_tokens": 0,
        "first_version": 0,
        "last_version": 1,
        "batch_id": 9,
        "step": 2,
        "reason": "",
        "admitted_unix_s": 1001.0,
        "ended_unix_s": 1013.0,
        "tokens": [10, 11, 12],
        "logprobs": [-0.25, -0.25, -0.5],
        "versions": [0, 0, 1],
        "prompt_tokens": [7, 8, 9],
        "payload": '{"question": "1+1=", "answer": "2"}',
    }
    assert queued["state"] == "QUEUED" and queued["finish_reason"] == "" and queued["tokens"] == []
    unknown = (
        "reward",
        "cost",
        "first_version",
        "last_version",
        "batch_id",
        "step",
        "reason",
        "ended_unix_s",
    )
    assert all(queued[name] is None for name in unknown)
    kinds = {"tokens": pa.int32(), "logprobs": pa.float32(), "versions": pa.int32()}
    assert {name: table.schema.field(name).type.value_type for name in kinds} == kinds


@pytest.mark.parametrize("name", ["prompts", "segments", "states"])
def test_a_torn_end_is_left_out_at_every_byte(tmp_path, name):
    log = LogWriter(tmp_path)
    log.admit(1, [1])
    log.live(1, [3, 4], 1.0)
    path, whole = log.path(name), len(getattr(read_log(tmp_path), name))
    before = path.stat().st_size
    if name == "prompts":
        log.admit(2, [2])
    elif name == "segments":
        log.segment(1, 2, [5, 6, 7])
    else:
        log.state(1, "BATCHED", batch_id=1)
    data = path.read_bytes()
    for size in range(before, len(data) + 1):
        path.write_bytes(data[:size])
        found = read_log(tmp_path)
        assert len(getattr(found, name)) == whole + (size == len(data)), size
        assert found.notes == ()
        assert rollouts_table(found).num_rows >= 1


def test_a_file_that_is_torn_before_its_first_row_is_empty(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1])
    path = log.path("segments")
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        found = read_log(tmp_path)
        assert len(found.segments) == 0 and found.notes == () and found.segments.schema.names[-1] == "shard"
        assert rollouts_table(found)["tokens"].to_pylist() == [[]]


@pytest.mark.parametrize("wrong", [b"rott", b"\0\0\0\0", b"\xff\xff\xff\xff\x10\0\0\0" + b"\xee" * 16])
def test_a_file_that_is_damaged_before_its_end_is_told_of(tmp_path, wrong):
    log = LogWriter(tmp_path)
    log.admit(1, [1])
    path = log.path("states")
    second = path.stat().st_size
    log.state(1, "LEASED")
    log.state(1, "COMPLETE")
    data = path.read_bytes()
    path.write_bytes(data[:second] + wrong + data[second + len(wrong) :])
    found = read_log(tmp_path)
    assert len(found.states) == 1
    (note,) = found.notes
    assert f"states-000001.arrows is damaged at byte {second:,} of" in note and "1 rows before" in note


def test_shards_and_generations_come_in_order(tmp_path):
    for shard in (10, 2):
        log = LogWriter(tmp_path, shard)
        ids = range(shard * 100, shard * 100 + 4)
        for i, rollout_id in enumerate(ids):
            log.admit(shard * 10 + i, [rollout_id])
            log.state(rollout_id, "LEASED", engine_id="a-0", lease_id=1, group_id=shard * 10 + i)
            log.rotate((2, 999_999, 1_000_000, 1_000_001)[i])
        # Segments may lie in later generations than the admission.
        for rollout_id in reversed(ids):
            log.segment(rollout_id, 0, [rollout_id])
    aside = tmp_path / "2" / "abandoned-000002"
    aside.mkdir()
    (aside / "states-000001.arrows").write_bytes(b"not for readers")
    for name in ("journal-000001", "base-000002.msgpack", "snapshot-00000001.json", "states-x.arrows"):
        (tmp_path / "2" / name).write_bytes(b"not for readers")
    (tmp_path / "notes").mkdir()
    found = read_log(tmp_path)
    assert found.states["shard"].to_pylist() == [2] * 8 + [10] * 8
    for table in (found.prompts, found.segments, found.states):
        order = list(zip(table["shard"].to_pylist(), table["seq"].to_pylist(), strict=True))
        assert order == sorted(order)
    assert [p.name for p in generations(tmp_path / "2", "states")][-2:] == [
        "states-1000000.arrows",
        "states-1000001.arrows",
    ]
    table = rollouts_table(found)
    assert table["rollout_id"].to_pylist() == [*range(200, 204), *range(1000, 1004)]
    assert table["tokens"].to_pylist() == [[i] for i in table["rollout_id"].to_pylist()]
    assert table["prompt_id"].to_pylist() == [f"sums#{g}" for g in table["group_id"].to_pylist()]


def test_tokens_of_the_environment_are_told_apart(tmp_path):
    """Also where a later segment cuts into them, and where there is nothing else."""
    log = LogWriter(tmp_path)
    log.admit(1, [2, 3, 4])
    for rollout_id in (2, 3, 4):
        log.state(rollout_id, "LEASED", lease_id=1)
    for rollout_id in (2, 3):
        log.segment(rollout_id, 0, [10, 11], version=3)
        log.segment(rollout_id, 2, [12, 13, 14], version=-1, logprob=0.0)
        log.segment(rollout_id, 5, [15], version=4)
        log.segment(rollout_id, 6, [16, 17], version=-1, logprob=0.0)
    log.segment(3, 4, [18], version=5)
    log.segment(4, 0, [19], version=-1, logprob=0.0)
    rows = rollouts_table(read_log(tmp_path)).to_pylist()
    found = [[row[name] for name in ("tokens_count", "environment_tokens")] for row in rows]
    assert found == [[8, 5], [5, 2], [1, 1]]
    assert [(row["first_version"], row["last_version"]) for row in rows] == [(3, 4), (3, 5), (None, None)]
    assert rows[1]["versions"] == [3, 3, -1, -1, 5] and rows[1]["tokens"] == [10, 11, 12, 13, 18]


def test_a_segment_replaces_everything_from_its_start_on(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1, 2])
    log.segment(1, 0, [1, 2, 3, 4], version=0)
    log.segment(2, 0, [9], version=0)
    log.segment(1, 4, [5, 6], version=1)
    log.segment(1, 2, [30], version=2)
    log.segment(1, 3, [40, 50], version=3)
    found = rows(tmp_path)
    assert found[1]["tokens"] == [1, 2, 30, 40, 50] and found[1]["versions"] == [0, 0, 2, 3, 3]
    assert found[2]["tokens"] == [9]


def test_a_failed_attempt_leaves_no_token_behind(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1, 2])
    for rollout_id in (1, 2):
        log.state(rollout_id, "LEASED", lease_id=rollout_id, engine_id="a-0")
        log.segment(rollout_id, 0, [1, 2, 3], finish="stop")
        log.state(rollout_id, "COMPLETE", reason="stop")
    assert rows(tmp_path)[1]["tokens"] == [1, 2, 3]
    log.state(1, "QUEUED", attempts=1, reason="reward failed: tried again")
    retried = rows(tmp_path)[1]
    assert retried["tokens"] == [] and retried["finish_reason"] == "" and retried["attempts"] == 1
    log.state(1, "LEASED", attempts=1, lease_id=3, engine_id="b-0")
    log.segment(1, 0, [7], version=1)
    assert rows(tmp_path)[1]["tokens"] == [7] and rows(tmp_path)[1]["versions"] == [1]
    log.state(2, "FAILED", reason="reward failed")
    log.state(1, "DROPPED", attempts=1, reason="a rollout of its group failed")
    found = rows(tmp_path)
    assert found[1]["engines"] == ["a-0", "b-0"] and found[1]["reason"] == "a rollout of its group failed"
    # The last attempt of one that is given up is there to be looked at.
    assert found[2]["state"] == "FAILED" and found[2]["tokens"] == [1, 2, 3] and found[2]["reward"] is None


def test_a_score_does_not_outlive_a_return_to_the_queue(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1])
    log.live(1, [3], 1.0)
    assert rows(tmp_path)[1]["reward"] == 1.0
    log.state(1, "QUEUED", reason="restored")
    assert rows(tmp_path)[1]["reward"] is None


def test_what_was_deleted_is_null_and_never_wrong(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1, 2, 3])
    log.state(1, "LEASED", lease_id=1, engine_id="a-0")
    log.segment(1, 0, [1, 2])
    log.live(2, [5, 6], 1.0, step=1)
    log.rotate()
    log.segment(1, 2, [3], finish="stop")
    log.state(1, "COMPLETE", lease_id=1, engine_id="a-0", reason="stop")
    log.state(2, "DROPPED", reason="gone")
    assert rows(tmp_path)[1]["tokens"] == [1, 2, 3]
    log.path("segments", 1).unlink()
    found = rows(tmp_path)
    for rollout_id in (1, 2):
        for name in ("tokens", "logprobs", "versions", "tokens_count", "finish_reason", "first_version"):
            assert found[rollout_id][name] is None, name
    assert found[3]["tokens"] == [] and found[1]["prompt_tokens"] == [1, 2]
    log.path("prompts", 1).unlink()
    assert rows(tmp_path)[1]["prompt_tokens"] is None and rows(tmp_path)[1]["prompt_id"] is None
    log.path("states", 1).unlink()
    assert sorted(rows(tmp_path)) == [1, 2]


def test_tokens_of_two_attempts_are_not_taken_for_one(tmp_path):
    """The generation with the restart is gone; what is left would tile without a gap."""
    log = LogWriter(tmp_path)
    log.admit(1, [1])
    log.segment(1, 0, [1, 2])
    log.rotate()
    log.state(1, "QUEUED", attempts=1, reason="engine failed: tried again")
    log.segment(1, 0, [7, 8])
    log.rotate()
    log.segment(1, 2, [9], finish="stop")
    log.state(1, "COMPLETE", attempts=1, reason="stop")
    assert rows(tmp_path)[1]["tokens"] == [7, 8, 9]
    for name, generation in (("segments", 2), ("states", 2), ("states", 1)):
        log.path(name, generation).unlink()
        assert rows(tmp_path)[1]["tokens"] is None


def test_a_file_that_vanishes_while_it_is_read_is_a_note(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1])
    log.live(1, [3], 1.0)
    path = log.path("segments")
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")  # listed, and gone when it is opened
    found = read_log(tmp_path)
    assert len(found.notes) == 1 and "segments-000001.arrows is gone" in found.notes[0]
    assert rollouts_table(found)["tokens"].to_pylist() == [None]


def test_what_the_states_name_is_there_when_rows_come_while_the_log_is_read(tmp_path, monkeypatch):
    """Between any two looks at the folder a whole rollout goes by, its rows in the writer's order."""
    log, group_ids = LogWriter(tmp_path), itertools.count(1)

    def looked(*about):
        group_id = next(group_ids)
        log.admit(group_id, [group_id])
        log.live(group_id, [group_id], 1.0, group_id=group_id)
        return generations(*about)

    monkeypatch.setattr(reading, "generations", looked)
    table = rollouts_table(read_log(tmp_path))
    assert table.num_rows >= 1
    assert table["tokens"].to_pylist() == [[i] for i in table["rollout_id"].to_pylist()]
    assert table["prompt_id"].null_count == 0


def test_no_log_and_another_layout_are_told_apart(tmp_path):
    with pytest.raises(LogError, match="holds no rollouts"):
        read_log(tmp_path / "nowhere")
    (tmp_path / "old").mkdir()
    with pytest.raises(LogError, match=r"expected a folder 0 with states-000001\.arrows"):
        read_log(tmp_path / "old")
    LogWriter(tmp_path / "a").admit(1, [1])
    path = tmp_path / "a" / "0" / "states-000001.arrows"
    for schema, message in (
        (pa.schema([("seq", pa.int64())]), "has no column unix_s, rollout_id"),
        (pa.schema([(n, pa.string()) for n in LAYOUTS["states"].names]), "other types than expected"),
    ):
        values = [pa.array(["x"] if kind == pa.string() else [1], kind) for kind in schema.types]
        path.write_bytes(
            bytes(schema.serialize()) + bytes(pa.record_batch(values, schema=schema).serialize())
        )
        with pytest.raises(LogError, match=message):
            read_log(tmp_path / "a")


def test_columns_that_a_later_writer_adds_are_passed_over(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1])
    table = read_log(tmp_path).states.drop_columns("shard")
    wider = table.append_column("mood", pa.array(["good"])).combine_chunks().to_batches()[0]
    log.path("states").write_bytes(bytes(wider.schema.serialize()) + bytes(wider.serialize()))
    assert read_log(tmp_path).states.drop_columns("shard").equals(table)


def test_a_log_without_a_row_gives_empty_tables(tmp_path):
    LogWriter(tmp_path)
    found = read_log(tmp_path)
    table = rollouts_table(found)
    assert table.num_rows == 0 and table.schema.field("tokens").type.value_type == pa.int32()
    assert rollouts_table(found, [1]).num_rows == 0


def test_a_part_of_the_rollouts_and_of_the_columns(tmp_path):
    log = LogWriter(tmp_path)
    log.admit(1, [1, 2, 3])
    for rollout_id in (1, 2, 3):
        log.live(rollout_id, [rollout_id] * rollout_id, 0.0)
    everything, part = rows(tmp_path), rows(tmp_path, rollout_ids=[3, 1, 77])
    assert part == {i: everything[i] for i in (1, 3)}
    short = rows(tmp_path, values=False)
    long = {"tokens", "logprobs", "versions", "prompt_tokens", "payload"}
    assert short == {i: {n: v for n, v in row.items() if n not in long} for i, row in everything.items()}


SEGMENT = st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(0, 5), st.integers(0, 3))


@given(st.lists(SEGMENT, max_size=25))
def test_any_segments_leave_what_replacing_in_order_leaves(segments):
    """Against the rule, applied row by row: (rollout, start, tokens, version), a gap makes the answer unknown."""
    expected = {rollout_id: ([], []) for rollout_id in (1, 2, 3)}
    gaps: dict[int, int] = {}
    columns = {name: [] for name in rollout_logs.LAYOUTS["segments"].names}
    for seq, (rollout_id, start, count, version) in enumerate(segments):
        tokens = [100 * seq + i for i in range(count)]
        row = (seq, 0.0, rollout_id, 1, start, version, "", tokens, [float(t) for t in tokens])
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
        held, versions = expected[rollout_id]
        if start > len(held):
            gaps[rollout_id] = min(gaps.get(rollout_id, start), len(held))
        held += [None] * (start - len(held))
        versions += [None] * (start - len(versions))
        held[start:], versions[start:] = tokens, [version] * count
    states = pa.Table.from_pylist(
        [
            {"seq": -4 + i, "unix_s": 0.0, "rollout_id": i, "group_id": 1, "state": "QUEUED", "version": 0}
            | {
                "lease_id": 0,
                "attempts": 0,
                "batch_id": 0,
                "engine_id": "",
                "reason": "",
                "reward": 0.0,
                "cost": 0.0,
            }
            for i in expected
        ],
        rollout_logs.LAYOUTS["states"],
    )
    log = RolloutLog(
        prompts=rollout_logs.LAYOUTS["prompts"].empty_table(),
        segments=pa.table(columns, schema=rollout_logs.LAYOUTS["segments"]),
        states=states,
    )
    for row in rollouts_table(log).to_pylist():
        held, versions = expected[row["rollout_id"]]
        if None in held or _ends_in_the_air(segments, row["rollout_id"]):
            assert row["tokens"] is None
        else:
            assert row["tokens"] == held and row["versions"] == versions
            assert row["logprobs"] == np.array(held, np.float32).tolist()
            assert row["tokens_count"] == len(held)


def _ends_in_the_air(segments, rollout_id):
    """An empty segment that stands past the last token that is there: something before it is gone."""
    own = [(start, count) for r, start, count, _ in segments if r == rollout_id]
    length, air = 0, False
    for start, count in own:
        air = start > length if not count else (air and start > length)
        length = start + count
    return air


async def _work(address):
    """Every rollout in two segments of different versions; the first is tried twice and stays with its engine."""
    async with BufferClient(address) as client:
        assert await admit_all(client, 8) == 8
        leases = await client.lease("a-0", 16, 5.0)
        first = leases[0]
        await client.append("a-0", [segment(first.rollout_id, first.lease_id, 0, [99] * 5)])
        await client.fail(first.rollout_id, first.lease_id, "no luck")
        again = await client.lease("b-0", 1, 5.0)
        for lease in [*again, *leases[1:]]:
            own, lease_id = lease.rollout_id, lease.lease_id
            await client.append("a-0", [segment(own, lease_id, 0, range(own), logprob=-0.25)])
            await client.append("a-0", [segment(own, lease_id, own, [7], version=1, finish_reason="stop")])
            await client.score([wire.Scored(own, lease_id, float(own))])
        return first.rollout_id


def test_the_log_of_a_real_buffer_says_what_its_batches_said(tmp_path):
    """Two shards, read while they serve, over a snapshot (which begins a new generation) and a restart."""
    with buffer_service(tmp_path, prompts_per_step=4, shards=2) as (buffer, client):
        client.publish(0)
        retried = asyncio.run(_work(buffer.address))
        client.snapshot(0)
        selection, batch = client.read_batch(5.0)
        buffer.again()
        found = rows(tmp_path / "rollouts")
        shared = ("group_id", "prompt_tokens", "tokens", "logprobs", "versions", "reward", "finish_reason")
        for row in batch.to_pylist():
            told = found[row["rollout_id"]]
            assert {name: told[name] for name in shared} == {name: row[name] for name in shared}
            assert told["state"] == "BATCHED" and told["step"] is None
        assert found[retried]["attempts"] == 1 and found[retried]["engines"] == ["a-0", "b-0"]
        client.commit(selection.batch_ids, 1)
        log = read_log(tmp_path / "rollouts")
        assert log.notes == () and set(log.states["shard"].to_pylist()) == {0, 1}
        trained = rollouts_table(log, batch["rollout_id"].to_pylist())
        assert trained["step"].to_pylist() == [1] * 8 and len(log.prompts) == 8
