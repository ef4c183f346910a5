"""The reward pool with real worker processes: quick, hanging, dying and raising functions."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from asyncrl.generators.config import RewardsConfig, RewardTerm
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_pool import RewardPool, check_functions
from asyncrl.generators.score import RewardFailed

FUNCTIONS = '''
    """Reward functions of the tests."""
    import os, re, resource, subprocess, sys, time

    hoard = []

    def behave(answer_text, payload):
        """Does what the answer says."""
        if answer_text == "hang":
            time.sleep(600)
        if answer_text == "hang in C":  # holds the interpreter's lock: no Python signal handler would run
            re.match(r"(a+)+$", "a" * 60 + "b")
        if answer_text == "leave a child and die":
            child = subprocess.Popen(["sleep", "60"], close_fds=False)
            with open(__file__ + ".child", "w") as file:
                file.write(str(child.pid))
            os._exit(5)
        if answer_text == "exit":
            os._exit(7)
        if answer_text == "sys.exit":
            sys.exit(3)
        if answer_text == "abort":
            os.abort()
        if answer_text == "raise":
            raise LookupError("no such thing")
        if answer_text == "eat":
            eaten = [bytearray(16 * 2**20) for _ in range(1000)]
        if answer_text == "eat up":  # until no object of any size can be had, and keeps it
            size = 2**24
            while True:
                try:
                    hoard.append(bytearray(size))
                except MemoryError:
                    if size < 64:
                        raise
                    size //= 2
        if answer_text == "swallow":  # what a function makes of it is its own affair
            try:
                bytearray(2**40)
            except MemoryError:
                return 9.0
        if answer_text == "nan":
            return float("nan")
        print("standard output is free to use")
        return {"reward": float(answer_text), "length": len(answer_text), "pid": os.getpid()}

    def heavy(answer_text, payload):
        """Which heavy modules the worker has imported, and what its main module is."""
        heavy = sum(name in sys.modules for name in ("torch", "vllm", "ray", "transformers", "pyarrow"))
        return {"reward": heavy, "main": float(sys.modules["__main__"].__spec__.name.endswith("worker_process"))}

    def limits(answer_text, payload):
        """The limit of its address space (-1: none), and what of it is left."""
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        return {"reward": limit, "room": limit - mapped}

    def half(answer_text, payload):
        return 0.5

    def naming(answer_text, payload):
        return {"reward": 1.0, "answer": answer_text.split()[-1]}

    def naming_another(answer_text, payload):
        return {"reward": 1.0, "answer": "another"}
'''


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_tests.py").write_text(textwrap.dedent(FUNCTIONS))
    (tmp_path / "broken_rewards.py").write_text("def score(:\n")
    (tmp_path / "dying_rewards.py").write_text("import os; os._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def config(
    *names: str, timeout_s: float = 10.0, workers: int = 1, memory_bytes: int = 2**28
) -> RewardsConfig:
    terms = [
        RewardTerm(function=name if name in ("sums", "math", "format") else f"rewards_of_tests:{name}")
        for name in names
    ]
    return RewardsConfig(terms=terms, timeout_s=timeout_s, workers=workers, memory_bytes=memory_bytes)


PAYLOAD = json.dumps({"prompt_id": "tests#1", "question": "?", "answer": "16"})
BEHAVE = "rewards_of_tests:behave"


def scores(pool: RewardPool, *texts: str):
    """Score all at once, close, and hold that no process is left."""

    async def run():
        try:
            return await asyncio.gather(
                *(pool.score(text, PAYLOAD) for text in texts), return_exceptions=True
            )
        finally:
            await pool.close()

    results = asyncio.run(run())
    assert not [
        child for child in psutil.Process().children() if "worker_process" in " ".join(child.cmdline())
    ]
    return results


def test_terms_are_weighted_and_reported_by_name():
    terms = [
        RewardTerm(function="sums", weight=2.0),
        RewardTerm(function="format", weight=0.5),
        RewardTerm(function="rewards_of_tests:half", weight=-1.0),
    ]
    right, wrong = scores(RewardPool(RewardsConfig(terms=terms)), "<think>3+9</think>16", "17")
    assert right.reward == pytest.approx(2.0)
    assert right.parts == {"sums": 1.0, "format": 1.0, "rewards_of_tests:half": 0.5}
    assert wrong.reward == pytest.approx(-0.5)
    assert wrong.parts == {"sums": 0.0, "format": 0.0, "rewards_of_tests:half": 0.5}


def test_a_dict_reports_more_than_its_reward():
    (score,) = scores(RewardPool(config("behave")), "0.25")
    assert score.reward == 0.25
    assert score.parts[BEHAVE] == 0.25 and score.parts[f"{BEHAVE}/length"] == 4
    assert score.answer is None


def test_the_first_term_that_names_a_final_answer_says_it():
    terms = [RewardTerm(function=f"rewards_of_tests:{name}") for name in ("half", "naming", "naming_another")]
    (score,) = scores(RewardPool(RewardsConfig(terms=terms)), "it is 7")
    assert (score.reward, score.answer) == (2.5, "7")


def test_a_thousand_quick_scores():
    results = scores(RewardPool(config("behave", workers=2)), *(str(i) for i in range(1000)))
    assert [score.reward for score in results] == list(range(1000))
    assert len({score.parts[f"{BEHAVE}/pid"] for score in results}) == 2


@pytest.mark.parametrize("text", ["hang", "hang in C"])
def test_a_hang_costs_its_own_score_and_nothing_else(text):
    pool = RewardPool(config("behave", timeout_s=1.0, workers=2))
    begun = time.monotonic()
    hung, *others = scores(pool, text, *(str(i) for i in range(100)))
    assert time.monotonic() - begun < 10
    assert isinstance(hung, RewardFailed)
    assert all(word in hung.reason for word in (BEHAVE, "'tests#1'", "timeout_s = 1"))
    assert [score.reward for score in others] == list(range(100))


@pytest.mark.parametrize(
    ("text", "cause"), [("exit", "exit code 7"), ("sys.exit", "exit code 3"), ("abort", "signal 6")]
)
def test_a_dying_worker_is_replaced(text, cause):
    before, dead, after = scores(RewardPool(config("behave")), "1", text, "2")
    assert isinstance(dead, RewardFailed)
    assert all(word in dead.reason for word in (BEHAVE, "'tests#1'", cause))
    assert (before.reward, after.reward) == (1.0, 2.0)
    assert before.parts[f"{BEHAVE}/pid"] != after.parts[f"{BEHAVE}/pid"]


@pytest.mark.parametrize(("text", "cause"), [("raise", "LookupError: no such thing"), ("nan", "finite")])
def test_an_error_keeps_the_worker(text, cause):
    before, failed, after = scores(RewardPool(config("behave")), "1", text, "2")
    assert isinstance(failed, RewardFailed)
    assert all(word in failed.reason for word in (BEHAVE, "'tests#1'", cause))
    assert before.parts[f"{BEHAVE}/pid"] == after.parts[f"{BEHAVE}/pid"]


@pytest.mark.parametrize("text", ["eat", "eat up"])
def test_a_function_without_memory_costs_its_own_score_and_its_worker(text):
    """What it has no memory for may be its own: a worker that hoards would fail every score after this one."""
    before, failed, after = scores(RewardPool(config("behave", memory_bytes=200 * 2**20)), "1", text, "2")
    assert isinstance(failed, RewardFailed)
    assert all(word in failed.reason for word in (BEHAVE, "'tests#1'", "out of memory", "209,715,200"))
    assert (before.reward, after.reward) == (1.0, 2.0)
    assert before.parts[f"{BEHAVE}/pid"] != after.parts[f"{BEHAVE}/pid"]


def test_a_function_that_gets_along_without_the_memory_is_not_disturbed():
    (score,) = scores(RewardPool(config("behave")), "swallow")
    assert score.reward == 9.0


def test_without_a_limit_a_function_takes_what_it_wants():
    (failed,) = scores(RewardPool(config("limits", memory_bytes=0)), "")
    assert failed.parts["rewards_of_tests:limits"] == -1.0
    (limited,) = scores(RewardPool(config("limits", memory_bytes=2**28)), "")
    # On top of what loading took, give or take what Python maps by itself meanwhile.
    assert abs(limited.parts["rewards_of_tests:limits/room"] - 2**28) < 2**25


def test_what_a_function_starts_does_not_keep_its_seat(functions):
    """A grandchild outlives the worker: its end must be seen all the same, not at the deadline alone."""
    begun = time.monotonic()
    failed, after = scores(RewardPool(config("behave", timeout_s=30.0)), "leave a child and die", "2")
    psutil.Process(int((functions / "rewards_of_tests.py.child").read_text())).kill()
    assert isinstance(failed, RewardFailed) and "exit code 5" in failed.reason
    assert after.reward == 2.0 and time.monotonic() - begun < 15


def test_the_failing_term_is_the_one_named():
    (failed,) = scores(RewardPool(config("half", "behave", timeout_s=0.5)), "hang")
    assert f"reward function '{BEHAVE}'" in failed.reason


def test_workers_import_nothing_heavy():
    (score,) = scores(RewardPool(config("heavy", "sums", "math", "format")), "16")
    assert score.parts["rewards_of_tests:heavy"] == 0
    assert score.parts["rewards_of_tests:heavy/main"] == 1


def test_the_event_loop_goes_on_while_functions_hang():
    async def run():
        pool = RewardPool(config("behave", timeout_s=1.0))
        scoring = asyncio.create_task(pool.score("hang", PAYLOAD))
        ticks = 0
        while not scoring.done():  # ends with the hang's timeout
            await asyncio.sleep(0.01)
            ticks += 1
        await pool.close()
        assert isinstance(scoring.exception(), RewardFailed)
        return ticks

    assert asyncio.run(run()) > 20


def test_a_cancelled_score_gives_its_seat_back():
    async def run():
        pool = RewardPool(config("behave", timeout_s=0.5))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pool.score("hang", PAYLOAD), 0.1)
        score = await asyncio.wait_for(pool.score("3", PAYLOAD), 10)
        await pool.close()
        return score.reward

    assert asyncio.run(run()) == 3.0


def test_close_fails_what_is_in_flight_and_refuses_more():
    async def run():
        pool = RewardPool(config("behave", timeout_s=60.0, workers=2))
        pids = pool.pids()
        hanging = [asyncio.create_task(pool.score("hang", PAYLOAD)) for _ in range(4)]
        await asyncio.sleep(0.2)
        begun = time.monotonic()
        await pool.close()
        results = await asyncio.gather(*hanging, return_exceptions=True)
        assert time.monotonic() - begun < 5
        assert all(isinstance(r, RewardFailed) and "closed" in r.reason for r in results)
        with pytest.raises(RewardFailed, match="closed"):
            await pool.score("1", PAYLOAD)
        await pool.close()
        return pids

    assert not any(psutil.pid_exists(pid) for pid in asyncio.run(run()))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sum", "expected sums, math, format"),
        ("nowhere_at_all:score", "PYTHONPATH"),
        ("rewards_of_tests:absent", "absent"),
        ("broken_rewards:score", "SyntaxError"),
        ("dying_rewards:score", "did not come up"),
    ],
)
def test_a_function_that_is_not_there_is_found_at_construction(name, words):
    with pytest.raises(FunctionError, match=words):
        check_functions(RewardsConfig(terms=[RewardTerm(function=name)]))
    assert not [
        child for child in psutil.Process().children() if "worker_process" in " ".join(child.cmdline())
    ]


def test_terms_must_be_there_and_be_different():
    check_functions(config("sums", "behave"))
    with pytest.raises(FunctionError, match="no terms"):
        RewardPool(RewardsConfig(terms=[]))
    with pytest.raises(FunctionError, match="twice"):
        RewardPool(config("sums", "sums"))


OWNER = """
import asyncio, json, sys
from asyncrl.generators.config import RewardsConfig, RewardTerm
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_pool import RewardPool

async def main():
    pool = RewardPool(
        RewardsConfig(terms=[RewardTerm(function="rewards_of_tests:behave")], timeout_s=1.5, workers=2)
    )
    scoring = asyncio.create_task(pool.score("hang in C", "{}"))
    await asyncio.sleep(0.3)
    print(json.dumps(pool.pids()), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_workers_end_when_their_owner_is_killed(functions):
    """One is idle and sees the closed socket; one hangs without ever letting Python run and dies by the alarm."""
    environment = {**os.environ, "PYTHONPATH": str(functions)}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    workers = [psutil.Process(pid) for pid in json.loads(owner.stdout.readline())]
    owner.send_signal(signal.SIGKILL)
    owner.wait(10)
    gone, alive = psutil.wait_procs(workers, timeout=15)
    assert len(gone) == 2 and not alive
