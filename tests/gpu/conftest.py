"""Lets the tests here import what tests share (`tests/*.py`). Where there is one GPU, this process is a host of its own to NCCL, which
reads that once: the tests of groups have two ranks on that GPU."""

import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

import one_gpu

if torch.cuda.is_available():
    os.environ.update(one_gpu.environment(1, torch.cuda.device_count()))
