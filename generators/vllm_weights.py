"""The weights of a vLLM engine: a version's bytes are verified while tokens flow, and written between two steps.

Invariants
----------
- Weights come only through `apply`, which closes the gate before it pauses and opens it after the new label is set.
- Where versions are LoRA adapters, an adapter takes its predecessor's place between two steps, under the same id, so that
  requests under way go on with it as they do with whole weights.
- An update that fails after its first byte leaves a model that nobody can vouch for: the engine then ends.
Called by `vllm_engine`, whose part of `WeightTarget` this is.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from asyncrl.generators.engine import EngineDead
from asyncrl.generators.staged import Staged, verified
from asyncrl.generators.vllm_core import VLLMCore, dead_errors
from asyncrl.generators.vllm_requests import VLLMRequests
from asyncrl.weight_sync.errors import ChecksumError, DeviceMemoryError, IncompleteWeights, WeightSyncError
from asyncrl.weight_sync.fit import Fit, misfit
from asyncrl.weight_sync.mappings import Mappings
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.wire import DeviceMemory, Offer, encode

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM


class VLLMWeights:
    """Replaces the weights of `core`; those of `requests` that must not go on with their KV cache are begun anew."""

    def __init__(self, core: VLLMCore, requests: VLLMRequests) -> None:
        self._core = core
        self._requests = requests
        self._staged: dict[int, Staged] = {}
        self._mappings = Mappings()
        self._fitting: Plan | None = None
        """The last one that was found to be this model's."""
        self._probes = itertools.count()
        self.update_stall_s = 0.0
        """Total, from the requests to pause to the resumptions."""

    async def stage(self, offer: Offer) -> None:
        """Verify the offer's bytes while generation goes on: in a thread, or in the workers where they lie in device memory. Raises
        `ChecksumError`, `IncompleteWeights` for what is not this model, and `WeightSyncError` for an adapter where whole models are expected, or the other way round."""
        llm = self._core.serving()
        self._check_kind(offer)
        await self._check_fit(llm, offer)
        if isinstance(offer.source, DeviceMemory):
            await self._verify_in_workers(llm, offer)
            self._staged[offer.version] = Staged(offer=offer)
            return
        self._staged[offer.version] = await asyncio.to_thread(verified, offer, self._mappings)

    async def _verify_in_workers(self, llm: AsyncLLM, offer: Offer) -> None:
        """Each worker between two of its steps."""
        try:
            found = await llm.collective_rpc("verify_device_memory", args=(msgspec.to_builtins(offer),))
        except dead_errors() as error:
            raise self._core.died(error) from error
        for faults in found:
            if len(faults) == 1:
                raise DeviceMemoryError(
                    f"engine {self._core.engine_id}, version {offer.version}: {faults[0]}"
                )
            if faults:
                bucket, expected, got = faults
                raise ChecksumError(offer.version, bucket, expected, got, "the memory of its GPU")

    async def gpus(self) -> tuple[str, ...]:
        """UUIDs of the GPUs that the workers compute on; none on the CPU."""
        found: list[str] = await self._core.serving().collective_rpc("gpu_uuid")
        return tuple(uuid for uuid in found if uuid)

    async def _check_fit(self, llm: AsyncLLM, offer: Offer) -> None:
        """Each worker between two of its steps, once for each plan."""
        if offer.plan.adapter is not None or offer.plan == self._fitting:
            return
        try:
            found = await llm.collective_rpc("fit_of", args=(msgspec.to_builtins(offer.plan),))
        except dead_errors() as error:
            raise self._core.died(error) from error
        if wrong := misfit(offer.plan, msgspec.convert(found, list[Fit])):
            raise IncompleteWeights(
                f"engine {self._core.engine_id}, version {offer.version}: the offer is not the model of "
                f"{self._core.wanted.model_path}: {wrong}. The old version stays live; learner and engine must run one architecture."
            )
        self._fitting = offer.plan

    def _check_kind(self, offer: Offer) -> None:
        rank = offer.plan.adapter.rank if offer.plan.adapter else 0
        expected = self._core.wanted.adapter_rank
        if rank != expected:
            raise WeightSyncError(
                f"engine {self._core.engine_id}, version {offer.version}: expected {_kind(expected)}, got "
                f"{_kind(rank)}; learner and engine must run the same recipe ([learner.lora])"
            )

    async def discard(self, version: int) -> None:
        self._staged.pop(version, None)

    async def apply(self, offer: Offer) -> float:
        """Replace the weights between two steps. Returns the seconds from the request to pause to the resumption.

        Raises `RuntimeError` if this offer was not staged, `EngineDead` if the engine cannot go on.
        """
        llm = self._core.serving()
        staged = self._staged.get(offer.version)
        if staged is None or staged.offer != offer:
            raise RuntimeError(
                f"engine {self._core.engine_id}: version {offer.version} is applied but not staged; "
                f"staged are {sorted(self._staged)}. Stage the same offer first."
            )
        staged.check()
        self._core.gate.close()
        began = time.perf_counter()
        try:
            await self._requests.end_stale(llm, offer.version)
            # Not `pause_generation`: the same, and then a sleep of 20 ms.
            await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
            await self._write(llm, staged)
        except dead_errors() as error:
            raise self._core.died(error) from error
        finally:
            try:
                if not self._core.has_ended:
                    await llm.resume_generation()
            finally:
                self._core.gate.open()
        stall_s = time.perf_counter() - began
        self.update_stall_s += stall_s
        return stall_s

    async def _write(self, llm: AsyncLLM, staged: Staged) -> None:
        offer = staged.offer
        method = "replace_model" if offer.plan.adapter is None else "replace_adapter"
        complete = False
        try:
            # Both on the way at once; the core takes them in this order. Should the first fail, the label is never seen:
            # generation is not resumed then.
            await asyncio.gather(
                llm.collective_rpc(method, kwargs={"offer": encode(offer), "inode": staged.inode}),
                llm.update_weight_version(str(offer.version)),
            )
            complete = True
        except dead_errors():
            raise
        except Exception as error:
            raise EngineDead(
                f"engine {self._core.engine_id}: version {offer.version} was half written: {error}"
            ) from error
        finally:
            self._staged.pop(offer.version, None)
            if complete:
                self._core.version = offer.version
            else:
                self._core.end(f"its weights are undefined: writing version {offer.version} failed")

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        """Logprob of each of `tokens` after the first, at temperature 1, computed anew under the present weights."""
        from vllm import SamplingParams

        self._core.serving()
        probe_id = f"probe-{next(self._probes)}"
        await self._core.gate.passes(probe_id)
        llm = self._core.serving()
        sampling = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            ignore_eos=True,
            skip_reading_prefix_cache=True,
        )
        try:
            outputs = [
                output
                async for output in llm.generate(
                    self._core.prompt(tokens, probe_id), sampling, probe_id, lora_request=self._core.adapter
                )
            ]
        except dead_errors() as error:
            raise self._core.died(error) from error
        found: list[Any] = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
        values = [value for flat in found for value in flat.logprobs]
        if len(values) != len(tokens) - 1:
            raise RuntimeError(
                f"engine {self._core.engine_id}: probe of {len(tokens)} tokens gave {len(values)} logprobs"
            )
        return values


def _kind(rank: int) -> str:
    return f"an adapter of rank {rank}" if rank else "a whole model"
