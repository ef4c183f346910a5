"""Sources, the frontier's order, tokens and payloads; with real files, a real data set and a real tokenizer."""

import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.generators.config import PromptsConfig
from asyncrl.generators.evaluation_config import EvaluationConfig
from asyncrl.generators.prompts import Frontier, held_out, open_source, pairs, permuted
from asyncrl.generators.sources import SourceError, open_rows
from asyncrl.generators.tokens import (
    PromptEncoder,
    TokenizerError,
    decode_answer,
    load_tokenizer,
    stop_token_ids,
)

SAMPLE = Path(__file__).parents[2] / "data" / "gsm8k_sample.jsonl"
FIELDS = ("question", "answer")
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def make_tokenizer(folder: Path, alphabet: str, chat_template: str | None = None):
    """A character tokenizer, saved and loaded as a model folder's is."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *alphabet])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), behavior="isolated")
    core.decoder = decoders.Fuse()  # without it, decoding puts a space between characters
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("digits"), "0123456789+=;")


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    questions = [json.loads(line)["question"] for line in SAMPLE.read_text().splitlines()]
    alphabet = sorted(set("".join(questions)) | set("[]abcdefghijklmnopqrstuvwxyz"))
    return make_tokenizer(tmp_path_factory.mktemp("characters"), "".join(alphabet), CHAT)


def test_sums_prompts_have_tokens_payload_and_a_stable_id(digits):
    source = open_source(PromptsConfig(source="sums:train", seed=3), digits)
    prompt = source[17]
    payload = json.loads(prompt.payload)
    assert prompt.prompt_id == payload["prompt_id"] == "sums:train@3#17"
    assert digits.decode(prompt.tokens) == payload["question"]
    assert len(prompt.tokens) == len(payload["question"])
    assert sum(map(int, payload["question"].rstrip("=").split("+"))) == int(payload["answer"])
    assert source.size is None and source[17] == prompt


def test_task_settings_reach_the_task(digits):
    task = {"min_terms": 3, "usual_terms": 3, "max_terms": 3}
    source = open_source(PromptsConfig(source="sums:test", task=task), digits)
    assert all(len(source[i].tokens) == 6 for i in range(20))


def write_all_formats(folder: Path) -> list[str]:
    """The sample as JSONL, Parquet and two folders of `datasets`."""
    import datasets

    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    shutil.copy(SAMPLE, folder / "rows.jsonl")
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(folder / "rows")
    datasets.DatasetDict({"test": dataset}).save_to_disk(folder / "splits")
    return [
        f"{folder}/rows.jsonl",
        f"{folder}/rows.parquet",
        f"hf:{folder}/rows",
        f"hf:{folder}/splits:test",
    ]


def test_every_format_gives_the_same_rows(tmp_path):
    sources = [open_rows(source, FIELDS, {}, 0) for source in write_all_formats(tmp_path)]
    assert [rows.size for rows in sources] == [200] * 4
    for index in (0, 7, 199, 7):
        first, *others = [dict(rows.row(index)) for rows in sources]
        assert all(other == first for other in others)
    assert [rows.name for rows in sources] == ["rows.jsonl", "rows.parquet", "rows:train", "splits:test"]


def test_blank_lines_are_skipped_and_other_fields_travel(tmp_path, digits):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "1+1=", "a": 2, "level": [1]}\n\n{"q": "2+2=", "a": 4, "level": []}')
    config = PromptsConfig(source=str(path), prompt_field="q", answer_field="a")
    source = open_source(config, digits)
    assert source.size == 2
    assert json.loads(source[1].payload) == {
        "q": "2+2=",
        "a": 4,
        "level": [],
        "prompt_id": "rows.jsonl#1",
        "question": "2+2=",
        "answer": 4,
    }
    with pytest.raises(IndexError):
        source[2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b'{"question": "x", "answer": "1"}\n{"question": "x"',
            ["a.jsonl, line 2", "JSON object"],
        ),
        (
            "a.jsonl",
            b'{"question": "x", "answr": "1"}\n',
            ["line 1", "'answer'", "question, answr", "answer_field"],
        ),
        ("a.jsonl", b'{"question": null, "answer": "1"}\n', ["line 1", "'question'"]),
        ("a.jsonl", b"[1]\n", ["line 1", "JSON object"]),
        ("a.jsonl", b"\n", ["no rows"]),
        ("a.parquet", b"PAR0", ["a.parquet", "Parquet"]),
    ],
)
def test_a_broken_file_is_found_when_it_is_opened(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_rows(str(path), FIELDS, {}, 0)
    assert all(word in str(caught.value) for word in words), caught.value


def test_parquet_says_which_fields_there_are_and_counts_nulls(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"question": ["x", "y"], "gold": ["1", None]}), path)
    with pytest.raises(SourceError, match=r"'answer'.*question, gold"):
        open_rows(str(path), FIELDS, {}, 0)
    with pytest.raises(SourceError, match="1 rows have no 'gold'"):
        open_rows(str(path), ("question", "gold"), {}, 0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.jsonl", "there is no file"),
        ("sums", "is none of"),
        ("sums:dev", "train, test"),
        ("products:train", "there are: arithmetic, sums"),
        ("hf:", "hf:NAME"),
        ("hf:a:b:c:d", "hf:NAME:CONFIG:SPLIT"),
    ],
)
def test_a_source_that_is_none_names_the_way_out(source, words):
    with pytest.raises(SourceError, match=words):
        open_rows(source, FIELDS, {}, 0)


def test_a_missing_split_of_a_saved_data_set_is_an_error_with_the_source(tmp_path):
    write_all_formats(tmp_path)
    with pytest.raises(SourceError, match="splits:dev"):
        open_rows(f"hf:{tmp_path}/splits:dev", FIELDS, {}, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 700), st.text(max_size=8))
def test_permuted_is_a_permutation(size, key):
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


def test_permutations_of_different_keys_differ_and_mix():
    orders = [[permuted(i, 1000, key) for i in range(1000)] for key in ("0/0", "0/1", "1/0")]
    assert len({tuple(order) for order in orders}) == 3
    moved = sum(abs(i - j) for i, j in enumerate(orders[0])) / 1000
    assert 280 < moved < 390  # uniform: 333


def test_the_order_of_a_seed_is_stored():
    """A change of this order would make a resumed run repeat some prompts and miss others."""
    assert [permuted(i, 8792, "0/0") for i in range(5)] == STORED_ORDER


STORED_ORDER = [4771, 2459, 8113, 4381, 947]


@given(begin=st.integers(0, 300), takes=st.lists(st.integers(0, 20), max_size=4), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_a_cursor_restores_the_exact_position(characters, begin, takes, seed):
    source = open_source(PromptsConfig(source=str(SAMPLE)), characters)
    walked = Frontier(source, seed)
    walked.take(begin)
    restored = Frontier(source, seed, cursor=walked.cursor)
    for n in takes:
        assert restored.take(n) == walked.take(n)
    assert restored.cursor == walked.cursor == begin + sum(takes)


def test_an_epoch_has_every_prompt_once_and_the_next_has_another_order(characters):
    frontier = Frontier(open_source(PromptsConfig(source=str(SAMPLE)), characters), seed=5)
    first, second = ([prompt.prompt_id for prompt in frontier.take(200)] for _ in range(2))
    assert len(set(first)) == 200 and set(first) == set(second) and first != second
    with pytest.raises(ValueError, match="cursor"):
        Frontier(open_source(PromptsConfig(source=str(SAMPLE)), characters), 5, cursor=-1)


def test_held_out_takes_no_more_than_there_are_and_no_train_question(digits, characters):
    config = PromptsConfig(source="sums:train")
    train = {prompt.payload for prompt in Frontier(open_source(config, digits), 0).take(500)}
    prompts = held_out(config, EvaluationConfig(source="sums:test", prompts=50), digits)
    assert len(prompts) == 50 and not {p.payload for p in prompts} & train
    sample = EvaluationConfig(source=str(SAMPLE), prompts=256)
    assert len({p.prompt_id for p in held_out(config, sample, characters)}) == 200
    assert held_out(config, EvaluationConfig(), digits) == []


def test_plain_prompts_get_no_special_token_and_chat_prompts_the_template(characters):
    question = "How many?"
    plain = PromptEncoder(characters).encode(question)
    assert decode_answer(characters, plain) == "How many?"
    assert characters.eos_token_id not in plain
    chat = PromptEncoder(characters, chat_template=True, system="Be brief.").encode(question)
    expected = "[system]Be brief.<eos>[user]How many?<eos>[assistant]"
    assert chat == characters.encode(expected, add_special_tokens=False)
    assert chat.count(characters.eos_token_id) == 2
    messages = [{"role": "user", "content": question}]
    assert PromptEncoder(characters, True).encode(messages) == PromptEncoder(characters, True).encode(
        question
    )


def test_chat_prompts_of_the_sample(characters):
    source = open_source(PromptsConfig(source=str(SAMPLE), chat_template=True), characters)
    prompt = source[0]
    question = json.loads(SAMPLE.read_text().splitlines()[0])["question"]
    assert prompt.tokens == PromptEncoder(characters, True).encode(question)
    assert json.loads(prompt.payload)["question"] == question


def test_what_a_tokenizer_cannot_do_is_said(digits, tmp_path):
    with pytest.raises(TokenizerError, match="chat_template = false"):
        PromptEncoder(digits, chat_template=True)
    with pytest.raises(TokenizerError, match="chat_template = true"):
        PromptEncoder(digits, system="Be brief.")
    with pytest.raises(TokenizerError, match="does not know"):
        open_source(PromptsConfig(source=str(SAMPLE)), digits)
    with pytest.raises(TokenizerError, match="no tokens"):
        PromptEncoder(digits).encode("")
    with pytest.raises(TokenizerError, match="list of messages"):
        PromptEncoder(digits).encode([{"role": "user", "content": "1"}])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="no tokenizer in model"):
        load_tokenizer(str(tmp_path))


def test_stop_tokens_join_the_tokenizers_and_the_models(digits, tmp_path):
    assert stop_token_ids(digits, str(tmp_path)) == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 1]}')
    assert stop_token_ids(digits, str(tmp_path)) == (1, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert stop_token_ids(digits, str(tmp_path)) == (1, 9)


def test_pairs_imitate_the_solution_and_end(digits):
    config = PromptsConfig(source="sums:train")
    walk = pairs("sums:train", "solution", digits, config, seed=4)
    again = pairs("sums:train", "solution", digits, config, seed=4)
    for _ in range(20):
        prompt, answer, imitated = next(walk)
        assert (prompt, answer, imitated) == next(again)
        assert answer[-1] == digits.eos_token_id and imitated == [True] * len(answer)
        text = decode_answer(digits, prompt + answer)
        question, _, solution = text.partition("=")
        assert int(solution.rpartition("=")[2]) == sum(map(int, question.split("+")))
    with pytest.raises(SourceError, match=r"'proof'.*question, answer, solution"):
        pairs("sums:train", "proof", digits, config)


def test_a_demonstration_of_several_turns_is_played_with_the_environment(digits, tmp_path):
    """What the environment says is in it, and is not imitated; the environment is told of the row's own answer."""
    path = tmp_path / "turns.jsonl"
    path.write_text('{"question": "1+1=", "answer": "2", "solution": ["1+1", "2;", 2]}\n')
    config, asked = PromptsConfig(source=str(path)), []

    def reply(prompt, answer, imitated, payload):
        asked.append((list(answer), list(imitated), json.loads(payload)["answer"]))
        return [7, 8] if len(asked) % 3 else None

    semicolon, eos = digits.encode(";")[0], digits.eos_token_id
    walk = pairs(str(path), "solution", digits, config, stop_tokens=[";"], reply=reply)
    prompt, answer, imitated = next(walk)
    first, second = [*digits.encode("1+1"), eos], [*digits.encode("2"), semicolon]
    third = [*digits.encode("2"), eos]
    assert prompt == digits.encode("1+1=") and answer == [*first, 7, 8, *second, 7, 8, *third]
    assert imitated == [True] * 4 + [False] * 2 + [True] * 2 + [False] * 2 + [True] * 2
    assert [a for a, _, _ in asked] == [answer[:4], answer[:8], answer]
    assert all(flags == imitated[: len(flags)] and gold == "2" for _, flags, gold in asked)
    assert next(walk) == (prompt, answer, imitated)


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        ([None], "which ends it after turn 1, '1+1'"),
        ([[7], [7]], "which goes on after turn 2, '2'"),
        (None, "of 2 turns needs an [environment]"),
    ],
)
def test_a_demonstration_that_the_environment_does_not_go_along_with_is_refused(
    digits, tmp_path, replies, words
):
    path = tmp_path / "turns.jsonl"
    path.write_text('{"question": "1+1=", "solution": ["1+1", "2"]}\n')
    given = iter(replies or [])
    reply = None if replies is None else lambda *asked: next(given)
    walk = pairs(str(path), "solution", digits, PromptsConfig(source=str(path)), reply=reply)
    with pytest.raises(SourceError, match=re.escape(words)):
        next(walk)
