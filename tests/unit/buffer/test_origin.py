"""Tokens of an environment on their whole way: from an engine over the socket, in a lease, in a batch, in the log."""

import asyncio

import numpy as np
import pytest

from asyncrl.buffer import BufferClient, Segment
from asyncrl.buffer.columns import slices
from asyncrl.buffer.errors import BadRequest
from asyncrl.buffer.reading import read_log, rollouts_table
from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.buffer.wire import Scored
from tests.buffers import admit_all, buffer_service


def piece(lease, start, tokens, version, finish_reason=""):
    return Segment(
        rollout_id=lease.rollout_id,
        lease_id=lease.lease_id,
        start=start,
        version=version,
        tokens=tokens,
        logprobs=[0.0 if version == ENVIRONMENT else -0.5] * len(tokens),
        finish_reason=finish_reason,
    )


@pytest.mark.parametrize("shards", [1, 2])
def test_origin_on_its_whole_way(tmp_path, shards):
    with buffer_service(tmp_path, prompts_per_step=2, shards=shards) as (buffer, reader):
        reader.publish(0)

        async def two_turns_on_two_engines():
            async with BufferClient(buffer.address) as client:
                await admit_all(client, 2)
                leases = []
                while more := await client.lease("a", 1000, 0.1):
                    leases += more
                for lease in leases:
                    assert lease.spans == []
                    await client.append("a", [piece(lease, 0, [10, 11], 0)])
                    await client.append("a", [piece(lease, 2, [7, 8, 9], ENVIRONMENT)])
                    with pytest.raises(BadRequest):
                        await client.append("a", [piece(lease, 5, [1], ENVIRONMENT - 1)])
                await client.release([(lease.rollout_id, lease.lease_id) for lease in leases])
                leases = []
                while more := await client.lease("b", 1000, 0.1):
                    leases += more
                for lease in leases:
                    assert [tuple(span) for span in lease.spans] == [(0, 2), (ENVIRONMENT, 3)]
                    assert np.frombuffer(lease.tokens, np.int32).tolist() == [10, 11, 7, 8, 9]
                    await client.append("b", [piece(lease, 5, [12], 0, "stop")])
                    await client.score([Scored(lease.rollout_id, lease.lease_id, 1.0)])

        asyncio.run(two_turns_on_two_engines())
        selection, rows = reader.read_batch(10.0)
        assert selection.tokens == selection.trainable_tokens == 3 * rows.num_rows
        for versions, trainable, logprobs in zip(
            *(slices(rows[name]) for name in ("versions", "trainable", "logprobs")), strict=True
        ):
            assert versions.tolist() == [0, 0, -1, -1, -1, 0]
            assert trainable.tolist() == [True, True, False, False, False, True]
            assert logprobs.tolist() == [-0.5, -0.5, 0.0, 0.0, 0.0, -0.5]
        reader.commit(selection.batch_ids, 1)
        report = reader.status()
        assert (report.spanning_trained, report.most_versions) == (0, 1)
        table = rollouts_table(read_log(tmp_path / "rollouts"))
        assert table["environment_tokens"].to_pylist() == [3] * rows.num_rows
        assert table["versions"].to_pylist() == [[0, 0, -1, -1, -1, 0]] * rows.num_rows
