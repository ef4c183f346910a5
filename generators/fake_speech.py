"""What the fake engine says: tokens, logprobs and the ends of answers as pure functions of (seed, all tokens so far), and
what it answers to a probe as a pure function of (the weights' digest, tokens). Called by the fake engine and by tests.
"""

from __future__ import annotations

import math
import statistics
import struct
from collections.abc import Sequence
from typing import Final

import msgspec
import xxhash

_NORMAL: Final = statistics.NormalDist()
GREEDY_SEED: Final = 2**64 - 1
"""Of what is said at temperature 0: the same whatever the engine's own seed, as an argmax is."""


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lognormal answer lengths, the stop token included. `sigma = 0`: every answer has the median length."""

    median_tokens: float = 64.0
    sigma: float = 0.0

    def draw(self, hashed: int) -> int:
        """The length, at least 1, at the quantile that the 64 bits of `hashed` name."""
        quantile = (hashed + 0.5) / 2**64
        quantile = min(max(quantile, 1e-12), 1 - 1e-12)
        return max(1, round(self.median_tokens * math.exp(self.sigma * _NORMAL.inv_cdf(quantile))))


def weights_digest(checksums: Sequence[int]) -> int:
    """What stands for a version's weights in `probe`: a hash of the checksums of its buckets."""
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(checksums)}Q", *checksums))


def probe_logprobs(digest: int, tokens: Sequence[int]) -> list[float]:
    """What a `FakeEngine` with weights of this digest answers to `probe`: [len(tokens) - 1], a pure function."""
    running = xxhash.xxh3_64(seed=digest)
    answer = []
    for token in tokens:
        running.update(_bytes_of(token))
        answer.append(_logprob(running.intdigest()))
    return answer[1:]


class Speech:
    """One sequence and what comes next in it. Pure.

    Where the prompt ends is not told to an engine, and need not be: the answer so far is the longest tail of the
    tokens that this very function would have spoken. A prompt that happens to end in such tokens does so in every
    engine, so its answer begins a little earlier everywhere alike. The length is drawn from what precedes the answer.
    """

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        lengths: Lengths,
        stop_token_ids: Sequence[int],
        tokens: Sequence[int],
    ) -> None:
        """`tokens`: the prompt and the answer so far. Raises `ValueError` if every token would stop."""
        self._hash = xxhash.xxh3_64(seed=seed)
        self._lengths = lengths
        self._vocab_size = vocab_size
        self._stops = tuple(stop_token_ids)
        self._answer_start = self._hash.intdigest()
        self._answered = 0
        self._length: int | None = None
        if len({stop for stop in self._stops if 0 <= stop < vocab_size}) >= vocab_size:
            raise ValueError(f"all {vocab_size} tokens are stop tokens: a larger vocabulary is needed")
        for token in tokens:
            self._hear(token)

    def speak(self) -> tuple[int, float]:
        """The next token and its logprob (exact in float32). A stop token ends the answer: speak no more."""
        hashed = self._hash.intdigest()
        if self._length is None:
            self._length = self._lengths.draw(self._answer_start)
        over = self._answered + 1 >= self._length
        token = self._stops[0] if over and self._stops else self._plain(hashed)
        self._hash.update(_bytes_of(token))
        self._answered += 1
        return token, _logprob(hashed)

    def _hear(self, token: int) -> None:
        expected = self._plain(self._hash.intdigest())
        self._hash.update(_bytes_of(token))
        if token == expected:
            self._answered += 1
        else:
            self._answer_start, self._answered = self._hash.intdigest(), 0

    def _plain(self, hashed: int) -> int:
        token = hashed % self._vocab_size
        # Ends: at least one token of the vocabulary does not stop, as the constructor checked.
        while token in self._stops:
            token = (token + 1) % self._vocab_size
        return token


def _bytes_of(token: int) -> bytes:
    return token.to_bytes(8, "little", signed=True)


def _logprob(hashed: int) -> float:
    return -((hashed >> 40) % 2**19) / 2**16
