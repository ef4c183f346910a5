"""From chunks to segments: however they are cut, the buffer gets each token once, in order, one version to a segment."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.buffer.wire import Leased
from asyncrl.generators.engine import Chunk
from asyncrl.generators.rollout_stream import RolloutStream


class Box:
    """Takes segments as the outbox does, and says of each whether the lease held."""

    def __init__(self, holds=True):
        self.segments, self.holds = [], holds

    def put(self, segments):
        assert segments
        self.segments.append(segments)
        taken = asyncio.get_running_loop().create_future()
        taken.set_result(self.holds)
        return taken


def lease(tokens=(), spans=()):
    return Leased(
        rollout_id=5,
        lease_id=6,
        group_id=1,
        prompt_tokens=np.int32([1, 2]).tobytes(),
        tokens=np.int32(tokens).tobytes(),
        finish_reason="",
        payload="{}",
        spans=list(spans),
    )


def chunk(tokens, versions):
    return Chunk(tokens=tokens, logprobs=[-t / 8 for t in tokens], versions=versions)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 3), max_size=9), max_size=12),
    st.integers(1, 20),
    st.sampled_from(["", "stop"]),
    st.integers(0, 3),
)
def test_segments_join_to_what_was_sampled(cuts, flush_tokens, reason, prefix):
    async def run():
        box = Box()
        stream = RolloutStream(lease([9] * prefix, [(0, prefix)] if prefix else []), box, flush_tokens)
        said, versions, number = [9] * prefix, [0] * prefix, 100
        for chunk_versions in cuts:
            tokens = list(range(number, number + len(chunk_versions)))
            number += len(tokens)
            stream.add(chunk(tokens, chunk_versions))
            said += tokens
            versions += chunk_versions
            if stream.due:
                assert await stream.send()
            unsent = len(said) - prefix - sum(len(s.tokens) for some in box.segments for s in some)
            assert unsent < max(1, 3 * flush_tokens // 4)
        assert stream.answer == said and stream.versions == versions
        assert await (stream.finish(reason) if reason else stream.flush())
        return [s for some in box.segments for s in some], said, versions

    segments, said, versions = asyncio.run(run())
    at = prefix
    for segment in segments:
        assert segment.start == at and segment.rollout_id == 5 and segment.lease_id == 6
        assert segment.tokens == said[at : at + len(segment.tokens)]
        assert {segment.version} >= set(versions[at : at + len(segment.tokens)])
        assert segment.logprobs == [-t / 8 for t in segment.tokens]
        at += len(segment.tokens)
    assert at == len(said)
    assert [s.finish_reason for s in segments] == [""] * (len(segments) - bool(reason)) + [reason] * bool(
        reason
    )


def test_what_the_environment_said_is_a_segment_of_its_own_without_logprobs():
    async def run():
        box = Box()
        stream = RolloutStream(lease([7, 7, 0], [(2, 3)]), box, 32)
        stream.add_environment([40, 41])
        assert stream.turn_tokens == 0
        stream.add(chunk([50, 51, 52], [3, 3, 3]))
        assert stream.turn_tokens == 3 and stream.due
        assert stream.versions == [2, 2, 2, ENVIRONMENT, ENVIRONMENT, 3, 3, 3]
        await stream.flush()
        (segments,) = box.segments
        assert [(s.version, s.start, s.tokens) for s in segments] == [
            (ENVIRONMENT, 3, [40, 41]),
            (3, 5, [50, 51, 52]),
        ]
        assert segments[0].logprobs == [0.0, 0.0]
        await stream.finish("stop")  # nothing is left: an empty last segment says so
        ((last,),) = box.segments[1:]
        assert (last.start, last.tokens, last.version, last.finish_reason) == (8, [], 3, "stop")

    asyncio.run(run())


@pytest.mark.parametrize("call", ["flush", "finish", "send"])
def test_a_lost_lease_is_heard_at_the_next_step(call):
    async def run():
        stream = RolloutStream(lease(), Box(holds=False), 4)
        stream.add(chunk([1], [0]))
        if call == "send":
            assert await stream.send()
        assert not await {
            "flush": stream.flush,
            "send": stream.send,
            "finish": lambda: stream.finish("stop"),
        }[call]()

    asyncio.run(run())
