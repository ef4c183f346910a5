"""A process that holds one reward model and reads answers: `python -m asyncrl.generators.reward_model_process FD`.
Started by `reward_model`.

    socket --> those that wait --> batch of similar lengths (`reward_batching`) --> one forward pass --> socket

It ends when the socket closes or when its parent is gone, which it looks for while it waits. Nothing waits in it that the
other end does not wait for: that bounds what it holds.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import time
import traceback
from typing import Final

from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_batching import Batch, Waiting, next_batch
from asyncrl.generators.reward_classifier import Classifier, Unreadable
from asyncrl.generators.reward_messages import Found, Frames, Load, Loaded, Message, Read, Refused, frame

_PARENT_CHECK_S: Final = 5.0
_CHUNK_BYTES: Final = 2**20


class _Line:
    """The socket: messages in, messages out."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._frames = connection, Frames()
        self._parent = os.getppid()

    def receive(self, timeout_s: float | None) -> list[Message]:
        """What has come, once something has, or nothing after `timeout_s`. Raises EOFError where the other end is gone.

        Processes forked from the parent may hold the socket open after its death: so the parent is looked for as well.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        # Waits for the other end; unblocked by its bytes or its death; ends with a message, or at the deadline.
        while True:
            left = _PARENT_CHECK_S if deadline is None else min(_PARENT_CHECK_S, deadline - time.monotonic())
            if select.select([self._connection], [], [], max(0.0, left))[0]:
                data = self._connection.recv(_CHUNK_BYTES)
                if not data:
                    raise EOFError("the other end closed the socket")
                if found := self._frames.add(data):
                    return found
            if deadline is not None and time.monotonic() >= deadline:
                return []
            if os.getppid() != self._parent:
                raise EOFError("the parent is gone")

    def send(self, message: Message) -> None:
        self._connection.sendall(frame(message))


class _Desk:
    """Answers that came and were not read yet, in order of arrival."""

    def __init__(self, line: _Line, classifier: Classifier) -> None:
        self._line, self._classifier = line, classifier
        self.waiting: list[tuple[Waiting, int, list[int]]] = []
        """With its number and its tokens."""

    def take(self, messages: list[Message]) -> None:
        for message in messages:
            assert isinstance(message, Read)
            try:
                tokens = self._classifier.tokens(message.payload, message.answer_text)
            except Exception as error:  # noqa: BLE001 - the edge of a foreign tokenizer and template: one answer fails by it
                self._line.send(Refused(message.number, _told(error)))
                continue
            self.waiting.append((Waiting(time.monotonic(), len(tokens)), message.number, tokens))

    def read(self, indices: list[int]) -> None:
        chosen = [self.waiting[i] for i in indices]
        taken = set(indices)
        self.waiting = [one for i, one in enumerate(self.waiting) if i not in taken]
        for (_, number, _), value in zip(
            chosen, self._classifier.score([tokens for _, _, tokens in chosen]), strict=True
        ):
            self._line.send(Found(number, value))


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, Unreadable) else f"{type(error).__name__}: {error}"[:2000]


def serve(connection: socket.socket) -> None:
    """Loads the model, says so, and reads answers until the other end goes away."""
    line = _Line(connection)
    (load,) = line.receive(None)
    assert isinstance(load, Load)
    try:
        classifier = Classifier(load.folder, load.config)
    except FunctionError as error:
        line.send(Loaded(problem=str(error)))
        return
    except Exception as error:
        line.send(Loaded(problem=f"loading reward model {load.folder!r} failed: {_told(error)}"))
        traceback.print_exc()
        raise
    line.send(Loaded())
    desk, config = _Desk(line, classifier), load.config
    # Waits for answers to read, or for company for those that wait; ends with EOFError when the other end is gone.
    while True:
        desk.take(line.receive(0.0 if desk.waiting else None))
        if not desk.waiting:
            continue
        facts = [one for one, _, _ in desk.waiting]
        decided = next_batch(facts, time.monotonic(), config.tokens_per_batch, config.wait_s)
        if isinstance(decided, Batch):
            desk.read(decided.indices)
        else:
            desk.take(line.receive(decided.seconds))


def main(descriptor: str) -> None:
    with socket.socket(fileno=int(descriptor)) as connection:
        try:
            serve(connection)
        except (EOFError, ConnectionError):
            return  # the engine's process ended it, or is gone


if __name__ == "__main__":
    main(sys.argv[1])
