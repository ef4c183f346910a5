"""What a reward model's process and the engine's say to each other, however the bytes arrive."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.generators.config import RewardModelConfig
from asyncrl.generators.reward_messages import (
    LENGTH,
    MOST_BYTES,
    BadFrame,
    Found,
    Frames,
    Load,
    Loaded,
    Read,
    Refused,
    frame,
)

MESSAGES = [
    Load("judge", RewardModelConfig(device="cpu", cores=3)),
    Loaded(),
    Read(7, '{"question": "é"}', "an answer"),
    Found(7, -0.25),
    Refused(8, "too long"),
]


@given(st.lists(st.integers(1, 40), min_size=1))
def test_messages_come_whole_and_in_order_however_they_are_cut(sizes):
    data, frames, found = b"".join(map(frame, MESSAGES)), Frames(), []
    while data:
        for size in sizes:
            found += frames.add(data[:size])
            data = data[size:]
    assert found == MESSAGES


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (LENGTH.pack(MOST_BYTES + 1), "announced 16,777,217 bytes"),
        (LENGTH.pack(3) + b"abc", "what is no message"),
        (LENGTH.pack(1) + b"\x80", "what is no message"),
    ],
)
def test_nonsense_is_not_believed(data, words):
    with pytest.raises(BadFrame, match=words):
        Frames().add(data)


def test_a_message_that_is_too_long_is_not_sent():
    with pytest.raises(ValueError, match="16,777,216 is the most"):
        frame(Read(1, "", "x" * MOST_BYTES))
