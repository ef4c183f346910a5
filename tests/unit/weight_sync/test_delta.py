"""Bit-exact deltas: what was encoded comes back, nothing else gets through, nothing is written outside."""

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weight_sync import delta
from asyncrl.weight_sync.errors import MalformedDelta, WeightSyncError

WIDTHS = (1, 2, 4, 8)
BITS_THAT_ARE_EASILY_LOST = np.array(
    [0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, np.nan, 1.0, 3.4e38], dtype=np.float32
)


def view(array):
    return memoryview(array).cast("B")


def changed(rng, base, share, *, small):
    new = base.copy()
    places = rng.random(len(base)) < share
    if small:
        new[places] += rng.choice([1, -1], places.sum()).astype(base.dtype)
    else:
        new[places] = rng.integers(0, 1 << (8 * base.itemsize), places.sum(), dtype=base.dtype)
    return new


@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.sampled_from(WIDTHS),
    items=st.integers(0, 3000),
    share=st.sampled_from((0.0, 0.001, 0.02, 0.3, 1.0)),
    small=st.booleans(),
    section=st.sampled_from((7, 256, 1 << 20)),
)
@settings(max_examples=150, deadline=None)
def test_a_delta_makes_the_new_bytes_of_the_base_or_is_not_made(seed, width, items, share, small, section):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 1 << (8 * width), items, dtype=f"u{width}")
    new = changed(rng, base, share, small=small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta, "SECTION_ITEMS", section)
        encoded = delta.encode(view(base), view(new), width)
        if encoded is None:
            return
        assert len(encoded) <= delta.PAYS * new.nbytes
        got = base.copy()
        delta.apply(view(got), encoded)
    assert got.tobytes() == new.tobytes()


def test_two_hundred_updates_of_mixed_density_leave_identical_bytes():
    rng = np.random.default_rng(0)
    learner = (rng.standard_normal(50_000).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    engine = learner.copy()
    kinds = set()
    for _ in range(200):
        share = float(rng.choice([0.0, 0.0005, 0.01, 0.1, 0.6, 1.0]))
        new = changed(rng, learner, share, small=bool(rng.random() < 0.7))
        encoded = delta.encode(view(learner), view(new), 2, base_sum=checksum(learner), new_sum=checksum(new))
        kinds.add(encoded is None)
        if encoded is None:
            engine = new.copy()
        else:
            assert delta.sums(encoded) == (checksum(engine), checksum(new))
            delta.apply(view(engine), encoded)
        learner = new
        assert engine.tobytes() == learner.tobytes()
    assert kinds == {True, False}


@pytest.mark.parametrize("place", range(len(BITS_THAT_ARE_EASILY_LOST)))
def test_signed_zeros_denormals_infinities_and_nans_are_bits(place):
    base = np.tile(BITS_THAT_ARE_EASILY_LOST, 1000)
    bits = base.view(np.uint32)
    bits[6::9] |= np.arange(1000, dtype=np.uint32)  # every NaN another payload
    new = base.copy()
    new[::50] = BITS_THAT_ARE_EASILY_LOST[place]
    new.view(np.uint32)[7] = 0xFFC12345
    encoded = delta.encode(view(base), view(new), 4)
    assert encoded is not None
    delta.apply(view(base), encoded)
    assert base.tobytes() == new.tobytes()


def test_gaps_at_the_edge_of_the_escape():
    base = np.zeros(1 << 19, dtype=np.uint16)
    new = base.copy()
    at = 0
    for gap in (0, 65534, 65535, 65536, 131069, 131070):
        at += gap
        new[at] = 7
        at += 1
    encoded = delta.encode(view(base), view(new), 2)
    assert encoded is not None and len(encoded) < 200
    delta.apply(view(base), encoded)
    assert base.tobytes() == new.tobytes()


def test_a_delta_that_would_not_pay_is_none():
    rng = np.random.default_rng(1)
    base, new = (rng.integers(0, 65536, 100_000, dtype=np.uint16) for _ in range(2))
    assert delta.encode(view(base), view(new), 2) is None
    assert delta.encode(view(base[:1]), view(new[:1]), 2) is None


def test_lengths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one length"):
        delta.encode(memoryview(b"abcd"), memoryview(b"ab"), 1)
    with pytest.raises(ValueError, match="whole items"):
        delta.encode(memoryview(b"abc"), memoryview(b"abc"), 2)
    with pytest.raises(ValueError, match="whole items"):
        delta.encode(memoryview(b"abc"), memoryview(b"abc"), 3)


def test_another_range_is_refused():
    base, encoded = example()
    with pytest.raises(MalformedDelta, match="the range to be changed has"):
        delta.apply(view(np.zeros(len(base) + 1, dtype=base.dtype)), encoded)
    assert issubclass(MalformedDelta, WeightSyncError) and issubclass(MalformedDelta, ValueError)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_delta_writes_nothing_outside_and_nothing_at_all_when_it_is_refused(data):
    base, encoded = example()
    damaged = bytearray(encoded)
    if data.draw(st.booleans(), label="cut"):
        del damaged[data.draw(st.integers(0, len(damaged) - 1), label="length") :]
    else:
        for _ in range(data.draw(st.integers(1, 4), label="bytes")):
            damaged[data.draw(st.integers(0, len(damaged) - 1), label="place")] ^= data.draw(
                st.integers(1, 255)
            )
    fence = np.full(64, 0xA5, dtype=np.uint8)
    memory = np.concatenate([fence, base.view(np.uint8), fence])
    inside = memory[64 : 64 + base.nbytes]
    try:
        delta.apply(view(inside), bytes(damaged))
    except MalformedDelta:
        assert inside.tobytes() == base.tobytes()
    assert memory[:64].tobytes() == fence.tobytes() == memory[-64:].tobytes()


def test_a_section_that_says_more_than_it_can_hold_is_refused_before_memory_is_taken():
    base, encoded = example()
    damaged = bytearray(encoded)
    damaged[40:48] = b"\xff" * 8  # changed items and entries of the first section
    with pytest.raises(MalformedDelta, match="section 0"):
        delta.apply(view(base), bytes(damaged))


def example():
    rng = np.random.default_rng(2)
    base = rng.integers(0, 65536, 4000, dtype=np.uint16)
    encoded = delta.encode(view(base), view(changed(rng, base, 0.02, small=True)), 2)
    assert encoded is not None
    return base, encoded


def checksum(array):
    return xxhash.xxh3_64_intdigest(array.tobytes())
