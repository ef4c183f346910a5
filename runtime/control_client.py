"""Asks a run's control socket, waits with a deadline, and says by name why no answer came.

A ZMQ client gets no error from the other side: it tries on and on. So its monitor is read as well, and tells a port
with nobody at it, a key that is not admitted, and a run that is busy from one another. Called by the command line; a
client belongs to one thread and has one request under way.
"""

from __future__ import annotations

import itertools
import secrets
import time
from typing import Any, Literal, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from asyncrl.buffer.keys import ClientKeys, secure_client
from asyncrl.runtime import control_wire as wire
from asyncrl.runtime.control import COMMAND_S, CommandRefused, RunStatus, WrongCommand

ANSWER_S = 10.0
"""For the first sign of life."""
RESULT_S = COMMAND_S + 5.0
"""For what a request came to, once it was taken."""
SURE_S = 1.0
"""After so long of nothing but refusals it is not tried on."""
_AGAIN_S = 3.0
"""Without an answer after which a request is sent again: the connection may have broken on the way."""
_LOOK_S = 0.2
_OTHER_VERSION = "it is of another version of asyncrl than this command"
Line = Literal["trying", "nobody", "connected", "secured", "lost", "key refused", "foreign"]
"""How the connection stands. lost: it was secured and broke. foreign: what listens there does not know our keys."""
_WHY: dict[Line, str] = {
    "trying": "the machine cannot be reached: check the address, its network and its firewall",
    "nobody": "nothing listens there",
    "connected": "something listens there and says nothing: it is no run's control socket, or it is stuck",
    "secured": "it is there but busy or stuck: ask again in a while, or look at the run's log",
    "lost": "the connection broke and did not come back",
    "key refused": "the key is not this run's",
    "foreign": "what listens there does not know the key: the key is another run's, or it is no run's control socket",
}


class ControlFault(RuntimeError):
    """No answer came, and why."""


class NobodyThere(ControlFault):
    """Nothing listens at the address (any more)."""


class KeyNotAdmitted(ControlFault):
    """The run, or whatever listens there, does not admit the holder of this key."""


def next_line(line: Line, event: int) -> Line:
    """How the connection stands after an event of libzmq's monitor. Pure."""
    match event:
        case zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return "secured"
        case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "key refused"
        case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return "foreign"
        case zmq.EVENT_DISCONNECTED if line == "secured":
            return "lost"
        case zmq.EVENT_CONNECTED if line != "foreign":
            return "connected"
        # Closed: an attempt failed. A name that is not found, or a way that is not there, is only tried again.
        case zmq.EVENT_CLOSED if line != "foreign":
            return "nobody"
        case zmq.EVENT_CONNECT_RETRIED if line == "trying":
            return "nobody"
    return line


class ControlClient:
    """A context manager. `endpoint` is such as `tcp://127.0.0.1:61234`."""

    def __init__(self, endpoint: str, keys: ClientKeys) -> None:
        self.endpoint = endpoint
        self._ids = itertools.count(1)
        self._line: Line = "trying"
        self._since = time.monotonic()
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IDENTITY, b"c" + secrets.token_bytes(15))
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MOST_ANSWER_BYTES)
        self._socket.setsockopt(zmq.IPV6, 1)
        secure_client(self._socket, keys)
        self._monitor: zmq.Socket[Any] = self._socket.get_monitor_socket()
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ControlFault(f"{endpoint} is no address that can be connected to ({error})") from error
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.disable_monitor()
        self._context.destroy(linger=0)

    def status(self) -> RunStatus:
        """Raises as `ask`."""
        answer = self.ask(wire.AskStatus())
        if not isinstance(answer, wire.StatusIs):
            raise ControlFault(f"{self.endpoint} answered something else than a status; {_OTHER_VERSION}")
        return answer.run

    def told(self, request: wire.Request) -> str:
        """What happens now. Raises as `ask`."""
        answer = self.ask(request)
        if not isinstance(answer, wire.Done):
            raise ControlFault(f"{self.endpoint} answered something else than asked; {_OTHER_VERSION}")
        return answer.text

    def ask(
        self, request: wire.Request, answer_s: float = ANSWER_S, result_s: float = RESULT_S
    ) -> wire.StatusIs | wire.Done:
        """Raises NobodyThere, KeyNotAdmitted, ControlFault (silence), CommandRefused or WrongCommand."""
        request_id = next(self._ids).to_bytes(wire.ID_BYTES, "little")
        frames = [request_id, wire.encode(request)]
        began = time.monotonic()
        self._since = max(self._since, began)
        deadline, again_at, taken = began + answer_s, began, False
        # Waits for the run's answer, which it sends as soon as its event loop has its turn; ends with it, with a
        # connection that cannot be, or at the deadline, which moves once when the run says that it has taken it.
        while (now := time.monotonic()) < deadline:
            if now >= again_at:
                again_at = now + _AGAIN_S
                self._send(frames)
            for answer in self._heard(request_id, min(_LOOK_S, deadline - now)):
                if not isinstance(answer, wire.Taken):
                    return _result(answer)
                if not taken:
                    taken, deadline = True, time.monotonic() + result_s
            self._check_line()
        tag = request.__struct_config__.tag
        if taken:
            raise ControlFault(
                f"{self.endpoint} took {tag} and did not say within {result_s:.0f} s what it came to; look at its "
                f"status ({_WHY[self._line]})"
            )
        hint = "; it may still be carried out" if self._line == "secured" else ""
        raise ControlFault(
            f"no answer from {self.endpoint} to {tag} within {answer_s:.0f} s: {_WHY[self._line]}{hint}"
        )

    def _send(self, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return  # its queue is full: what is in it comes first

    def _heard(self, request_id: bytes, wait_s: float) -> list[wire.Answer]:
        """Answers to this request that came within `wait_s`; those to older ones are passed over."""
        ready = dict(self._poller.poll(max(1, int(1000 * wait_s))))
        while self._monitor in ready and self._monitor.poll(0):
            line = next_line(self._line, int(recv_monitor_message(self._monitor)["event"]))
            if line != self._line:
                self._line, self._since = line, time.monotonic()
        heard = []
        while self._socket in ready and self._socket.poll(0):
            frames = self._socket.recv_multipart()
            if frames[0] == request_id:
                heard.append(_understand(frames))
        return heard

    def _check_line(self) -> None:
        """Raises where it makes no sense to go on."""
        if self._line == "key refused":
            raise KeyNotAdmitted(f"{self.endpoint}: {_WHY[self._line]}")
        if time.monotonic() - self._since < SURE_S:
            return
        if self._line == "nobody":
            raise NobodyThere(f"{self.endpoint}: {_WHY[self._line]}")
        if self._line == "foreign":
            raise KeyNotAdmitted(f"{self.endpoint}: {_WHY[self._line]}")


def _understand(frames: list[bytes]) -> wire.Answer:
    try:
        return wire.decode_answer(frames[1])
    except (ValueError, IndexError) as error:
        raise ControlFault(f"the run's answer cannot be read ({error}); {_OTHER_VERSION}") from error


def _result(answer: wire.StatusIs | wire.Done | wire.Problem) -> wire.StatusIs | wire.Done:
    if not isinstance(answer, wire.Problem):
        return answer
    match answer.kind:
        case "wrong":
            raise WrongCommand(answer.message)
        case "malformed":
            raise ControlFault(f"{answer.message}; {_OTHER_VERSION}")
    raise CommandRefused(answer.message)
