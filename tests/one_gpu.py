"""How two NCCL ranks come to share one GPU: NCCL refuses two of one host on one device, so each says that it is another host.

They talk through sockets over loopback then: a test of correctness, and no figure of what NCCL does between GPUs. Imports nothing
of asyncrl, so that tools can use it anywhere.
"""

from __future__ import annotations


def environment(rank: int, gpus: int = 1) -> dict[str, str]:
    """Of the process of `rank`, set before it uses CUDA. Nothing where each rank has a GPU to itself."""
    if gpus > 1:
        return {}
    return {
        "NCCL_HOSTID": f"rank-{rank}",
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
        "NCCL_MNNVL_ENABLE": "0",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_CUMEM_ENABLE": "0",
        "NCCL_MAX_CTAS": "4",
        # Kernels that are loaded on first use would wait for the other process's kernel, which waits for them.
        "CUDA_MODULE_LOADING": "EAGER",
    }
