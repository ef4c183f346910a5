"""One command for a machine with a GPU: runs `tests/gpu` and the GPU's benchmarks, and prints a table of figures.

    python tools/gpu_check.py --json out.json            # everything that this machine has the packages for
    python tools/gpu_check.py --parts memcpy ipc nccl    # these need torch alone

Each part is a process of its own with a deadline, so one that crashes or hangs costs no other. A part whose packages are missing
says which. Exit status: 0 if all parts that ran went well, 1 if one did not, 2 without a CUDA device.
`--device cpu` runs the parts that have a counterpart there (gloo for NCCL, no copies over a bus): a check of this tool only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests"
OURS = ("msgspec", "xxhash", "zmq")
ENGINE = (*OURS, "pyarrow", "transformers", "vllm")
PARTS: dict[str, tuple[tuple[str, ...], str]] = {
    "memcpy": ((), "copies between host and GPU, and on the GPU"),
    "ipc": ((), "memory of one process opened by another on the same GPU, and copied"),
    "nccl": ((), "broadcast between two ranks of our own process group"),
    "sum": (("msgspec", "xxhash"), "checksum made on the GPU, against xxh3 of a copy on the host"),
    "version": (OURS, "a version over ipc: written, opened, verified, read, verified again"),
    "collective": (OURS, "a version over a collective: packed, broadcast, received into memory of the host"),
    "engine": (ENGINE, "vLLM with our weight sync: its stall over ipc and shm"),
    "vllm_nccl": (("vllm", "transformers"), "vLLM with its own `nccl` weight transfer engine"),
    TESTS: ((*ENGINE, "pytest", "ray", "peft", "datasets"), "tests/gpu"),
}
"""Part -> packages beside torch, and what it measures."""
ON_CPU = ("nccl", "sum", "version", "collective")


def missing(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def environment() -> dict[str, str]:
    """asyncrl is found without having been installed, and what is imported before CUDA is used is the same in every part."""
    paths = [str(ROOT / "tools" / "typing"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONSAFEPATH": "1",
    }


def command_of(part: str, args: argparse.Namespace, out: Path) -> list[str]:
    if part == TESTS:
        return [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu"), f"--junitxml={out}"]
    script = {"engine": "gpu_engine.py", "vllm_nccl": "gpu_vllm.py"}.get(part, "gpu_parts.py")
    return [
        *(sys.executable, str(ROOT / "tools" / script), part, str(out)),
        *("--mb", str(args.mb), "--tensors", str(args.tensors), "--device", args.device),
    ]


def run_part(part: str, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Its figures, or `error` with the end of what it printed. Waits for its process, at most `--part-s`."""
    out = folder / f"{part}.json"
    log = folder / f"{part}.log"
    started = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command_of(part, args, out),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(),
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout=args.part_s)
        except subprocess.TimeoutExpired:
            code = f"not done after {args.part_s:g} s"
        finally:
            end_all(process)
    figures: dict[str, object] = {"seconds": round(time.monotonic() - started, 1)}
    if part == TESTS:
        figures["result"] = next(iter(log.read_text().strip().splitlines()[-1:]), "nothing was printed")
    elif out.exists():
        figures |= json.loads(out.read_text())
    if code != 0:
        figures["error"] = f"exit {code}: " + log.read_text()[-1500:]
    return figures


def end_all(process: subprocess.Popen[bytes]) -> None:
    """What a part left running is of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(timeout=20)


def show(part: str, figures: dict[str, object]) -> None:
    print(f"\n{part}: {PARTS[part][1]}")
    for name, value in figures.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"  {name:>28}  {text}", flush=True)


def about_machine() -> dict[str, object]:
    import torch

    facts: dict[str, object] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none in this torch",
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name(0)
        facts["devices"] = torch.cuda.device_count()
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["memory_gb"] = round(torch.cuda.mem_get_info(0)[1] / 1e9, 1)
    return facts


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mb", type=int, default=988, help="size of a version, in 10^6 bytes")
    parser.add_argument("--tensors", type=int, default=290)
    parser.add_argument("--part-s", type=float, default=900.0, help="most seconds for one part")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> int:
    args = parsed()
    facts = about_machine()
    for name, value in facts.items():
        print(f"{name:>10}  {value}")
    if args.device == "cuda" and "device" not in facts:
        print("no CUDA device: torch.cuda.is_available() is false. Nothing was measured.")
        return 2
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for part in args.parts:
            lacking = missing(PARTS[part][0])
            if lacking:
                results[part] = {"skipped": f"not installed here: {', '.join(lacking)}"}
            elif args.device == "cpu" and part not in ON_CPU:
                results[part] = {"skipped": "needs a GPU"}
            else:
                results[part] = run_part(part, args, Path(folder))
            show(part, results[part])
    if args.json:
        args.json.write_text(json.dumps({"machine": facts, "parts": results}, indent=1) + "\n")
    return 1 if any("error" in figures for figures in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
