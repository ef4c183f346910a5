"""A launch with an environment of the user's own, which fails on some prompts: the run goes on, and every token is told apart."""

import pyarrow.compute as pc
import pytest

from asyncrl.buffer.reading import read_log, rollouts_table
from tests.e2e.runs import launched, tiny_model

ENVIRONMENT = '''
def nodding(tokenizer, settings):
    """Says `;` twice, and to no prompt whose number ends in 3."""
    def environment(transcript):
        if transcript.payload["prompt_id"].endswith("3"):
            raise LookupError("three")
        return tokenizer.encode(settings["word"]) if transcript.replies < 2 else None

    return environment
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_a_run_whose_environment_speaks_and_sometimes_fails(tmp_path, model, monkeypatch):
    (tmp_path / "nodding.py").write_text(ENVIRONMENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    section = 'environment={ function = "nodding:nodding", settings = { word = ";;" } }'
    lengths = "pools.0.fake.lengths={ median_tokens = 6, sigma = 0.3 }"
    with launched(tmp_path, model, section, lengths, "evaluation.source=''", "run.steps=6") as run:
        assert run.end(240.0) == 0, run.text
        summary = run.summary
        log = read_log(run.folder / "rollouts")
    assert summary["outcome"] == "finished" and summary["steps_done"] == 6
    assert summary["conservation"]["holds"] and summary["tokens_past_bound"] == 0
    table = rollouts_table(log)
    failed = table.filter(pc.equal(table["state"], "FAILED"))
    assert failed.num_rows and all("LookupError: three" in reason for reason in failed["reason"].to_pylist())
    assert all(reason.startswith("environment: ") for reason in failed["reason"].to_pylist())
    trained = table.filter(pc.equal(table["state"], "TRAINED"))
    assert not any(name.endswith("3") for name in trained["prompt_id"].to_pylist())
    spoken = trained.filter(pc.equal(trained["finish_reason"], "stop"))
    assert spoken.num_rows and set(spoken["environment_tokens"].to_pylist()) == {4}
    sampled = pc.sum(pc.subtract(trained["tokens_count"], trained["environment_tokens"])).as_py()
    masked = summary["tokens_masked"]
    assert summary["tokens_trained"] + masked == sampled  # neither trained nor masked: the environment's
