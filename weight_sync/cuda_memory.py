"""Memory of a GPU that two processes share: allocated here, opened there (CUDA IPC), each seen as a torch tensor.

The allocations are made through the CUDA driver and not through torch: torch's allocator carves tensors out of larger blocks,
whose handle would hand out whatever else lies there, cannot export expandable segments everywhere, and counts who
opened a storage in files that a killed process leaves behind. A handle here is 64 bytes and leads to one allocation.

Invariants
----------
- A handle is opened by other processes only (CUDA refuses its own), on the GPU of the allocation.
- `opened` waits for the device before it closes the mapping: nothing queued may still read it.
- Freed while another process has it open, an allocation is undefined there (CUDA's own words): the learner frees at its end
  only, and engines have it open only while they stage or apply.
Needs Linux, an NVIDIA driver and torch built for CUDA; raises `DeviceMemoryError` elsewhere. Called by `device_memory` (learner)
and `device_version` (engine's worker).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any, Final

import torch

from asyncrl.weight_sync.errors import DeviceMemoryError

HANDLE_BYTES: Final = 64
_LAZY_PEER_ACCESS: Final = 1


class _Handle(ctypes.Structure):
    """CUipcMemHandle: passed by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class _Region:
    """Says where bytes of device memory lie, in the way that torch takes such memory in without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


class Allocation:
    """Zeroed memory of one GPU: `data` (uint8, [size]) here, `handle` for other processes."""

    def __init__(self, size: int, device: torch.device) -> None:
        """`size` in bytes. Raises `DeviceMemoryError` if there is no room."""
        if size < 1:
            raise DeviceMemoryError(f"expected at least 1 byte of {device}, got {size}")
        self.device = device_uuid(device)
        address = ctypes.c_uint64()
        with torch.cuda.device(device):
            _call("cuMemAlloc_v2", f"{size} bytes of {device}", ctypes.byref(address), ctypes.c_size_t(size))
            self._address = address.value
            try:
                handle = _Handle()
                _call("cuIpcGetMemHandle", f"{device}", ctypes.byref(handle), ctypes.c_uint64(self._address))
                self.handle = ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)
                self.data = _tensor(self._address, size, device)
                self.data.zero_()  # the gaps between tensors are never written again
            except BaseException:
                self._free()
                raise
        self._device = device

    def free(self) -> None:
        """give the memory back; `data` is gone. May be called twice."""
        if self._address:
            with torch.cuda.device(self._device):
                torch.cuda.synchronize()
                self._free()

    def _free(self) -> None:
        address, self._address = self._address, 0
        self.data = torch.empty(0, dtype=torch.uint8)
        _call("cuMemFree_v2", "giving memory back", ctypes.c_uint64(address))


@contextlib.contextmanager
def opened(handle: bytes, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """The first `size` bytes of another process's allocation (uint8), which must be on `device`; only within the block.

    Raises `DeviceMemoryError` if the handle leads nowhere, such as when the other process has ended.
    """
    if len(handle) != HANDLE_BYTES or size < 1:
        raise DeviceMemoryError(
            f"expected a handle of {HANDLE_BYTES} bytes to at least 1 byte, got {len(handle)} to {size}"
        )
    address = ctypes.c_uint64()
    with torch.cuda.device(device):
        made = _Handle.from_buffer_copy(handle)
        what = f"memory of another process on {device}; is it alive, and on the same GPU?"
        _call("cuIpcOpenMemHandle_v2", what, ctypes.byref(address), made, ctypes.c_uint(_LAZY_PEER_ACCESS))
        try:
            yield _tensor(address.value, size, device)
        finally:
            torch.cuda.synchronize()
            _call("cuIpcCloseMemHandle", what, ctypes.c_uint64(address.value))


def device_uuid(device: torch.device) -> str:
    """Of the GPU itself: the same in every process, whatever numbers CUDA_VISIBLE_DEVICES gives it."""
    if not torch.cuda.is_available():
        raise DeviceMemoryError(f"{device}: no CUDA device here (torch.cuda.is_available() is false)")
    return str(torch.cuda.get_device_properties(device).uuid)


def _tensor(address: int, size: int, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(_Region(address, size), device=device)


def _call(name: str, what: str, *arguments: Any) -> None:
    # The driver works in the thread's current context, which torch's runtime makes current when it is first used there.
    torch.cuda.current_stream().synchronize()
    driver = _driver()
    status = getattr(driver, name)(*arguments)
    if status:
        said = ctypes.c_char_p()
        driver.cuGetErrorName(status, ctypes.byref(said))
        reason = said.value.decode() if said.value else f"status {status}"
        raise DeviceMemoryError(f"{name} failed with {reason}: {what}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceMemoryError(f"no CUDA driver on this machine: {error}") from error
