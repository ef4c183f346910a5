"""A vLLM worker's extension that finds device memory on the host: named by a test in the place of asyncrl's own."""

from __future__ import annotations

import functools

from host_memory import open_host_memory

from asyncrl.weight_sync import version_bytes, vllm_worker
from asyncrl.weight_sync.device_version import DeviceVersion

_opened = functools.partial(DeviceVersion, open_memory=open_host_memory)
version_bytes.DeviceVersion = vllm_worker.DeviceVersion = _opened  # type: ignore[assignment,misc]


class Extension(vllm_worker.WorkerExtension):
    """asyncrl's own, in another module: importing that is the purpose."""
