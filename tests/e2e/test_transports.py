"""Whole runs whose weights travel over each transport that needs no GPU, from one learner rank and from two; engines die on the
way, and those that take their place get the weights on the same path."""

import pytest

from tests.e2e.runs import launched, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("transport", "senders"), [("shm", "all"), ("tcp", "all"), ("collective", "one"), ("collective", "all")]
)
def test_a_run_over_each_transport_with_an_engine_that_dies(tmp_path, model, transport, senders):
    changes = (
        f'weight_sync.transport="{transport}"',
        f'weight_sync.senders="{senders}"',
        "weight_sync.bucket_bytes=65536",
        "learner.ranks=2",
        "run.steps=100000",
        "evaluation.source=",
        "pools.0.fake.step_s=0.01",
    )
    with launched(tmp_path, model, *changes) as run:
        run.wait_for_step()
        run.engine("fake-1").kill()
        run.wait_for(r"^note +engine fake-1 died \(.*\); starting it again in \d s")
        run.wait_until(lambda: run.status()["snapshot"]["pools"][0]["engines_serving"] == 2)
        run.wait_until(lambda: len(digests(run)) == 2)
        assert all(got == expected != "" for got, expected in digests(run)), run.status()["snapshot"]
        version = run.status()["snapshot"]["version"]
        run.wait_until(lambda: run.status()["snapshot"]["version"] > version + 2)
        children = run.descendants()
        run.command("drain")
        assert run.end(120) == 0, run.text
        assert run.left_over(children) == []
    summary = run.summary
    assert summary["outcome"] == "drained", run.text
    assert summary["conservation"]["holds"] and summary["tokens_past_bound"] == 0


def digests(run):
    """Of the weights of each engine that runs one of the newest versions, and of that version as the learner wrote it."""
    snapshot = run.status()["snapshot"]
    written = {int(version): digest for version, digest in snapshot["weights"].items()}
    loaded = [(each["version"], each["weights"]) for each in snapshot["engines"] if each["weights"]]
    return [(digest, written[version]) for version, digest in loaded if version in written]
