"""The run's control socket: one ZMQ ROUTER with the run's CURVE keys, on the supervisor's event loop.

    frames --> decoded, or an error or silence --> `Taken` --> a task of its own: `Commands` --> what it came to

Invariants
----------
- Only who holds the run's client key is heard; from those, frames that are no request get an error or silence.
- A flood of requests takes neither the loop (`_BURST`), nor memory (`_MOST_UNDER_WAY`, the socket's marks), nor another
  asker's turn (`_MOST_OF_ONE`).
- What changes something is carried out one after the other, in the order of arrival; `status` and `stop` do not wait.
- The place in the run's folder is there from the start of `run` to its end, so it is left only by a death.

Called by the supervisor, which hands in its `Commands`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from pathlib import Path
from typing import Any, assert_never

import zmq

from asyncrl.buffer.keys import Authenticator, ServerKeys, secure_server
from asyncrl.runtime import control_wire as wire
from asyncrl.runtime.control import COMMAND_S, CommandRefused, Commands, WrongCommand
from asyncrl.runtime.control_place import leave_place, remove_place

logger = logging.getLogger(__name__)

_TICK_S = 1.0
"""Longest sleep of the loop: the socket's descriptor tells of changes only, and one may be missed."""
_BURST = 64
"""Requests taken before the event loop's other work has its turn."""
_MOST_OF_ONE = 16
"""Requests of one asker that may be under way: more are refused, and nobody else notices."""
_MOST_UNDER_WAY = 1024
_LINGER_MS = 500
"""For the last answers to get out."""
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}
_Key = tuple[bytes, bytes]
"""Who asked, and the request's id."""


class CannotListen(RuntimeError):
    """The control socket cannot be bound where the recipe says."""


class ControlServer:
    """It is bound once it is made; `run` answers until it is cancelled.

    `place` is the file that tells others on this machine where it listens. `host` is an address of this machine.
    """

    def __init__(
        self, commands: Commands, keys: ServerKeys, place: Path, *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        self._commands = commands
        self._place = place
        self._changing = asyncio.Lock()
        self._awake = asyncio.Event()
        self._under_way: dict[_Key, asyncio.Task[None]] = {}
        self._broken: Exception | None = None
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._authenticator = Authenticator(self._context, keys)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who comes back is the same asker, not a second one
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MOST_REQUEST_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 1000)
        self._socket.setsockopt(zmq.IPV6, 1)
        secure_server(self._socket, keys)
        self.endpoint = self._bind(host, port)
        """Where this machine's own clients find it."""

    def _bind(self, host: str, port: int) -> str:
        try:
            if port:
                self._socket.bind(f"tcp://{_bracketed(host)}:{port}")
            else:
                # Above what Linux gives to outgoing connections, as the buffer's.
                port = self._socket.bind_to_random_port(f"tcp://{_bracketed(host)}", min_port=61_000)
        except zmq.ZMQError as error:
            self.close()
            raise CannotListen(
                f"run.control_host = {host!r}: the control socket cannot listen there ({error}); expected an IP "
                'address of this machine, such as "127.0.0.1" for itself alone or "0.0.0.0" for all of its networks'
            ) from error
        return f"tcp://{_bracketed(_EVERY_ADDRESS.get(host, host))}:{port}"

    async def run(self) -> None:
        """Raises what a command raised that is no refusal: the run is broken then."""
        loop = asyncio.get_running_loop()
        leave_place(self._place, self.endpoint)
        loop.add_reader(self._socket.fileno(), self._awake.set)
        try:
            # Waits for requests, which clients send when they like; ends when it is cancelled or a command broke.
            while self._broken is None:
                self._awake.clear()
                if self._take_requests():
                    await asyncio.sleep(0)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_TICK_S):
                        await self._awake.wait()
            raise self._broken
        finally:
            loop.remove_reader(self._socket.fileno())
            remove_place(self._place)
            tasks = list(self._under_way.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()

    def close(self) -> None:
        """For a server that was never run; `run` does it at its end. Twice is harmless."""
        self._socket.close()
        self._authenticator.close()
        self._context.term()

    # ---- requests ----------------------------------------------------------------------------------------------

    def _take_requests(self) -> bool:
        """Whether there may be more."""
        for _ in range(_BURST):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return False
            self._take(frames)
        return True

    def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != wire.ID_BYTES:
            logger.info("passed over %d frames from %s: no request", len(frames), frames[0].hex())
            return
        key = (frames[0], frames[1])
        try:
            request = wire.decode_request(frames[2])
        except ValueError as error:
            self._problem(key, "malformed", f"no request that this run knows: {error}")
            return
        if key not in self._under_way:
            own = sum(address == key[0] for address, _ in self._under_way)
            if own >= _MOST_OF_ONE or len(self._under_way) >= _MOST_UNDER_WAY:
                self._problem(
                    key, "busy", f"{own} commands of this asker are under way: ask again in a while"
                )
                return
            task = asyncio.create_task(self._carry_out(key, request), name="control")
            self._under_way[key] = task
            task.add_done_callback(functools.partial(self._ended, key))
        self._send(key, wire.Taken())

    async def _carry_out(self, key: _Key, request: wire.Request) -> None:
        """One request from here to its answer. Raises what broke the run, after the asker was told."""
        name = request.__struct_config__.tag
        deadline = asyncio.timeout(COMMAND_S)
        answer: wire.Answer
        try:
            async with deadline:
                answer = await self._outcome(request)
        except CommandRefused as refusal:
            kind: wire.ProblemKind = "wrong" if isinstance(refusal, WrongCommand) else "refused"
            answer = wire.Problem(kind=kind, message=str(refusal))
        except asyncio.CancelledError:
            if isinstance(request, wire.Stop):
                self._send(key, wire.Done(text="the run is ending"))
            else:
                self._problem(key, "ending", f"the run ended while it had {name} under way")
            raise
        except Exception as error:
            if not (isinstance(error, TimeoutError) and deadline.expired()):
                self._problem(key, "failed", f"the run broke on {name}: {type(error).__name__}: {error}")
                raise
            late = f"the run did not answer {name} within {COMMAND_S:.0f} s; look at its status"
            answer = wire.Problem(kind="slow", message=late)
        self._send(key, answer)

    def _ended(self, key: _Key, task: asyncio.Task[None]) -> None:
        self._under_way.pop(key, None)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._broken = error
            self._awake.set()

    async def _outcome(self, request: wire.Request) -> wire.StatusIs | wire.Done:
        match request:
            case wire.AskStatus():
                return wire.StatusIs(run=await self._commands.status())
            case wire.Stop():
                return wire.Done(text=await self._commands.stop())
            case _:
                async with self._changing:
                    return wire.Done(text=await self._change(request))

    async def _change(self, request: wire.Scale | wire.Pause | wire.GoOn | wire.Drain) -> str:
        match request:
            case wire.Scale():
                return await self._commands.scale(request.pool, request.concurrency, request.engines)
            case wire.Pause():
                return await self._commands.pause()
            case wire.GoOn():
                return await self._commands.go_on()
            case wire.Drain():
                return await self._commands.drain(request.pool)
            case _:
                assert_never(request)

    def _problem(self, key: _Key, kind: wire.ProblemKind, message: str) -> None:
        self._send(key, wire.Problem(kind=kind, message=message))

    def _send(self, key: _Key, answer: wire.Answer) -> None:
        """To an asker that is gone, or takes nothing, it is dropped."""
        socket: zmq.Socket[Any] = self._socket
        socket.send_multipart([*key, wire.encode(answer)], zmq.NOBLOCK)
        if int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._awake.set()


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
