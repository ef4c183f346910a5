"""The checksum of a bucket: xxh3_64, which is faster than memory on one core. Not a defence against an attacker (the
files are 0600), but against torn, stale and misplaced bytes. Called by the writer, the reader and the fake engine.
"""

from __future__ import annotations

import mmap

import xxhash

from asyncrl.weight_sync.plan import Bucket


def bucket_checksum(mapped: mmap.mmap, bucket: Bucket) -> int:
    """xxh3_64 of the bytes [start, start + size) of `bucket` in a mapped version (64 bits, unsigned)."""
    with memoryview(mapped) as whole, whole[bucket.start : bucket.start + bucket.size] as part:
        return xxhash.xxh3_64_intdigest(part)
