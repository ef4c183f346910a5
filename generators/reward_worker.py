"""The process that runs reward functions: `python -m asyncrl.generators.reward_worker FD`. Started by `reward_pool`.

It speaks over one inherited socket, one question and one answer at a time; standard output stays free for what
reward functions print. Frames are 4 bytes of length (big endian) and a MessagePack message of one of the structs
below. It imports the reward functions and nothing heavy: no torch, no vLLM, no Ray, not the parent's `__main__`.

It ends when the socket closes, when its parent is gone, or, while a function hangs, by the kernel's alarm.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Final

import msgspec

from asyncrl.generators.rewards import RewardError, RewardFunction, load_function, reward_values

_LENGTH: Final = struct.Struct(">I")
_PARENT_CHECK_S: Final = 5.0
_ALARM_MARGIN_S: Final = 5.0
"""The parent kills a hanging worker at its deadline; the alarm is for a worker whose parent is dead."""


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Parent to worker, once: what to load, and where the parent would look for it."""

    functions: list[str]
    sys_path: list[str]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent, once: all functions are loaded, or `problem` says which is not and why."""

    problem: str = ""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Parent to worker: score this with function number `function`. `payload` is a JSON object."""

    function: int
    answer_text: str
    payload: str
    timeout_s: float


class Values(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent: the numbers that the function gave; "reward" is among them."""

    values: dict[str, float]


class Raised(msgspec.Struct, frozen=True, tag=True):
    """Worker to parent: the function raised, or gave no reward."""

    reason: str


Message = Hello | Ready | Ask | Values | Raised


def send(connection: socket.socket, message: Message) -> None:
    """Raises OSError where the other end is gone."""
    body = msgspec.msgpack.encode(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket) -> Message:
    """The next message; raises EOFError where the other end is gone, TimeoutError by the socket's own timeout."""
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    message: Message = msgspec.msgpack.decode(_receive_exactly(connection, length), type=Message)
    return message


def _receive_exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    # Waits for the other end; unblocked by its bytes, its death or the timeout; ends after `size` bytes.
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the other end closed the socket")
        data += part
    return bytes(data)


def _load(hello: Hello) -> list[RewardFunction]:
    sys.path.extend(path for path in hello.sys_path if path not in sys.path)
    return [load_function(name) for name in hello.functions]


def _answer(ask: Ask, name: str, function: RewardFunction) -> Values | Raised:
    signal.setitimer(signal.ITIMER_REAL, ask.timeout_s + _ALARM_MARGIN_S)
    try:
        returned = function(ask.answer_text, msgspec.json.decode(ask.payload, type=dict))
        return Values(values=reward_values(name, returned))
    except RewardError as error:
        return Raised(reason=str(error))
    except Exception as error:  # noqa: BLE001 - the edge of foreign code: the parent fails the rollout with it
        last = traceback.extract_tb(error.__traceback__)[-1]
        return Raised(
            reason=f"it raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def serve(connection: socket.socket) -> None:
    """Load, say so, and answer until the parent goes away."""
    parent = os.getppid()
    hello = receive(connection)
    assert isinstance(hello, Hello)
    try:
        functions = _load(hello)
    except RewardError as error:
        send(connection, Ready(problem=str(error)))
        return
    send(connection, Ready())
    # Waits for the next question; ends when the parent closes the socket or is gone.
    while (ask := _next_ask(connection, parent)) is not None:
        reply = _answer(ask, hello.functions[ask.function], functions[ask.function])
        try:
            send(connection, reply)
        except OSError:
            return  # the parent closed the pool meanwhile


def _next_ask(connection: socket.socket, parent: int) -> Ask | None:
    """The next question; None where the parent is gone.

    Processes forked from the parent may hold the socket open after its death: so the parent is looked for as well.
    """
    while os.getppid() == parent:
        if select.select([connection], [], [], _PARENT_CHECK_S)[0]:
            try:
                ask = receive(connection)
            except (EOFError, OSError):
                return None
            assert isinstance(ask, Ask)
            return ask
    return None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
