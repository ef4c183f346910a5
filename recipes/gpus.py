"""What the planner knows of GPUs: a table of data-sheet figures, a recipe's own rows, and which GPUs there are. Pure.

Units: FLOP/s dense (a data sheet's "with sparsity" halved), bytes in powers of ten, links in bytes/s one way per GPU
(NVLink's data-sheet figure counts both ways). Memory is the nominal size; a driver shows up to 7 % more or 2 % less.
Called by `recipe` (sections `[gpus.NAME]`, `[[cluster]]`) and by the planner.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
Amount = Annotated[float, msgspec.Meta(gt=0)]


class UnknownGPU(ValueError):
    """A GPU type with no row, or a row with fields missing. The message names the way out."""


class GPUSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU."""

    flops_per_s: float
    """Dense matrix products in bfloat16, or float16 where there is no bfloat16."""
    float32_flops_per_s: float
    """Without tensor cores: torch's default for float32."""
    memory_bytes: float
    memory_bytes_per_s: float
    node_link_bytes_per_s: float
    """To the other GPUs of its node: NVLink or PCIe."""
    cluster_link_bytes_per_s: float
    """To other nodes, this GPU's share of the network cards."""
    has_bfloat16: bool = True
    ray_name: str
    """What Ray calls a machine's accelerator type; it does not tell all rows apart (A100 of 40 and of 80 GB)."""
    source: str


class GPUConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[gpus.NAME]`: fields that replace those of the built-in row, or all of them for a GPU that has none."""

    flops_per_s: Amount | None = None
    float32_flops_per_s: Amount | None = None
    memory_bytes: Amount | None = None
    memory_bytes_per_s: Amount | None = None
    node_link_bytes_per_s: Amount | None = None
    cluster_link_bytes_per_s: Amount | None = None
    has_bfloat16: bool | None = None
    ray_name: str | None = None
    """Default: NAME."""


class ClusterEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One `[[cluster]]` entry: equal nodes with equal GPUs."""

    gpu_type: str
    """A row of the built-in table or of `[gpus]`."""
    gpus_per_node: Positive
    nodes: Positive = 1

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes


def _row(
    flops: float,
    float32: float,
    memory: float,
    bandwidth: float,
    node: float,
    cluster: float,
    source: str,
    *,
    ray: str,
    bf16: bool = True,
) -> GPUSpec:
    """TFLOP/s, TFLOP/s, GB, GB/s, GB/s, GB/s."""
    return GPUSpec(
        flops_per_s=flops * 1e12,
        float32_flops_per_s=float32 * 1e12,
        memory_bytes=memory * 1e9,
        memory_bytes_per_s=bandwidth * 1e9,
        node_link_bytes_per_s=node * 1e9,
        cluster_link_bytes_per_s=cluster * 1e9,
        has_bfloat16=bf16,
        ray_name=ray,
        source=source,
    )


# fmt: off
GPUS: Mapping[str, GPUSpec] = {
    "H100": _row(989.4, 67, 80, 3350, 450, 50, "NVIDIA H100 data sheet, SXM5 (1,979 sparse); network: DGX H100, 400 Gb/s a GPU", ray="H100"),
    "H100-PCIE": _row(756, 51, 80, 2000, 64, 12.5, "NVIDIA H100 data sheet, PCIe (1,513 sparse); PCIe 5 x16; network assumed, 100 Gb/s a GPU", ray="H100"),
    "H200": _row(989.4, 67, 141, 4800, 450, 50, "NVIDIA H200 data sheet, SXM (1,979 sparse); network: DGX H200, 400 Gb/s a GPU", ray="H200"),
    "B200": _row(2250, 75, 180, 8000, 900, 50, "NVIDIA HGX/DGX B200 data sheet (4,500 sparse); network: DGX B200, 400 Gb/s a GPU", ray="B200"),
    "A100-40G": _row(312, 19.5, 40, 1555, 300, 25, "NVIDIA A100 data sheet, SXM4 40GB; network: DGX A100, 200 Gb/s a GPU", ray="A100"),
    "A100-80G": _row(312, 19.5, 80, 2039, 300, 25, "NVIDIA A100 data sheet, SXM4 80GB; network: DGX A100, 200 Gb/s a GPU", ray="A100"),
    "L40S": _row(362.05, 91.6, 48, 864, 32, 6.25, "NVIDIA L40S data sheet (733 sparse); PCIe 4 x16; network: AWS g6e.48xlarge, 400 Gb/s for 8", ray="L40S"),
    "L4": _row(121, 30.3, 24, 300, 32, 1.5625, "NVIDIA L4 data sheet (242 sparse); PCIe 4 x16; network: AWS g6.48xlarge, 100 Gb/s for 8", ray="L4"),
    "A10G": _row(70, 35, 24, 600, 32, 1.5625, "NVIDIA A10G data sheet (140 sparse); PCIe 4 x16; network: AWS g5.48xlarge, 100 Gb/s for 8", ray="A10G"),
    "H20": _row(148, 44, 96, 4000, 450, 50, "NVIDIA H20 product brief; NVLink 900 GB/s both ways; network as HGX H100, assumed", ray="H20"),
    "RTX-4090": _row(165.2, 82.6, 24, 1008, 32, 1.25, "NVIDIA Ada whitepaper, float32 accumulation; PCIe 4 x16; network assumed, 10 Gb/s a GPU", ray="GeForce-RTX-4090"),
    "RTX-3090": _row(71, 35.6, 24, 936, 32, 1.25, "NVIDIA GA102 whitepaper, float32 accumulation; PCIe 4 x16; network assumed, 10 Gb/s a GPU", ray="GeForce-RTX-3090"),
    "T4": _row(65, 8.1, 16, 320, 16, 1.5625, "NVIDIA T4 data sheet, float16; PCIe 3 x16; network: AWS g4dn.metal, 100 Gb/s for 8", ray="T4", bf16=False),
    "V100": _row(125, 15.7, 16, 900, 150, 6.25, "NVIDIA V100 data sheet, SXM2 16GB, float16; network: DGX-1, 4 x 100 Gb/s for 8", ray="V100", bf16=False),
    "V100-32G": _row(125, 15.7, 32, 900, 150, 6.25, "NVIDIA V100 data sheet, SXM2 32GB, float16; network: DGX-1, 4 x 100 Gb/s for 8", ray="V100", bf16=False),
}
# fmt: on


def gpu_spec(name: str, rows: Mapping[str, GPUConfig]) -> GPUSpec:
    """The built-in row under a recipe's own. Raises UnknownGPU."""
    own = (
        {k: v for k, v in msgspec.structs.asdict(rows[name]).items() if v is not None} if name in rows else {}
    )
    if name in GPUS:
        known = msgspec.structs.asdict(GPUS[name])
        note = f"{known['source']}; {', '.join(own)} from [gpus.{name}]" if own else known["source"]
        return GPUSpec(**{**known, **own, "source": note})
    known = {**own, "ray_name": own.get("ray_name", name), "source": f"[gpus.{name}]"}
    missing = [f.name for f in msgspec.structs.fields(GPUSpec) if f.required and f.name not in known]
    if missing:
        what = (
            f"[gpus.{name}] lacks {', '.join(missing)}"
            if own
            else f"no GPU of that name; known: {', '.join(GPUS)}"
        )
        raise UnknownGPU(f"{what}; describe it in [gpus.{name}] of the recipe")
    return GPUSpec(**known)


def unknown_gpus(
    cluster: Sequence[ClusterEntry], rows: Mapping[str, GPUConfig]
) -> Iterator[tuple[str, str, str]]:
    """(key path, what was found, advice) for each entry that the planner could not read."""
    for i, entry in enumerate(cluster):
        try:
            gpu_spec(entry.gpu_type, rows)
        except UnknownGPU as error:
            yield f"cluster[{i}].gpu_type", repr(entry.gpu_type), str(error)


def parse_fleet(text: str) -> list[ClusterEntry]:
    """`H100:8x2,L40S:4`: two nodes with eight H100 each, and one with four L40S. Raises ValueError."""
    entries = []
    for part in text.split(","):
        name, colon, counts = part.strip().partition(":")
        per_node, times, nodes = counts.partition("x")
        numbers = [per_node, nodes] if times else [per_node]
        if not name or not colon or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise ValueError(
                f"{part.strip()!r}: expected TYPE:GPUS or TYPE:GPUSxNODES, such as H100:8x2 (8 GPUs a node, 2 nodes)"
            )
        entries.append(
            ClusterEntry(gpu_type=name, gpus_per_node=int(per_node), nodes=int(nodes) if times else 1)
        )
    return entries
