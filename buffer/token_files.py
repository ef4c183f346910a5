"""Where the tokens of live rollouts lie: in the log's files, which are their memory.

A token is never kept twice. What was written to the log is in the system's page cache as long as that has room, and on disk;
it is read through a map of the file, whose pages are given back after use. So the process stays small whatever the
engines send, and `memory_bytes` bounds what they may send ahead of the learner. Called by `columns`, from one thread.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

TOKEN_BYTES = 8
"""Of a token with its logprob."""


class Piece(NamedTuple):
    """The tokens of one segment: `length` of them at `version`. Offsets are those of the generation's segments file."""

    generation: int
    tokens_at: int
    logprobs_at: int
    length: int
    version: int


class TokenFiles:
    """`path_of` gives the file of a generation. Pieces must be written before they are read."""

    def __init__(self, memory_bytes: int, path_of: Callable[[int], Path]) -> None:
        self._budget = memory_bytes
        self.path_of = path_of
        self._maps: dict[int, mmap.mmap] = {}
        self.held_bytes = 0
        """Of pieces of live rollouts."""

    @property
    def is_full(self) -> bool:
        return self.held_bytes >= self._budget

    def hold(self, piece: Piece) -> None:
        self.held_bytes += TOKEN_BYTES * piece.length

    def release(self, piece: Piece) -> None:
        """The rollout of `piece` is closed."""
        self.held_bytes -= TOKEN_BYTES * piece.length

    def tokens(self, piece: Piece) -> np.ndarray:
        """int32 [length], a view."""
        return self._view(piece, piece.tokens_at, np.int32)

    def logprobs(self, piece: Piece) -> np.ndarray:
        """float32 [length], a view."""
        return self._view(piece, piece.logprobs_at, np.float32)

    def _view(self, piece: Piece, at: int, dtype: type) -> np.ndarray:
        end = at + 4 * piece.length
        mapped = self._maps.get(piece.generation)
        if mapped is None or len(mapped) < end:
            with self.path_of(piece.generation).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[piece.generation] = mapped
        return np.frombuffer(mapped, dtype, piece.length, at)

    def give_back(self) -> None:
        """Pages of the maps that were read go back to the system; the next read finds them in its cache or on disk."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def forget_file(self, generation: int) -> None:
        """The file is deleted: while it is mapped its room on the disk is not given back."""
        self._maps.pop(generation, None)
