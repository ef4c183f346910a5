"""Which samples are kept, what they are trained with, and the run that samples them."""

import functools
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from asyncrl.generators.estimates import over_prompts
from asyncrl.recipes import dump_recipe, load_recipe, recipe_from
from asyncrl.recipes.rft_config import RFTConfig, sampling_recipe
from asyncrl.runtime import rft, rft_files
from asyncrl.runtime.facts import Evaluation
from asyncrl.runtime.metrics import MetricsLog
from asyncrl.runtime.rft_keep import Sample, kept

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
sample = functools.partial(
    Sample,
    prompt_id="p",
    prompt_tokens=[1],
    tokens=[2, 0],
    sampled=[True, True],
    reward=1.0,
    finish_reason="stop",
)
config = functools.partial(RFTConfig, out="made")


def ids(samples):
    return [s.rollout_id for s in samples]


@pytest.mark.parametrize(
    "wrong",
    [
        {"reward": 0.9},
        {"finish_reason": "length"},
        {"sampled": [False, False]},
        {"tokens": [], "sampled": []},
    ],
)
def test_what_is_not_imitated(wrong):
    assert kept([sample(rollout_id=1, **wrong)], config()) == []


def test_one_of_equal_answers_is_kept_and_a_limit_of_each_prompt():
    many = [sample(rollout_id=i, tokens=[2] * (1 + i % 5), sampled=[True] * (1 + i % 5)) for i in range(20)]
    other = [sample(rollout_id=30, prompt_id="q")]
    assert ids(kept(many, config(max_per_prompt=10))) == [0, 1, 2, 3, 4]
    assert ids(kept(many + other, config(max_per_prompt=2, choose="shortest"))) == [0, 1, 30]
    drawn = [ids(kept(many, config(max_per_prompt=2, seed=seed))) for seed in range(20)]
    assert all(len(found) == 2 and set(found) <= {0, 1, 2, 3, 4} for found in drawn)
    assert len(set(map(tuple, drawn))) > 4 and drawn[3] == ids(kept(many, config(max_per_prompt=2, seed=3)))


SAMPLES = st.lists(
    st.tuples(
        st.sampled_from("pq"),
        st.lists(st.integers(0, 3), min_size=1, max_size=3),
        st.sampled_from([0.0, 1.0]),
    ),
    max_size=12,
)


@given(SAMPLES, st.randoms(), st.sampled_from(["random", "shortest"]), st.integers(1, 3))
def test_the_order_of_sampling_changes_nothing(rows, chance, choose, limit):
    samples = [
        sample(rollout_id=i, prompt_id=p, tokens=tokens, sampled=[True] * len(tokens), reward=reward)
        for i, (p, tokens, reward) in enumerate(rows)
    ]
    settings = config(choose=choose, max_per_prompt=limit)
    found = kept(samples, settings)
    shuffled = list(samples)
    chance.shuffle(shuffled)
    assert kept(shuffled, settings) == found
    answers = [(s.prompt_id, tuple(s.tokens)) for s in found]
    assert len(set(answers)) == len(answers)
    for prompt in "pq":
        good = {tuple(s.tokens) for s in samples if s.prompt_id == prompt and s.reward >= 1}
        here = [tokens for p, tokens in answers if p == prompt]
        assert set(here) <= good and len(here) == min(limit, len(good))
        if choose == "shortest" and here:
            assert max(map(len, here)) <= min((len(t) for t in good - set(here)), default=99)


def test_every_pass_has_each_pair_once_in_another_order():
    samples = [sample(rollout_id=i, tokens=[i]) for i in range(9)]
    pairs = rft._pairs(samples, seed=1)
    passes = [[next(pairs)[1][0] for _ in range(9)] for _ in range(3)]
    assert all(sorted(one) == list(range(9)) for one in passes) and passes[0] != passes[1]


@pytest.mark.parametrize(
    ("changes", "pairs", "steps", "each"),
    [({}, 640, 20, 64), ({"epochs": 1}, 65, 2, 64), ({}, 10, 2, 10), ({"steps": 7}, 640, 7, 64)],
)
def test_the_training_of_a_round(changes, pairs, steps, each):
    found = config(learning_rate=3e-4, **changes).sft("a/model", pairs, 2)
    assert (found.steps, found.pairs_per_step, found.init, found.learning_rate) == (
        steps,
        each,
        "a/model",
        3e-4,
    )


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = [
        sample(rollout_id=i, tokens=[2, 3, 4], sampled=[True, False, True], reward=0.5) for i in range(3)
    ]
    rft_files.write(samples, tmp_path / "samples.parquet")
    assert rft_files.read(tmp_path / "samples.parquet") == samples
    rft_files.write([], tmp_path / "samples.parquet")
    assert rft_files.read(tmp_path / "samples.parquet") == []
    assert [path.name for path in tmp_path.iterdir()] == ["samples.parquet"]


@pytest.mark.parametrize("name", ["quickstart", "calculator", "gsm8k"])
@pytest.mark.parametrize(
    "overrides", [(), ("staleness.max_staleness_versions=3", "buffer.dynamic_sampling=true")]
)
def test_a_round_samples_all_it_wants_as_one_batch(name, overrides):
    recipe = load_recipe(
        RECIPES / f"{name}.toml", ['rft={ out = "made", prompts = 40, temperature = 0.7 }', *overrides]
    )
    derived = sampling_recipe(
        recipe, recipe.rft, folder="runs/x-rft", name="round-2", model="m", round_number=2, prompts=40
    )
    checked = recipe_from(dump_recipe(derived), "derived")
    assert checked == derived  # it breaks no rule
    assert derived.held_groups_limit == 40 and derived.rollouts_per_step == 40 * 8
    assert (derived.sampling.temperature, derived.model.path) == (0.7, "m")
    assert derived.prompts.seed == recipe.prompts.seed + 1 and derived.rft is None and derived.sft is None
    assert derived.pools == recipe.pools and derived.rewards == recipe.rewards
    assert derived.environment == recipe.environment and derived.evaluation.every_steps == 0


# ---- the rounds, with a stand-in for the sampling run and for training ----------------------------------------------


class Rounds:
    """Each sampling run leaves four samples and an accuracy; training writes a folder. `broken` is what dies at its start."""

    def __init__(self, tmp_path, monkeypatch, **changes):
        self.calls, self.broken, self.tmp_path = [], None, tmp_path
        monkeypatch.setattr(
            rft._RFT, "_start", lambda _, folder, recipe, *flags: self.start(folder, recipe, flags)
        )
        monkeypatch.setattr(rft, "imitate", self.imitate)
        monkeypatch.setattr(rft_files, "scored", lambda rollouts: self.samples)
        self.samples = [sample(rollout_id=i, tokens=[i, 0], reward=float(i > 0)) for i in range(4)]
        settings = {"out": str(tmp_path / "made"), "rounds": 2, "prompts": 8} | changes
        self.recipe = load_recipe(RECIPES / "quickstart.toml", [f"run.folder={tmp_path / 'runs'}"])
        self.recipe = msgspec.structs.replace(self.recipe, rft=RFTConfig(**settings))

    def run(self):
        return rft.run_rft(self.recipe, self.recipe.rft, "0" * 12, Console(quiet=True))

    def does(self, call):
        if self.broken == call:
            raise KeyboardInterrupt
        self.calls.append(call)

    def start(self, folder, recipe, flags):
        self.does(f"sample {folder.path.name} of {Path(recipe.model.path).name} {' '.join(flags)}".strip())
        folder.path.mkdir(parents=True, exist_ok=True)
        right = [1.0] * len(self.calls) + [0.0]
        estimate = over_prompts(right)
        with MetricsLog(folder.metrics) as log:
            log.write(evaluation(estimate))

    def imitate(self, recipe, settings, examples, out, console, name):
        self.does(f"train {name} from {Path(settings.init).name}, {settings.steps} steps")
        assert not out.exists()
        out.mkdir(parents=True)


def evaluation(estimate):
    return Evaluation(
        seconds=1.0, step=0, version=0, oldest_version=0, answers_over_versions=0, prompts=2, rollouts_per_prompt=1,
        accuracy=estimate, reward=estimate, tokens=estimate, truncated=estimate, failed=0, took_s=1.0,
    )  # fmt: skip


WHOLE = [
    "sample round-1 of quickstart-model",
    "train round 1 from quickstart-model, 2 steps",
    "sample round-2 of model",
    "train round 2 from model, 2 steps",
    "sample result of made --only-measure",
]


def test_each_round_begins_with_the_model_of_the_one_before(tmp_path, monkeypatch):
    world = Rounds(tmp_path, monkeypatch)
    summary = world.run()
    assert world.calls == WHOLE
    first, second = summary.rounds
    assert (first.samples, first.kept, first.reward_mean, first.accuracy) == (4, 3, 0.75, 0.5)
    assert second.model.endswith("round-1/model") and summary.accuracy == pytest.approx(5 / 6)
    with pytest.raises(rft.RFTError, match="is there already"):
        world.run()
    (tmp_path / "made").rmdir()
    with pytest.raises(rft.RFTError, match=r"is done, but its model .* is gone"):
        world.run()


@pytest.mark.parametrize("call", WHOLE)
def test_what_was_done_is_not_done_again(tmp_path, monkeypatch, call):
    world = Rounds(tmp_path, monkeypatch)
    world.broken = call
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.broken = None
    world.run()
    assert world.calls == WHOLE


def test_another_recipe_goes_on_nowhere_and_a_taken_place_is_refused(tmp_path, monkeypatch):
    world = Rounds(tmp_path, monkeypatch)
    world.broken = WHOLE[1]
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.recipe = msgspec.structs.replace(world.recipe, rft=RFTConfig(out=world.recipe.rft.out, rounds=3))
    with pytest.raises(rft.RFTError, match="another recipe"):
        world.run()
    (tmp_path / "taken").mkdir()
    taken = Rounds(tmp_path / "other", monkeypatch, out=str(tmp_path / "taken"))
    with pytest.raises(rft.RFTError, match="is there already"):
        taken.run()
    assert taken.calls == [] and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward": 0.5}, "the best reward is 0.5"),
        ({"finish_reason": "length"}, "4 of 4 answers score, and none"),
    ],
)
def test_nothing_to_imitate_says_why(tmp_path, monkeypatch, changes, words):
    world = Rounds(tmp_path, monkeypatch)
    world.samples = [sample(rollout_id=i, **changes) for i in range(4)]
    with pytest.raises(rft.RFTError, match=words):
        world.run()


def test_without_an_evaluation_nothing_is_measured(tmp_path, monkeypatch):
    world = Rounds(tmp_path, monkeypatch, evaluate=False)
    assert world.run().accuracy is None and world.calls == WHOLE[:-1]
