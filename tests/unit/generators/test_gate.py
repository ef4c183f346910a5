"""The gate: open, nobody suspends; closed, everybody waits until it opens or is turned away."""

import asyncio

from asyncrl.generators.gate import Gate


def test_an_open_gate_does_not_suspend():
    coroutine = Gate().passes("a")
    try:
        coroutine.send(None)
    except StopIteration as passed:
        assert passed.value is True
    else:
        raise AssertionError("it suspended")


def test_a_closed_gate_holds_until_it_opens_or_turns_away():
    async def scenario():
        gate = Gate()
        gate.close()
        tasks = {key: asyncio.create_task(gate.passes(key)) for key in "abc"}
        await asyncio.sleep(0)
        assert all(key in gate for key in "abc") and not any(task.done() for task in tasks.values())
        gate.turn_away(["b", "unknown"])
        gate.turn_away(["b"])
        assert await tasks["b"] is False and "b" not in gate
        tasks["c"].cancel()
        await asyncio.wait({tasks["c"]})
        gate.open()
        assert await tasks["a"] is True and "a" not in gate and "c" not in gate

    asyncio.run(scenario())


def test_one_that_is_closed_again_at_once_holds_on():
    async def scenario():
        gate = Gate()
        gate.close()
        task = asyncio.create_task(gate.passes("a"))
        await asyncio.sleep(0)
        gate.open()
        gate.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done() and "a" in gate
        gate.open()
        assert await task is True

    asyncio.run(scenario())
