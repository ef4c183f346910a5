"""tools/buffer_rivals.py: what is sent arrives, and a run that loses, changes or kills something ends without figures."""

import importlib
import multiprocessing
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BAD_RIVALS = """
import os
import buffer_rivals

class Dying(buffer_rivals.Ring):
    def sending(self, producer):
        os._exit(3)
        yield

class Tearing(buffer_rivals.Ring):
    def receiving(self):
        for receive in super().receiving():
            yield lambda wanted: self.tear(receive(wanted))

    def tear(self, push):
        push.ids[-1] += 1
        return push
"""


@pytest.fixture
def rivals(monkeypatch):
    """Children import it by name, so the folder is on the path that they inherit."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("buffer_rivals")


@pytest.fixture
def bad_rivals(rivals, monkeypatch, tmp_path):
    (tmp_path / "bad_rivals.py").write_text(BAD_RIVALS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("bad_rivals")


@pytest.fixture
def memories(rivals, monkeypatch):
    """The files of shared memory that a run makes."""
    made = []

    def make(*arguments, **options):
        memory = SharedMemory(*arguments, **options)
        made.append(Path("/dev/shm", memory.name))
        return memory

    monkeypatch.setattr(rivals, "SharedMemory", make)
    return made


def test_the_workload_is_long_tailed_and_shared_out_whole(rivals):
    workload = rivals.Workload(rollouts=3001, push=8)
    sent = [rivals.make_rollouts(workload, producer) for producer in range(2)]
    assert [sum(map(len, pushes)) for pushes in sent] == [1501, 1500]
    assert all(len(push) == 8 for pushes in sent for push in pushes[:-1])
    lengths = [len(rollout.ids) for push in sent[0] for rollout in push][: rivals.POOL]
    assert np.mean(lengths) == pytest.approx(rivals.MEAN_TOKENS, rel=0.01)
    assert np.median(lengths) < 0.85 * np.mean(lengths) and max(lengths) > 5 * np.mean(lengths)
    assert sent[0][0][0].ids.dtype == np.int32 and sent[0][0][0].logprobs.dtype == np.float32


def test_sums_do_not_depend_on_how_rollouts_are_pushed(rivals):
    one, many = (rivals.expected_sums(rivals.Workload(rollouts=100, push=push)) for push in (1, 64))
    assert one == many and one.rollouts == 100


@pytest.mark.parametrize("name", ["zmq+msgpack", "arrow over zmq"])
def test_messages_come_back_as_they_were(rivals, name):
    rival = rivals.RIVALS[name](rivals.Workload(rollouts=64))
    rollouts = rivals.make_rollouts(rival.workload, 0)[0]
    frames = [memoryview(bytes(frame)) for frame in rival.encode(rollouts)]
    for got, expected in zip(rival.decode(frames), rivals.pack(rollouts), strict=True):
        assert got.dtype == expected.dtype and (got == expected).all()


@pytest.mark.parametrize("name", ["memcpy", "shared-memory ring", "arrow over zmq"])
def test_every_rollout_arrives_once_and_whole(rivals, memories, name):
    """More pushes than slots (16 each), so that producers wait for the consumer."""
    workload = rivals.Workload(rollouts=180, push=4, batch=32)
    figures = rivals.run_rival(name, workload)
    assert figures.sums == rivals.expected_sums(workload) and figures.sums.rollouts == 180
    assert figures.seconds > 0 and figures.cpu_s > 0
    assert not multiprocessing.active_children()
    assert bool(memories) == (name == "shared-memory ring") and not any(path.exists() for path in memories)


def test_one_changed_token_is_no_figure(rivals, bad_rivals, monkeypatch):
    monkeypatch.setitem(rivals.RIVALS, "tearing", bad_rivals.Tearing)
    with pytest.raises(rivals.RivalError, match="expected the sums sent"):
        rivals.run_rival("tearing", rivals.Workload(rollouts=64, batch=16))


def test_a_producer_that_dies_ends_the_run_and_leaves_nothing(rivals, bad_rivals, memories, monkeypatch):
    """At once: the consumer alone would wait for WAIT_S, and gives exit code 1."""
    monkeypatch.setitem(rivals.RIVALS, "dying", bad_rivals.Dying)
    with pytest.raises(rivals.RivalError, match=r"producer \d ended with exit code 3"):
        rivals.run_rival("dying", rivals.Workload(rollouts=64, batch=16))
    assert not multiprocessing.active_children() and memories and not memories[0].exists()


def test_a_rival_without_its_package_is_listed_not_run(rivals, monkeypatch):
    monkeypatch.setattr(rivals.Reverb, "package", "no_such_package_anywhere")
    assert rivals.choose(["memcpy", "reverb"], with_ray=False) == (["memcpy"], ["reverb"])
    assert not any("ray objects" in names for names in rivals.choose([], with_ray=False))
    with pytest.raises(ValueError, match="no rival carrier pigeon"):
        rivals.choose(["carrier pigeon"], with_ray=False)
