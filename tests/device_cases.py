"""What must hold of versions in device memory that another process reads: on a GPU, and on the host in its place."""

from __future__ import annotations

import torch
from device_peers import Peer, Weights, write

from asyncrl.weight_sync.device_memory import DeviceSlots
from asyncrl.weight_sync.plan import make_plan

WEIGHTS: Weights = {
    "embedding": torch.randn(97, 64, generator=torch.Generator().manual_seed(1)),
    "bias": torch.randn(5, generator=torch.Generator().manual_seed(2)),
    "head": torch.randn(64, 97, generator=torch.Generator().manual_seed(3)),
}
"""float32; the first travels in bfloat16, and tensors are larger than buckets."""
PLAN = make_plan(
    [("embedding", "bfloat16", (97, 64)), ("bias", "float32", (5,)), ("head", "float32", (64, 97))], 8192
)


def moved(step: int) -> Weights:
    return {name: tensor + step for name, tensor in WEIGHTS.items()}


def check_versions_are_read(slots: DeviceSlots, reader: Peer, device: str = "cpu") -> None:
    """Three, so that an allocation is used again; each is what was written, bit for bit."""
    for version in range(3):
        weights = moved(version)
        offer = write(
            slots, PLAN, version, {name: tensor.to(device, copy=True) for name, tensor in weights.items()}
        )
        assert reader.ask(offer) == "verified"
        found = reader.ask("go on")
        assert isinstance(found, dict), found
        for spec in PLAN.tensors:
            wanted = weights[spec.name].to(getattr(torch, spec.dtype)).view(torch.uint8).numpy()
            assert (found[spec.name] == wanted).all(), (version, spec.name)


def check_what_is_overwritten_is_caught(slots: DeviceSlots, reader: Peer, device: str = "cpu") -> None:
    """A reader that was given up between its two looks, and an offer whose bytes are another version's."""
    weights = {name: tensor.to(device, copy=True) for name, tensor in moved(7).items()}
    late = write(slots, PLAN, 10, weights)
    assert reader.ask(late) == "verified"
    for version in (11, 12):
        write(slots, PLAN, version, {name: tensor + version for name, tensor in weights.items()})
    answer = reader.ask("go on")
    assert isinstance(answer, str) and answer.startswith("ChecksumError: version 10, bucket 0"), answer
    answer = reader.ask(late)
    assert isinstance(answer, str) and answer.startswith("ChecksumError: version 10, bucket 0"), answer
