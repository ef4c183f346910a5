"""Seeds of rollouts: the same each time, and never the same for two stretches of tokens."""

from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.seeds import seed_at

PLACE = st.tuples(st.integers(-(2**31), 2**31), st.integers(0, 2**40), st.integers(0, 2**20))


@given(st.lists(PLACE, min_size=2, max_size=50, unique=True))
def test_every_stretch_has_random_numbers_of_its_own(places):
    seeds = [seed_at(*place) for place in places]
    assert seeds == [seed_at(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
