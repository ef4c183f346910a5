"""The environment's side of a rollout, with real worker processes: replies, ends, and everything that can go wrong."""

import asyncio
import json
import textwrap
import time

import msgspec
import psutil
import pytest

from asyncrl.buffer.schema import ENVIRONMENT
from asyncrl.generators.config import EnvironmentConfig
from asyncrl.generators.environment import Transcript, checked, single_turn
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.tokens import TokenizerError, load_tokenizer, single_tokens, stop_token_ids
from asyncrl.generators.turns import (
    EnvironmentFailed,
    Turns,
    check_environment,
    fits,
    has_turns,
    open_turns,
    turns_taken,
)
from asyncrl.learner.tiny_model import character_tokenizer

FACTORIES = '''
    """Environments of the tests. Each does what the first token of the model's last turn says."""
    import os, time

    def obedient(tokenizer, settings):
        seen = []

        def reply(transcript):
            seen.append(transcript)  # kept on purpose: no reply depends on it
            said = transcript.last_turn[0]
            if said == 0:
                return None
            if said == 1:
                return [*transcript.last_turn, transcript.payload["give"], transcript.replies, settings["extra"]]
            if said == 2:
                raise LookupError("no such thing")
            if said == 3:
                time.sleep(600)
            if said == 4:
                os._exit(7)
            if said == 5:
                return [bytearray(2**24) for _ in range(1000)]
            return [os.getpid() % 10, 0] if said == 6 else {7: [], 8: ["a"], 9: 5, 10: [99], 11: "12"}[said]

        return reply

    def heavy(tokenizer, settings):
        import sys
        assert "torch" not in sys.modules  # a tokenizer needs none
        import torch  # but whoever wants it has it
        return lambda transcript: [torch.tensor(3)]

    def broken(tokenizer, settings):
        raise RuntimeError("made of glass")

    def nothing(tokenizer, settings):
        return 7
'''
PAYLOAD = json.dumps({"prompt_id": "tests#1", "question": "?", "answer": "16", "give": 12})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tokenizer of 16 ids: digits, `+` to `;`, pad and eos."""
    folder = tmp_path_factory.mktemp("model")
    character_tokenizer("0123456789+-=;").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factories")
    (folder / "environments_of_tests.py").write_text(textwrap.dedent(FACTORIES))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def config(function="environments_of_tests:obedient", **settings):
    return EnvironmentConfig(
        **{
            "function": function,
            "settings": {"extra": 3},
            "timeout_s": 1.0,
            "memory_bytes": 2**28,
            **settings,
        }
    )


@pytest.fixture(scope="module")
def turns(model, path):
    """(ask, turns): one environment for the whole file; a worker takes seconds to load a tokenizer."""
    with asyncio.Runner() as runner:
        turns = Turns(config(max_turns=3), model)

        def ask(*said, before=(), versions=()):
            answer = [*before, *said]
            origin = [*versions, *[0] * len(said)]
            return runner.run(turns.next_turn([1, 2], answer, origin, PAYLOAD))

        yield ask, turns
        runner.run(turns.close())
    assert not [c for c in psutil.Process().children() if "worker_process" in " ".join(c.cmdline())]


def test_a_reply_is_what_the_environment_made_of_the_transcript(turns):
    ask, _ = turns
    assert ask(1, 5, 15) == [1, 5, 15, 12, 0, 3]
    assert ask(0, 15) is None


def test_the_same_question_has_the_same_answer_wherever_it_is_asked_again(turns):
    ask, _ = turns
    first = ask(1, 15, before=[4, 15, 7], versions=[2, 2, ENVIRONMENT])
    assert first == ask(1, 15, before=[4, 15, 7], versions=[3, 3, ENVIRONMENT]) == [1, 15, 12, 1, 3]


def test_after_the_last_turn_nobody_is_asked(turns):
    ask, _ = turns
    two = {"before": [4, 15, 7, 4, 15, 7], "versions": [0, 0, ENVIRONMENT, 1, 1, ENVIRONMENT]}
    assert ask(1, 15, **two) is None
    assert ask(2, 15, **two) is None  # it would raise
    assert ask(1, 15, before=[4, 15, 7], versions=[0, 0, ENVIRONMENT]) is not None


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (2, "LookupError: no such thing"),
        (7, "no tokens"),
        (8, "expected token ids"),
        (9, "expected token ids"),
        (10, "token 99; the tokenizer knows 0 to 15"),
        (11, "expected token ids"),
    ],
)
def test_what_is_no_reply_fails_the_rollout_and_keeps_the_worker(turns, said, cause):
    ask, turns = turns
    before = turns.pids()
    with pytest.raises(EnvironmentFailed) as failed:
        ask(said, 15)
    for word in ("environments_of_tests:obedient", "'tests#1'", cause):
        assert word in failed.value.reason
    assert turns.pids() == before and ask(0, 15) is None


def test_a_hang_a_death_and_a_want_of_memory_cost_their_rollout_alone(turns):
    ask, turns = turns
    for said, cause in ((3, "timeout_s = 1"), (4, "exit code 7"), (5, "out of memory")):
        begun, before = time.monotonic(), turns.pids()
        with pytest.raises(EnvironmentFailed) as failed:
            ask(said, 15)
        assert cause in failed.value.reason and time.monotonic() - begun < 20
        assert ask(1, 15) == [1, 15, 12, 0, 3] and turns.pids() != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"function": "calculate"}, "expected single_turn, calculator, or package.module:function"),
        ({"function": "environments_of_tests:absent"}, "absent"),
        ({"function": "environments_of_tests:broken"}, "RuntimeError: made of glass"),
        ({"function": "environments_of_tests:nothing"}, "returned 7, expected a function"),
        ({"stop_tokens": ["<eos>", "1+2"]}, "stop token '1.2' is 3 tokens"),
        ({"function": "calculator", "settings": {}}, r"sft\.alphabet"),
    ],
)
def test_an_environment_that_cannot_be_is_found_before_the_run(model, path, changes, words):
    with pytest.raises(FunctionError, match=words):
        check_environment(config(**changes), model)


def test_a_worker_loads_torch_for_those_alone_who_want_it(model, path):
    check_environment(config("environments_of_tests:heavy"), model)


def test_a_single_turn_starts_no_worker():
    for one_turn in (None, EnvironmentConfig(), EnvironmentConfig(stop_tokens=[";"])):
        assert not has_turns(one_turn) and open_turns(one_turn, "no such model") is None
    assert has_turns(config())
    assert single_turn(None, {})(Transcript([1], [2], [True], {})) is None
    with pytest.raises(FunctionError, match="no settings"):
        single_turn(None, {"a": 1})


def test_turns_and_replies_are_counted_by_origin():
    sampled = [True, True, False, False, True, False, True]
    assert turns_taken(sampled) == 3 and turns_taken(sampled[:-1]) == 2 and turns_taken([]) == 0
    transcript = Transcript([9], [1, 2, 3, 4, 5, 6, 7], sampled, {})
    assert (transcript.last_turn, transcript.replies) == ([7], 2)
    assert Transcript([9], [1, 2], [True, True], {}).last_turn == [1, 2]
    assert Transcript([9], [1, 2], [False, True], {}).replies == 1  # a reply need not come after the model


def test_a_reply_needs_room_for_one_more_token_of_the_model():
    assert fits([1, 2], 3) and not fits([1, 2], 2) and not fits([1], 0)


def test_numbers_of_any_library_are_tokens():
    numpy = pytest.importorskip("numpy")
    assert checked(numpy.array([1, 2], numpy.int32), 16) == [1, 2]
    assert msgspec.json.encode(checked((numpy.int64(3),), 16)) == b"[3]"


def test_further_stop_tokens_are_one_token_each(model):
    tokenizer = load_tokenizer(model)
    assert single_tokens(tokenizer, [";", "<pad>"]) == [13, 14]
    assert stop_token_ids(tokenizer, model) == (15,)
    assert stop_token_ids(tokenizer, model, [";", "<eos>"]) == (13, 15)
    for text, count in (("=;", 2), ("", 0), ("x", 0)):
        with pytest.raises(TokenizerError, match=f"stop token '{text}' is {count} tokens"):
            single_tokens(tokenizer, [text])
