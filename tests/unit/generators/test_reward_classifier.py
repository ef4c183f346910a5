"""A reward model's numbers against a plain forward pass of transformers, and the folders that are none."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from asyncrl.generators.config import RewardModelConfig
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.reward_classifier import Classifier, Unreadable
from tests.tiny import ALPHABET, EOS, write_classifier, write_model

PLAIN = RewardModelConfig(device="cpu", dtype="float32", chat_template=False)
TALK = "{% for m in messages %}{{ m.role[0] }}={{ m.content }};{% endfor %}"
TEXTS = [("1+2=", "3"), ("abc", "def" * 30), ("x", ""), ("12", "3;"), ("hello ", "world" * 7)]


def payload(question):
    return json.dumps({"question": question, "answer": "?"})


def plain(folder, text):
    """One text by itself, as anybody would."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        return model(**ids).logits[0, 0].item()


@pytest.mark.parametrize("pad", ["own", "eos", None])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_batch_of_mixed_lengths_gives_what_each_text_gives_alone(tmp_path, family, pad):
    """Also where padding and the end of a text are one token, and where the model has no padding token."""
    folder = str(write_classifier(tmp_path, family=family, pad=pad))
    classifier = Classifier(folder, PLAIN)
    texts = [*TEXTS, ("1", f"2{EOS}")]
    expected = [plain(folder, question + answer) for question, answer in texts]
    tokens = [classifier.tokens(payload(question), answer) for question, answer in texts]
    assert classifier.score(tokens) == pytest.approx(expected, abs=1e-5)
    assert classifier.score(tokens[:1]) == pytest.approx(expected[:1], abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # numbers that differ, so that a mix-up would show


def test_without_a_token_to_pad_with_each_text_is_read_alone(tmp_path):
    folder = str(write_classifier(tmp_path, pad=None))
    classifier = Classifier(folder, PLAIN)
    every = list(range(len(ALPHABET) + 1))
    together = classifier.score([every, every[:7]])
    assert together == pytest.approx([*classifier.score([every]), *classifier.score([every[:7]])], abs=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert together[1] == pytest.approx(model(torch.tensor([every[:7]])).logits.item(), abs=1e-5)


def test_question_and_answer_are_a_talk_in_the_model_s_own_template(tmp_path):
    folder = write_classifier(tmp_path, template=TALK)
    talk = RewardModelConfig(device="cpu", dtype="float32")
    classifier = Classifier(str(folder), talk)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(classifier.tokens(payload("1+2="), "3")) == "u=1+2=;a=3;"
    asked = [{"role": "system", "content": "short"}, {"role": "user", "content": "1"}]
    assert tokenizer.decode(classifier.tokens(payload(asked), "2")) == "s=short;u=1;a=2;"
    with pytest.raises(Unreadable, match=r"list of messages: set serving.chat_template = true"):
        Classifier(str(folder), PLAIN).tokens(payload(asked), "2")


@pytest.mark.parametrize("answer", ["", "1" * 1100])
def test_a_text_that_the_model_cannot_read_is_refused_and_never_cut(tmp_path, answer):
    classifier = Classifier(str(write_classifier(tmp_path)), PLAIN)
    with pytest.raises(Unreadable, match=r"question and answer are \d+ tokens, the model reads 1 to 1024"):
        classifier.tokens(payload(""), answer)


def refused(folder, config=PLAIN):
    with pytest.raises(FunctionError) as error:
        Classifier(str(folder), config)
    return str(error.value)


def test_folders_that_are_no_reward_models_say_why(tmp_path, monkeypatch):
    assert "is no folder here" in refused(tmp_path / "nowhere")
    assert "has 3 labels, and a reward is one number" in refused(write_classifier(tmp_path / "3", labels=3))
    assert "lacks weights (score.weight)" in refused(write_model(tmp_path / "lm", tied=True))
    sound = write_classifier(tmp_path / "sound")
    assert "has no chat template" in refused(sound, RewardModelConfig(device="cpu", dtype="float32"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this process sees no GPU" in refused(sound, RewardModelConfig(device="cuda"))
