"""Random models for tests of plans and of what follows them."""

from __future__ import annotations

import itertools
import math

from hypothesis import strategies as st

from asyncrl.weight_sync.plan import ALIGNMENT, DTYPE_BYTES

shapes = st.lists(st.integers(0, 15), max_size=3).map(tuple)
models = st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), shapes), min_size=1, max_size=12).map(
    lambda tensors: [(f"layer.{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)]
)


@st.composite
def shared(draw):
    """(specs, shares): each tensor cut into rows by chance, one share for each sender."""
    specs, senders = draw(models), draw(st.integers(1, 4))
    shares = {}
    for name, _, shape in specs:
        ends = sorted(draw(st.integers(0, math.prod(shape))) for _ in range(senders - 1))
        bounds = [0, *ends, math.prod(shape)]
        shares[name] = tuple((a, b - a) for a, b in itertools.pairwise(bounds))
    return specs, shares


bucket_sizes = st.integers(ALIGNMENT, 10_000)
