"""Check the `math` reward on GSM8K: `python tools/check_gsm8k.py DIR`, DIR with train.jsonl and test.jsonl.

For every row, through the reward pool that a run uses: the gold answer, its number in a box and its number in a
sentence must score 1; the number changed by one, and with a digit more, must score 0. Exit code 1 if any row does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from pathlib import Path

from asyncrl.generators.config import RewardsConfig, RewardTerm
from asyncrl.generators.reward_pool import RewardPool


def variants(gold: str) -> list[tuple[str, float]]:
    """Answer texts made of one gold answer, each with the reward it deserves."""
    reasoning, _, number = gold.rpartition("####")
    number = number.strip()
    value = float(number.replace(",", ""))
    changed = f"{value + 1:g}" if value % 1 else f"{int(value) + 1}"
    return [
        (gold, 1.0),
        (f"{reasoning}#### {changed}", 0.0),
        (f"{reasoning}#### {number}7", 0.0),
        (f"{reasoning}The answer is \\boxed{{{number}}}.", 1.0),
        (f"{reasoning}The answer is \\boxed{{{changed}}}.", 0.0),
        (f"{reasoning}The answer is \\boxed{{{number}7}}.", 0.0),
        (f"{reasoning}The answer is \\boxed{{{number}\\text{{ of them}}}}.", 1.0),
        (f"{reasoning}So the answer is ${number}.", 1.0),
        (f"{reasoning}So the answer is ${changed}.", 0.0),
        (f"{reasoning}So the answer is ${number}7.", 0.0),
    ]


async def check(folder: Path, workers: int) -> int:
    """Number of answers that scored wrong."""
    pool = RewardPool(
        RewardsConfig(terms=[RewardTerm(function="math")], workers=workers),
    )
    lines = [
        (path.name, number, json.loads(line))
        for path in (folder / "train.jsonl", folder / "test.jsonl")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
    ]
    wrong = checked = 0
    begun = time.monotonic()

    async def one(name: str, number: int, row: dict[str, str]) -> None:
        nonlocal wrong, checked
        payload = json.dumps({**row, "prompt_id": f"{name}, line {number}"})
        for text, deserved in variants(row["answer"]):
            score = await pool.score(text, payload)
            checked += 1
            if score.reward != deserved:
                wrong += 1
                end = re.sub(r"\s+", " ", text[-60:])
                print(f"{name}, line {number}: expected {deserved}, got {score.reward}: ...{end}")

    try:
        for start in range(0, len(lines), 256):
            await asyncio.gather(*(one(*line) for line in lines[start : start + 256]))
    finally:
        await pool.close()
    seconds = time.monotonic() - begun
    print(f"{len(lines)} rows, {checked} answers, {wrong} wrong, {seconds:.1f} s ({checked / seconds:.0f}/s)")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    sys.exit(1 if asyncio.run(check(options.folder, options.workers)) else 0)


if __name__ == "__main__":
    main()
