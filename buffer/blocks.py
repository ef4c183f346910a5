"""Where the tokens of live rollouts lie: in memory up to a budget, else in the memory-mapped files of the log.

A block is the values of one message of the segments stream. A piece of a rollout (offsets into the file)
reads the same from either place, and to spill is to forget the copy. What arrives first is needed first: past the
budget it is the new blocks that stay on disk alone. Called by `columns`, from one thread.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asyncrl.buffer.log import Sealed


@dataclass(slots=True, eq=False)
class Block:
    generation: int
    nbytes: int
    """Of its values."""
    memory: Sealed | None
    pieces: int = 0
    """Of live rollouts."""


class Piece(NamedTuple):
    """The tokens of one segment: `length` of them at `version`. Offsets are those of the file."""

    block: Block
    tokens_at: int
    logprobs_at: int
    length: int
    version: int


class Blocks:
    """`path_of` gives the file of a generation. Blocks without memory must be on disk."""

    def __init__(self, memory_bytes: int, path_of: Callable[[int], Path]) -> None:
        self._budget = memory_bytes
        self.path_of = path_of
        self._maps: dict[int, mmap.mmap] = {}
        self._unwritten: list[Block] = []
        self.bytes_in_memory = 0
        self.bytes_spilled = 0
        """Of blocks with live pieces."""

    @property
    def is_full(self) -> bool:
        return self.bytes_in_memory + self.bytes_spilled >= self._budget

    def add(self, generation: int, values: Sealed) -> Block:
        """Values that are not on disk yet: they stay in memory until `written`."""
        block = Block(generation, values.tokens.nbytes + values.logprobs.nbytes, values)
        self.bytes_in_memory += block.nbytes
        self._unwritten.append(block)
        return block

    def on_disk(self, generation: int, nbytes: int) -> Block:
        block = Block(generation, nbytes, None)
        self.bytes_spilled += nbytes
        return block

    def grow(self, block: Block, nbytes: int) -> None:
        """One more piece of a block on disk."""
        block.nbytes += nbytes
        self.bytes_spilled += nbytes

    def written(self) -> None:
        """Every block is on disk now: those past the budget are spilled."""
        if self.bytes_in_memory > self._budget:
            for block in reversed(self._unwritten):
                if self.bytes_in_memory <= self._budget:
                    break
                if block.memory is not None:
                    self._forget(block)
        self._unwritten.clear()

    def _forget(self, block: Block) -> None:
        block.memory = None
        self.bytes_in_memory -= block.nbytes
        self.bytes_spilled += block.nbytes

    def release(self, piece: Piece) -> None:
        """The rollout of `piece` is closed."""
        block = piece.block
        block.pieces -= 1
        if not block.pieces:
            self.release_block(block)

    def release_block(self, block: Block) -> None:
        """Nothing live is in it."""
        if block.memory is None:
            self.bytes_spilled -= block.nbytes
        else:
            self.bytes_in_memory -= block.nbytes
            block.memory = None

    def tokens(self, piece: Piece) -> np.ndarray:
        """int32 [length], a view."""
        memory = piece.block.memory
        if memory is None:
            return self._mapped(piece, piece.tokens_at, np.int32)
        at = (piece.tokens_at - memory.tokens_at) // 4
        return memory.tokens[at : at + piece.length]

    def logprobs(self, piece: Piece) -> np.ndarray:
        """float32 [length], a view."""
        memory = piece.block.memory
        if memory is None:
            return self._mapped(piece, piece.logprobs_at, np.float32)
        at = (piece.logprobs_at - memory.logprobs_at) // 4
        return memory.logprobs[at : at + piece.length]

    def _mapped(self, piece: Piece, at: int, dtype: type) -> np.ndarray:
        mapped = self._map(piece.block.generation, at + 4 * piece.length)
        return np.frombuffer(mapped, dtype, piece.length, at)

    def _map(self, generation: int, end: int) -> mmap.mmap:
        mapped = self._maps.get(generation)
        if mapped is None or len(mapped) < end:
            with self.path_of(generation).open("rb") as file:
                mapped = self._maps[generation] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped

    def give_back(self) -> None:
        """Pages of the maps that were read go back to the system; the next read finds them in its cache or on disk."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def forget_file(self, generation: int) -> None:
        """The file is deleted: while it is mapped its room on the disk is not given back."""
        self._maps.pop(generation, None)

    def forget_files(self) -> None:
        """No file is mapped any more. Views that are still held keep theirs."""
        self._maps.clear()
