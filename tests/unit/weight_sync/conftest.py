"""Lets the tests here import what tests share (`tests/*.py`)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
