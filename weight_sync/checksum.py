"""The checksum of a bucket: xxh3_64, which is faster than memory on one core. Not a defence against an attacker (the
files are 0600), but against torn, stale and misplaced bytes. Called by the writer, the reader and the fake engine.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import xxhash

from asyncrl.weight_sync.plan import Bucket


def bucket_checksum(version: mmap.mmap | memoryview, bucket: Bucket) -> int:
    """xxh3_64 of the bytes of `bucket`'s runs, one after the other, in a version's bytes (64 bits, unsigned).

    Releases the GIL.
    """
    digest = xxhash.xxh3_64()
    with memoryview(version) as whole:
        for run in bucket.runs:
            with whole[run.offset : run.offset + run.size] as part:
                digest.update(part)
    return digest.intdigest()


def version_digest(checksums: Sequence[int]) -> str:
    """What a version's bytes come to, as 16 hex digits: xxh3_64 over its buckets' checksums; empty for none."""
    if not checksums:
        return ""
    return xxhash.xxh3_64_hexdigest(b"".join(each.to_bytes(8, "little") for each in checksums))
