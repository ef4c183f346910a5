"""A fetch that was called off for a later version: what it had asked for is still answered, to the same name."""

import asyncio

import pytest
import zmq
import zmq.asyncio

from asyncrl.weight_sync import chunks, sockets
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.pulling import Puller
from tests.chunk_worlds import Bytes, small_plan


class Server:
    """Answers when it is told to, in any order."""

    def __init__(self):
        self._context = zmq.asyncio.Context()
        self._socket, self.endpoint = sockets.router(self._context, "127.0.0.1")

    async def questions(self, count):
        frames = [await self._socket.recv_multipart() for _ in range(count)]
        return [(name, chunks.decode_question(question)) for name, question in frames]

    async def answer(self, asked, version):
        for name, get in asked:
            body = version.view[get.start : get.start + get.size]
            await self._socket.send_multipart(
                [name, chunks.encode(chunks.Chunk(question=get.question)), body]
            )

    async def refuse(self, asked):
        for name, get in asked:
            refused = chunks.encode(chunks.Refused(question=get.question, reason="it is not open any more"))
            await self._socket.send_multipart([name, refused])

    def close(self):
        self._socket.close(linger=0)
        self._context.term()


@pytest.mark.parametrize("late", ["answer", "refuse"])
def test_answers_to_a_fetch_that_was_called_off_are_not_taken_for_the_next_one_s(late):
    before = Bytes(small_plan(tensors=2))
    after = Bytes(before.plan, seed=1)

    async def scenario():
        server, puller = Server(), Puller("e0")
        try:
            fetch = asyncio.create_task(puller.fetch(before.offer(0, server.endpoint), 20))
            old = await server.questions(len(before.plan.buckets))
            fetch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetch
            fetch = asyncio.create_task(puller.fetch(after.offer(1, server.endpoint), 20))
            new = await server.questions(len(after.plan.buckets))
            assert {name for name, _ in old} == {name for name, _ in new}
            await (server.answer(old, before) if late == "answer" else server.refuse(old))
            await server.answer(new, after)
            assert after.is_in(await fetch)
        finally:
            puller.close()
            server.close()

    asyncio.run(scenario())


def test_a_refusal_of_what_was_asked_ends_the_fetch():
    version = Bytes(small_plan(tensors=2))

    async def scenario():
        server, puller = Server(), Puller("e0")
        try:
            fetch = asyncio.create_task(puller.fetch(version.offer(0, server.endpoint), 20))
            await server.refuse(await server.questions(1))
            with pytest.raises(WeightSyncError, match="not open any more"):
                await fetch
        finally:
            puller.close()
            server.close()

    asyncio.run(scenario())
