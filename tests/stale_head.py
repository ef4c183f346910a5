"""A vLLM worker with a fault: a tied output head keeps the packed copy of the weights before. Named to vLLM by a test alone."""

from __future__ import annotations

from asyncrl.weight_sync import vllm_worker


class StaleHead(vllm_worker.WorkerExtension):
    """What `vllm_worker.WorkerExtension` is, in a process where heads are not packed anew."""


def _left_as_it_is(self: vllm_worker.OfferedWeights) -> None:
    """In the place of `_repack_heads`."""


vllm_worker.OfferedWeights._repack_heads = _left_as_it_is  # type: ignore[method-assign]
