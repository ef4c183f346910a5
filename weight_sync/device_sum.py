"""The checksum of bytes that lie in device memory, made where they lie: integer arithmetic in torch, the same on CPU and CUDA.

xxh3 (`checksum`) would need the bytes on the host, over a bus that is tens of times slower than the device's memory.

Definition. A bucket's runs follow one another, each padded with zero bytes to a whole number of 8-byte little-endian words
w_0, w_1, ...; with mix the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)
and G its odd constant, the sum is, modulo 2^64,

    mix(bytes of the runs) + sum over i of mix(w_i + (i + 1) G)

mix is one-to-one, so a change within one word always changes the sum; words that change places, or change together, go
unnoticed by a chance of about 2^-64. Addition has no order, so the result does not depend on how a device sums.
Against torn, stale and misplaced bytes, not against an attacker. Called by `device_memory` and `device_version`.
"""

from __future__ import annotations

from typing import Final

import torch

from asyncrl.weight_sync.plan import Bucket

_BLOCK: Final = 2**20
"""Words at a time: three blocks of 8 MiB stay in the cache of a large GPU."""
_GOLDEN: Final = 0x9E3779B97F4A7C15
_FIRST: Final = 0xBF58476D1CE4E5B9
_SECOND: Final = 0x94D049BB133111EB
_MASK: Final = 2**64 - 1


def bucket_sum(version: torch.Tensor, bucket: Bucket) -> int:
    """The sum of `bucket`'s bytes in a version (uint8, [total_bytes], any device): 64 bits, unsigned. Waits for the device's
    current stream, so that what was queued there before is done. Takes 24 MiB of its memory for the time."""
    scratch = _Scratch(version.device, max((-(-run.size // 8) for run in bucket.runs), default=0))
    words = 0
    for run in bucket.runs:
        words = scratch.add(version[run.offset : run.offset + run.size], words)
    return (_mixed(bucket.size) + int(scratch.total.item())) & _MASK


class _Scratch:
    """The blocks that a sum is made in, on one device."""

    def __init__(self, device: torch.device, most: int) -> None:
        size = min(_BLOCK, max(most, 1))
        self._words = torch.empty(size, dtype=torch.int64, device=device)
        self._shifted = torch.empty(size, dtype=torch.int64, device=device)
        self._ramp = torch.arange(size, dtype=torch.int64, device=device).mul_(_signed(_GOLDEN))
        self.total = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, data: torch.Tensor, words: int) -> int:
        """Add the words of one run (uint8, flat), of which `words` went before; returns how many there are now."""
        block = 8 * self._words.numel()
        for start in range(0, data.numel(), block):
            part = data[start : start + block]
            count = -(-part.numel() // 8)
            taken = self._words[:count]
            taken[-1:] = 0  # the padding, if there is any
            # Copied as bytes: a run may begin where no word does.
            taken.view(torch.uint8)[: part.numel()].copy_(part)
            taken.add_(self._ramp[:count]).add_(_signed((words + 1) * _GOLDEN))
            self.total.add_(self._mix(taken).sum())
            words += count
        return words

    def _mix(self, words: torch.Tensor) -> torch.Tensor:
        self._fold(words, 30).mul_(_signed(_FIRST))
        self._fold(words, 27).mul_(_signed(_SECOND))
        return self._fold(words, 31)

    def _fold(self, words: torch.Tensor, bits: int) -> torch.Tensor:
        """words ^= words >> bits, shifting zeros in: torch's own shift repeats the sign."""
        shifted = self._shifted[: words.numel()]
        torch.bitwise_right_shift(words, bits, out=shifted)
        return words.bitwise_xor_(shifted.bitwise_and_(2 ** (64 - bits) - 1))


def _mixed(word: int) -> int:
    word = ((word ^ (word >> 30)) * _FIRST) & _MASK
    word = ((word ^ (word >> 27)) * _SECOND) & _MASK
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The same 64 bits as torch's int64 counts them."""
    word &= _MASK
    return word - 2**64 if word >> 63 else word
