"""Device memory between two processes, with the host's memory in its place: what `tests/gpu` does on a GPU."""

from __future__ import annotations

import contextlib

import torch
from device_cases import PLAN, WEIGHTS, check_versions_are_read, check_what_is_overwritten_is_caught
from device_peers import make_slots, peer, read_versions

CPU = torch.device("cpu")


def test_another_process_reads_versions_and_notices_what_changed() -> None:
    with contextlib.closing(make_slots(PLAN, CPU)) as slots, peer(read_versions, "cpu") as reader:
        check_versions_are_read(slots, reader)
        check_what_is_overwritten_is_caught(slots, reader)
    assert WEIGHTS["embedding"].dtype == torch.float32
