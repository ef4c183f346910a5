"""What changed between two versions of a range of bytes, bit for bit: a later version is sent as its difference from the
one before where that is shorter. Pure: bytes in, bytes out.

A range is a row of items (`item_bytes` wide; what they mean does not matter, a NaN is bits like any other). It is cut into
sections of `SECTION_ITEMS`. A section names the items that changed in two columns: how many unchanged items lie before
each (uint16; 65535 says "65535 and the next entry"), and new - old as integers modulo 2**bits, folded so that a small
step in either direction is a small number. The columns are laid out byte plane by byte plane and compressed as one
(zstd, level 1): a step of AdamW moves a bfloat16 by its last bit or not at all, which costs 1 to 2 bytes an item then.

Invariants
----------
- `apply` writes nothing before all of a delta has been read and found in bounds, and never outside of the range.
- A delta fits one base only: it says the checksum of the base and that of the result (xxh3_64), and who applies it
  compares the first with that of the bytes it has, and the second afterwards. Applying twice is the caller's mistake.
Called by the learner's `opened` and the engine's `arriving`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow

from asyncrl.weight_sync.errors import MalformedDelta

SECTION_ITEMS: Final = 1 << 20
"""What is worked on at a time: small enough that its columns stay in the cache, large enough to compress."""
PAYS: Final = 0.75
"""A delta longer than this part of the range is none: full bytes cost neither side a pass of arithmetic."""
_ESCAPE: Final = 0xFFFF
_HEADER: Final = struct.Struct("<4sBBHIQQQ")
"""Magic, format, item bytes, 0, sections, bytes of the range, checksum of the base, checksum of the result."""
_SECTION: Final = struct.Struct("<III")
"""Changed items, entries of the gap column, bytes of the compressed columns."""
_MAGIC: Final = b"aRLd"
_FORMAT: Final = 1
_WIDTHS: Final = (1, 2, 4, 8)

Bytes = bytes | bytearray | memoryview
_Items = npt.NDArray[Any]


def encode(
    base: memoryview, new: memoryview, item_bytes: int, *, base_sum: int = 0, new_sum: int = 0
) -> bytes | None:
    """The delta that makes `new` of `base` (both contiguous, of one length, a multiple of `item_bytes`: 1, 2, 4 or 8), or
    None if it would be longer than `PAYS` of them. `base_sum`, `new_sum`: their xxh3_64, carried along.

    Releases the GIL in its passes. Raises `ValueError` for lengths that do not fit.
    """
    if base.nbytes != new.nbytes:
        raise ValueError(f"delta of {base.nbytes} to {new.nbytes} bytes: expected one length")
    old_items, new_items = _as_items(base, item_bytes), _as_items(new, item_bytes)
    most = int(PAYS * new.nbytes)
    parts = [b""]
    size = _HEADER.size
    for start in range(0, len(new_items), SECTION_ITEMS):
        stop = start + SECTION_ITEMS
        part = _encode_section(old_items[start:stop], new_items[start:stop])
        size += len(part)
        if size > most:
            return None
        parts.append(part)
    parts[0] = _HEADER.pack(_MAGIC, _FORMAT, item_bytes, 0, len(parts) - 1, new.nbytes, base_sum, new_sum)
    return b"".join(parts) if size <= most else None


def sums(delta: Bytes) -> tuple[int, int]:
    """(xxh3_64 of the base that it fits, xxh3_64 of the result), as given to `encode`. Raises `MalformedDelta`."""
    header = _header(memoryview(delta))
    return int(header[6]), int(header[7])


def apply(base: memoryview, delta: Bytes) -> None:
    """Make `base` (writable, contiguous) the new bytes, in place. Raises `MalformedDelta` with nothing written."""
    whole = memoryview(delta)
    _, _, item_bytes, _, sections, size, _, _ = _header(whole)
    if size != base.nbytes:
        raise MalformedDelta(f"delta for {size} bytes: the range to be changed has {base.nbytes}")
    if item_bytes not in _WIDTHS or size % item_bytes:
        raise MalformedDelta(
            f"delta of {size} bytes in items of {item_bytes}: expected items of 1, 2, 4 or 8 bytes"
        )
    items = _as_items(base, item_bytes)
    if sections != -(-len(items) // SECTION_ITEMS):
        raise MalformedDelta(f"delta of {sections} sections for {len(items)} items of {item_bytes} bytes")
    changes = list(_decoded(whole[_HEADER.size :], items, sections))
    for section, positions, differences in changes:
        section[positions] += differences


def _header(delta: memoryview) -> tuple[Any, ...]:
    if delta.nbytes < _HEADER.size:
        raise MalformedDelta(f"delta of {delta.nbytes} bytes: its header alone has {_HEADER.size}")
    header = _HEADER.unpack_from(delta)
    if header[:2] != (_MAGIC, _FORMAT) or header[3] != 0:
        raise MalformedDelta(
            f"expected a delta of format {_FORMAT}, got bytes that begin with {bytes(delta[:8])!r}"
        )
    return header


def _as_items(data: memoryview, item_bytes: int) -> _Items:
    if item_bytes not in _WIDTHS or data.nbytes % item_bytes:
        raise ValueError(
            f"{data.nbytes} bytes in items of {item_bytes}: expected whole items of 1, 2, 4 or 8 bytes"
        )
    return np.frombuffer(data, dtype=f"<u{item_bytes}")


def _encode_section(old: _Items, new: _Items) -> bytes:
    positions = np.flatnonzero(old != new)
    if not len(positions):
        return _SECTION.pack(0, 0, 0)
    gaps = _escaped(np.diff(positions, prepend=-1) - 1)
    columns = np.concatenate([_planes(gaps), _planes(_folded(new[positions] - old[positions]))])
    packed: bytes = _codec().compress(columns, asbytes=True)
    return _SECTION.pack(len(positions), len(gaps), len(packed)) + packed


def _decoded(body: memoryview, items: _Items, sections: int) -> Iterator[tuple[_Items, _Items, _Items]]:
    """(items of the section, positions in it, what to add there) of each section that changed."""
    at = 0
    for number in range(sections):
        if body.nbytes - at < _SECTION.size:
            raise MalformedDelta(f"delta ends within the header of section {number}")
        changed, entries, packed = _SECTION.unpack_from(body, at)
        at += _SECTION.size
        section = items[number * SECTION_ITEMS : (number + 1) * SECTION_ITEMS]
        if changed > len(section) or not changed <= entries <= changed + len(section) // _ESCAPE:
            raise MalformedDelta(
                f"section {number}: {changed} changes in {entries} entries of {len(section)} items"
            )
        if packed > body.nbytes - at or bool(packed) != bool(changed):
            raise MalformedDelta(
                f"section {number}: {packed} bytes for {changed} changes, {body.nbytes - at} are left"
            )
        if changed:
            columns = _unpacked(body[at : at + packed], 2 * entries + changed * items.itemsize, number)
            positions = _positions(_from_planes(columns[: 2 * entries], 2), changed, len(section), number)
            yield section, positions, _unfolded(_from_planes(columns[2 * entries :], items.itemsize))
        at += packed
    if at != body.nbytes:
        raise MalformedDelta(f"delta goes on for {body.nbytes - at} bytes after its last section")


def _unpacked(packed: memoryview, size: int, number: int) -> _Items:
    try:
        columns = np.frombuffer(
            _codec().decompress(packed, decompressed_size=size, asbytes=True), dtype=np.uint8
        )
    except (OSError, ValueError) as error:
        raise MalformedDelta(f"section {number}: its columns cannot be decompressed: {error}") from error
    if len(columns) != size:
        raise MalformedDelta(f"section {number}: columns of {len(columns)} bytes, expected {size}")
    return columns


def _escaped(gaps: _Items) -> _Items:
    """`gaps` (not negative) as uint16, a larger one as 65535s and a rest below that."""
    times = gaps // _ESCAPE
    more = int(times.sum())
    if not more:
        return gaps.astype("<u2")
    entries = np.full(len(gaps) + more, _ESCAPE, dtype="<u2")
    entries[np.cumsum(times) + np.arange(len(gaps))] = gaps - times * _ESCAPE
    return entries


def _positions(entries: _Items, changed: int, items: int, number: int) -> _Items:
    """Index of each changed item, going up."""
    ends = entries != _ESCAPE
    positions: _Items = entries.astype(np.int64)
    positions += ends  # the changed item itself
    np.cumsum(positions, out=positions)
    positions -= 1
    if not ends.all():
        positions = positions[ends]
    if len(positions) != changed or not ends[-1]:
        raise MalformedDelta(f"section {number}: {len(positions)} positions for {changed} changes")
    if positions[-1] >= items:
        raise MalformedDelta(f"section {number}: item {positions[-1]} of {items}")
    return positions


def _folded(difference: _Items) -> _Items:
    """0, -1, 1, -2, ... as 0, 1, 2, 3, ... in the same width."""
    signed = difference.view(f"<i{difference.itemsize}")
    folded: _Items = (signed << 1) ^ (signed >> (8 * difference.itemsize - 1))
    return folded.view(difference.dtype)


def _unfolded(folded: _Items) -> _Items:
    one = folded.dtype.type(1)
    difference: _Items = (folded >> one) ^ (~(folded & one) + one)
    return difference


def _planes(items: _Items) -> npt.NDArray[np.uint8]:
    """All the first bytes, then all the second, ..."""
    return np.ascontiguousarray(items.view(np.uint8).reshape(-1, items.itemsize).T).reshape(-1)


def _from_planes(planes: _Items, width: int) -> _Items:
    # By shifts, which numpy does many items at a time; a transposition it does byte by byte.
    columns = planes.reshape(width, -1)
    items: _Items = columns[0].astype(f"<u{width}")
    for place in range(1, width):
        items |= columns[place].astype(f"<u{width}") << (8 * place)
    return items


def _codec() -> pyarrow.Codec:
    return pyarrow.Codec("zstd", compression_level=1)
