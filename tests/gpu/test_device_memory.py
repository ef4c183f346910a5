"""Versions in the memory of one GPU, written by one process and read by another (CUDA IPC)."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
import torch
from device_cases import PLAN, check_versions_are_read, check_what_is_overwritten_is_caught, moved
from device_peers import make_slots, peer, read_versions, write, write_versions

from asyncrl.weight_sync.cuda_memory import Allocation, device_uuid, opened
from asyncrl.weight_sync.device_memory import slots_on
from asyncrl.weight_sync.device_version import DeviceVersion
from asyncrl.weight_sync.errors import DeviceMemoryError

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is false"
)
GPU = torch.device("cuda", 0)


def test_another_process_reads_versions_and_notices_what_changed() -> None:
    with contextlib.closing(make_slots(PLAN, GPU)) as slots, peer(read_versions, "cuda:0") as reader:
        check_versions_are_read(slots, reader, "cuda:0")
        check_what_is_overwritten_is_caught(slots, reader, "cuda:0")


def test_weights_come_from_the_host_as_well() -> None:
    """A learner that offloads to the host."""
    with contextlib.closing(make_slots(PLAN, GPU)) as slots, peer(read_versions, "cuda:0") as reader:
        check_versions_are_read(slots, reader, "cpu")


def test_memory_of_a_process_that_ended_is_not_opened() -> None:
    with peer(write_versions, "cuda:0", PLAN, moved(0)) as writer:
        offer = writer.answer()
        with contextlib.closing(DeviceVersion(offer, GPU)) as version:
            version.verify()
        assert writer.process.pid is not None
        os.kill(writer.process.pid, signal.SIGKILL)
        writer.process.join(timeout=20)
        with pytest.raises(DeviceMemoryError, match="cuIpcOpenMemHandle_v2 failed"):
            DeviceVersion(offer, GPU)
    assert torch.ones(4, device=GPU).sum().item() == 4, "the failure left the device usable"


def test_a_writer_whose_process_ends_while_it_is_read_leaves_the_reader_alive() -> None:
    """The driver keeps the memory as long as somebody has it open; nothing is promised, so the sums decide."""
    with peer(write_versions, "cuda:0", PLAN, moved(0)) as writer:
        offer = writer.answer()
        with contextlib.closing(DeviceVersion(offer, GPU)) as version:
            version.verify()
            assert writer.process.pid is not None
            os.kill(writer.process.pid, signal.SIGKILL)
            writer.process.join(timeout=20)
            version.verify()


def test_the_own_handle_is_not_opened() -> None:
    memory = Allocation(4096, GPU)
    try:
        with (
            pytest.raises(DeviceMemoryError, match="cuIpcOpenMemHandle_v2 failed"),
            opened(memory.handle, 4096, GPU),
        ):
            pass
    finally:
        memory.free()


def test_an_allocation_is_zero_and_comes_back() -> None:
    free, _ = torch.cuda.mem_get_info(GPU)
    size = 256 * 2**20
    memory = Allocation(size, GPU)
    assert memory.data.device == GPU and memory.device == device_uuid(GPU)
    assert int(memory.data.count_nonzero()) == 0
    taken, _ = torch.cuda.mem_get_info(GPU)
    assert free - taken >= size
    memory.free()
    memory.free()
    after, _ = torch.cuda.mem_get_info(GPU)
    assert after >= taken + size


def test_what_does_not_fit_says_so() -> None:
    _, total = torch.cuda.mem_get_info(GPU)
    with pytest.raises(DeviceMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        Allocation(2 * total, GPU)
    assert torch.ones(4, device=GPU).sum().item() == 4


def test_as_many_slots_as_fit() -> None:
    with contextlib.closing(slots_on(GPU, PLAN)) as slots:
        first, second = (write(slots, PLAN, version, moved(version)) for version in (1, 2))
        assert first.source != second.source
