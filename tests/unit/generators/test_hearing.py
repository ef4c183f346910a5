"""Tokens of unproven weights stay in; once the engine has ended nobody waits to be heard."""

import asyncio

import pytest

from asyncrl.generators.engine import EngineDead
from asyncrl.generators.hearing import Hearing


async def outcome(hearing):
    """Of who wants to be heard now."""
    async with asyncio.timeout(5):
        await hearing.heard()


def test_what_is_held_comes_out_after_the_release():
    async def scenario():
        hearing = Hearing()
        await outcome(hearing)
        hearing.hold()
        waiting = asyncio.create_task(outcome(hearing))
        await asyncio.sleep(0)
        assert not waiting.done()
        hearing.release()
        await waiting
        hearing.end("killed")
        await outcome(hearing)
        assert not hearing.muted, "what was proven may be heard after the end"

    asyncio.run(scenario())


def test_what_is_held_at_the_end_never_comes_out():
    async def scenario():
        hearing = Hearing()
        hearing.hold()
        waiting = asyncio.create_task(outcome(hearing))
        await asyncio.sleep(0)
        hearing.end("killed")
        with pytest.raises(EngineDead, match="killed, before its new weights were proven"):
            await waiting
        hearing.release()
        with pytest.raises(EngineDead):
            await outcome(hearing)

    asyncio.run(scenario())


def test_an_order_to_apply_that_comes_after_the_end_keeps_nobody_waiting():
    """The receiver holds before it finds out that the engine is dead; a stream with tokens left still takes them out."""

    async def scenario():
        hearing = Hearing()
        hearing.end("killed")
        hearing.hold()
        await outcome(hearing)
        assert not hearing.muted

    asyncio.run(scenario())
