"""How many pieces may be on their way to one engine, and which of its questions wait until fewer are. Pure.

That a piece has left is known later than the engine has it: libzmq says so to a thread of this process, and that waits for the
GIL. An engine that asks for the next piece meanwhile does nothing wrong, so its question is held, not refused.

Invariants: at most `PIECES` are on their way to an engine, and at most `HELD` of its questions wait, in the order in which they
came; more than that are refused, oldest first: of an engine that keeps to `chunks.WINDOW` these are questions that it has given
up. A question that is put again is held once. Called by `answering`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from asyncrl.weight_sync import chunks

PIECES: Final = 2 * chunks.WINDOW
"""An engine that comes back has its questions open once more beside those that went to its old connection."""
HELD: Final = chunks.WINDOW


class Piece(Protocol):
    """One that was sent (`zmq.MessageTracker`)."""

    @property
    def done(self) -> bool:
        """It has left this process, or its connection is gone."""


class Credit:
    """Of every engine."""

    def __init__(self) -> None:
        self._pieces: dict[bytes, list[Piece]] = {}
        """Engine -> on their way to it."""
        self._held: dict[bytes, dict[int, chunks.Get]] = {}
        """Engine -> its questions that wait, by their numbers; none without any."""

    @property
    def holding(self) -> bool:
        """Whether a question waits."""
        return bool(self._held)

    def ask(self, engine: bytes, question: chunks.Get) -> chunks.Get | None:
        """To be given out by `granted`, at once if there is room. What is to be refused instead, if anything."""
        held = self._held.setdefault(engine, {})
        held.setdefault(question.question, question)
        return held.pop(next(iter(held))) if len(held) > HELD else None

    def granted(self) -> Iterator[tuple[bytes, chunks.Get]]:
        """Engines and questions to be answered now, each before the next is asked for."""
        for engine in list(self._held):
            while engine in self._held and self._has_room(engine):
                held = self._held[engine]
                question = held.pop(next(iter(held)))
                if not held:
                    del self._held[engine]
                yield engine, question

    def sent(self, engine: bytes, piece: Piece) -> None:
        """`piece` is on its way."""
        self._pieces.setdefault(engine, []).append(piece)

    def gone(self, engine: bytes) -> None:
        """It is not connected: when it is back it asks again."""
        self._pieces.pop(engine, None)
        self._held.pop(engine, None)

    def _has_room(self, engine: bytes) -> bool:
        on_their_way = [piece for piece in self._pieces.get(engine, []) if not piece.done]
        self._pieces[engine] = on_their_way
        return len(on_their_way) < PIECES
