"""Engines that come and go while a whole run goes on: killed, added, removed, on machines that join and are lost."""

import contextlib
import signal
from pathlib import Path

import pyarrow.compute as pc
import pytest
from ray.cluster_utils import Cluster

from asyncrl.buffer.reading import read_log
from tests.e2e.runs import VLLM, launched, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def check_sound(run, steps):
    """Every rollout is accounted for, each was trained once, and no token was sampled twice or lost in between."""
    summary = run.summary
    assert summary["outcome"] == "finished" and summary["steps_done"] == steps, run.text
    assert summary["conservation"]["holds"] and summary["rollouts_trained"] == steps * 16
    assert summary["tokens_past_bound"] == 0
    log = read_log(run.folder / "rollouts")
    trained = log.states.filter(pc.equal(log.states["state"], "TRAINED"))["rollout_id"].to_pylist()
    assert len(set(trained)) == len(trained) == steps * 16
    check_tails(run.folder)


def test_engines_that_are_killed_are_started_again(tmp_path, model):
    with launched(tmp_path, model, "run.steps=60", "evaluation.source=", "pools.0.fake.step_s=0.01") as run:
        run.wait_for_step()
        for engine in ("fake-0", "fake-1"):
            run.engine(engine).kill()
            run.wait_for(rf"^note +engine {engine} died \(.*\); starting it again in \d s")
        children = run.descendants()
        assert run.end(240) == 0, run.text
        assert run.left_over(children) == []
    check_sound(run, steps=60)


@pytest.mark.vllm
def test_a_run_goes_on_after_the_death_of_its_only_vllm_engine(tmp_path, model):
    """The engine's core is killed, its own process lives: the tails of all rollouts are handed in before it is replaced."""
    with launched(tmp_path, model, *VLLM, "run.steps=12", "evaluation.source=") as run:
        run.wait_for_step()
        (core,) = [p for p in run.engine("fake-0").children() if "EngineCore" in " ".join(p.cmdline())]
        core.kill()
        run.wait_for(r"^note +engine fake-0 died \(.*EngineDead.*\); starting it again in 1 s")
        children = run.descendants()
        assert run.end(240) == 0, run.text
        assert run.left_over(children) == []
    check_sound(run, steps=12)


def test_a_pool_that_keeps_dying_fails_and_the_others_go_on(tmp_path, model):
    pools = (
        'pools=[{ name = "good", engine = "fake", device = "cpu", fake = { step_s = 0.01 } },'
        ' { name = "bad", engine = "fake", device = "cpu", max_deaths = 1, fake = { step_s = 0.01 } }]'
    )
    with launched(tmp_path, model, pools, "run.steps=100000", "evaluation.source=") as run:
        run.wait_for_step()
        run.engine("bad-0").kill()
        run.wait_for(r"^note +engine bad-0 died")
        run.wait_until(lambda: run.engine("bad-0.2") is not None)
        run.engine("bad-0.2").kill()
        run.wait_for(r"^note +pool bad failed: all its engines are given up")
        run.wait_until(lambda: run.status()["snapshot"]["pools"][1]["state"] == "failed", timeout_s=10)
        good, bad = run.status()["snapshot"]["pools"]
        assert good["state"] == "serving" and "bad-0: " in bad["reason"]
        version = run.status()["snapshot"]["version"]
        run.wait_until(lambda: run.status()["snapshot"]["version"] > version + 2)
        run.command("scale", "--pool", "bad", "--engines", "1")  # tried again
        run.wait_until(lambda: run.status()["snapshot"]["pools"][1]["state"] == "serving")
        run.engine("good-0").kill()
        run.wait_for(r"^note +engine good-0 died")
        run.command("stop")
        assert run.end(60) == 130, run.text


def test_concurrency_engines_pause_and_drain_while_the_run_goes_on(tmp_path, model):
    """Every command, from another process, and what the run's own status says of it."""
    with launched(
        tmp_path, model, "run.steps=100000", "evaluation.source=", "pools.0.fake.step_s=0.02"
    ) as run:
        run.wait_for_step()

        def engines(**wanted):
            found = run.status()["snapshot"]["engines"]
            return bool(found) and all(e[name] == value for e in found for name, value in wanted.items())

        run.command("scale", "--concurrency", "3")
        run.wait_until(lambda: engines(slots=3) and engines_hold_at_most(run, 3), timeout_s=10)
        run.command("scale", "--pool", "fake", "--engines", "3")
        run.wait_until(lambda: run.status()["snapshot"]["pools"][0]["engines_serving"] == 3)
        assert engines(slots=3)
        run.command("pause")
        run.wait_until(lambda: engines(state="paused", slots_used=0), timeout_s=10)
        assert run.status()["snapshot"]["state"] == "paused"
        version = run.status()["snapshot"]["version"]
        run.command("continue")
        run.wait_until(lambda: run.status()["snapshot"]["version"] > version + 1)
        run.command("scale", "--engines", "1")
        run.wait_for(r"^note +engine fake-\d is removed", times=2)
        run.wait_until(
            lambda: [e["engine_id"] for e in run.status()["snapshot"]["engines"]] == ["fake-0"], timeout_s=10
        )
        run.command("drain", "--pool", "fake")
        run.wait_until(lambda: engines(state="paused"), timeout_s=10)
        run.command("scale", "--concurrency", "auto")
        run.wait_until(lambda: run.status()["snapshot"]["pools"][0]["concurrency"] == "auto", timeout_s=10)
        assert "no pool 'fast'" in run.command("scale", "--pool", "fast", "--engines", "1", expect=2)
        assert "is built for" in run.command("scale", "--concurrency", "1000", expect=2)
        assert "no engine would be left" in run.command("scale", "--engines", "0", expect=1)
        run.command("scale", "--engines", "2", "--concurrency", "1000", expect=2)  # all of it or nothing
        assert run.status()["snapshot"]["pools"][0]["engines_wanted"] == 1
        run.command("pause")
        run.wait_until(lambda: engines(state="paused"), timeout_s=10)
        run.command("drain")  # what is under way is finished, so the pause is over
        assert run.end(60) == 0, run.text
    assert run.summary["outcome"] == "drained" and run.summary["conservation"]["holds"]
    check_tails(run.folder)


def engines_hold_at_most(run, slots):
    return all(engine["slots_used"] <= slots for engine in run.status()["snapshot"]["engines"])


@contextlib.contextmanager
def cluster():
    """Ray with one machine that has room for one engine; `add_node` and `remove_node` change it."""
    small = {"object_store_memory": 80 * 2**20}
    found = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "resources": {"slot": 1}, "include_dashboard": False, **small},
    )
    try:
        yield found, lambda: found.add_node(num_cpus=0, resources={"slot": 1}, **small)
    finally:
        found.shutdown()


def test_machines_join_and_are_lost_in_the_middle_of_a_run(tmp_path, model):
    pools = (
        'pools=[{ name = "fake", engine = "fake", engines = 2, min_engines = 1, device = "cpu", concurrency = 8,'
        " resources = { slot = 1.0 }, fake = { step_s = 0.01 } }]"
    )
    with cluster() as (machines, join):
        changes = (pools, f"run.ray_address={machines.address}", "run.steps=100000", "evaluation.source=")
        with launched(tmp_path, model, *changes) as run:
            run.wait_for_step()
            assert run.status()["snapshot"]["pools"][0]["state"] == "short"
            machine = join()
            run.wait_until(lambda: run.status()["snapshot"]["pools"][0]["engines_serving"] == 2)
            nodes = {e["node"] for e in run.status()["snapshot"]["engines"]}
            assert len(nodes) == 2
            version = run.status()["snapshot"]["version"]
            run.wait_until(lambda: run.status()["snapshot"]["version"] > version + 2)
            machines.remove_node(machine, allow_graceful=False)
            run.wait_for(r"^note +engine fake-1 died")
            version = run.status()["snapshot"]["version"]
            run.wait_until(lambda: run.status()["snapshot"]["version"] > version + 2)
            join()  # another machine takes its place
            run.wait_until(lambda: run.status()["snapshot"]["pools"][0]["engines_serving"] == 2)
            run.command("drain")
            assert run.end(120) == 0, run.text
    assert run.summary["outcome"] == "drained"
    check_tails(run.folder)


def check_tails(folder: Path):
    """Nothing but the tokens after an engine's last segment was lost with it: no rollout begins anew, and each segment
    follows the one before it."""
    log = read_log(folder / "rollouts")
    ends = {}
    for row in log.segments.select(["rollout_id", "start", "tokens"]).to_pylist():
        assert row["start"] == ends.get(row["rollout_id"], 0)
        ends[row["rollout_id"]] = row["start"] + len(row["tokens"])


def test_a_launcher_that_is_stopped_by_command(tmp_path, model):
    with launched(tmp_path, model, "run.steps=100000", "evaluation.source=") as run:
        run.wait_for_step()
        children = run.descendants()
        run.command("stop")
        assert run.end(30) == 130, run.text
        assert run.left_over(children) == []
    assert run.process.returncode == 128 + signal.SIGINT
