"""`asyncrl inspect` as it is typed: overview, one rollout, one group, SQL, what is said when something is wrong; and
the document that shows how to read the data without it."""

import io
import itertools
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pytest
from rich.console import Console

from asyncrl.buffer.log import LAYOUTS
from asyncrl.buffer.reading import read_log, rollouts_table
from asyncrl.runtime import inspect_facts
from asyncrl.runtime.cli import main
from asyncrl.runtime.inspect import Request, inspect_run, json_line
from asyncrl.runtime.inspect_text import Decoder, one_line, printable
from asyncrl.runtime.run_folder import RunFolder
from tests.rollout_logs import LogWriter
from tests.tiny import ALPHABET, EOS, character_tokenizer

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def ids(text):
    """One token a character; `$` is the end of the answer."""
    return [len(ALPHABET) if c == "$" else ALPHABET.index(c) for c in text]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, model):
    """runs/sums, with two shards; two versions in rollout 4, rollout 6 failed and 7 on its way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "runs" / "sums"
    log = LogWriter(folder / "rollouts", 0)
    (folder / "recipe.json").write_text(json.dumps({"model": {"path": str(model)}, "run": {"name": "sums"}}))
    log.state(0, "PUBLISHED", group_id=0)
    log.admit(2, [2, 4], tokens=ids("1+2="), question="1+2=")
    log.live(2, ids("3$"), 1.0, group_id=2, step=1)
    log.state(4, "LEASED", group_id=2, lease_id=8, engine_id="a-0")
    log.segment(4, 0, ids("1+2"), version=0, lease_id=8, logprob=-0.25)
    log.state(4, "QUEUED", group_id=2, reason="engine lost")
    log.state(4, "LEASED", group_id=2, lease_id=9, engine_id="b-1", version=1)
    log.segment(4, 3, ids("=4$"), version=1, lease_id=9, finish="stop", logprob=-0.75)
    log.state(4, "COMPLETE", group_id=2, lease_id=9, engine_id="b-1", version=1, reason="stop")
    log.state(4, "SCORED", group_id=2, lease_id=9, engine_id="b-1", version=1, reward=0.0)
    other = LogWriter(folder / "rollouts", 1)
    other.admit(3, [5, 6, 7], tokens=ids("2+2="), question="2+2=")
    other.state(5, "DROPPED", group_id=3, reason="over_stale")
    other.state(6, "FAILED", group_id=3, reason="reward sums raised ValueError")
    other.state(7, "LEASED", group_id=3, lease_id=11, engine_id="b-1")
    other.segment(7, 0, ids("4"), lease_id=11)
    return folder, log


def asked(capsys, *arguments):
    """(exit code, stdout, stderr) of `asyncrl inspect ARGUMENTS`."""
    capsys.readouterr()
    code = main(["inspect", *arguments])
    return code, *capsys.readouterr()


def lines_of(text):
    """With one space between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_overview(run, capsys):
    code, out, errors = asked(capsys, "sums")
    assert code == 0 and errors == ""
    lines = lines_of(out)
    assert "version 1" in lines and "rollouts 5 in 2 groups, 2 shards" in lines
    assert "states leased 1, scored 1, trained 1, dropped 1, failed 1" in lines
    assert "dropped 1 (over_stale 1)" in lines
    assert "failed 1 (reward sums raised ValueError 1)" in lines
    assert "answer tokens mean 4.0, median 4, p95 6, longest 6" in lines
    assert f"0 1 1.000 2.0 {'█' * 20}" in lines and "1 1 0.000 6.0" in lines
    assert "4 scored 0.000 6 0x3 1x3 1+2= 1+2=4" in lines
    assert "2 trained 1.000 2 0x2 1+2= 3" in lines


def test_the_overview_as_json_and_with_a_limit(run, capsys):
    code, out, _ = asked(capsys, "sums", "--json", "--limit", "1")
    found = json.loads(out)
    assert code == 0 and found["states"] == {
        "LEASED": 1,
        "SCORED": 1,
        "TRAINED": 1,
        "DROPPED": 1,
        "FAILED": 1,
    }
    assert [r["rollout_id"] for r in found["newest"]] == [4]
    assert found["newest"][0]["answer"] == "1+2=4" and found["by_version"][0]["reward_mean"] == 1.0


def test_one_life(run, capsys):
    code, out, errors = asked(capsys, "sums", "--rollout", "4")
    assert code == 0 and errors == ""
    lines = lines_of(out)
    assert "rollout 4 of group 2" in lines and "state scored" in lines
    after = [line.split(maxsplit=2)[2] for line in lines if re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert after == [
        "+0.000 s queued 0 - - -",
        "+7.000 s leased 0 8 a-0 -",
        "+9.000 s queued 0 - - - engine lost",
        "+10.000 s leased 1 9 b-1 -",
        "+12.000 s complete 1 9 b-1 - stop",
        "+13.000 s scored 1 9 b-1 0",
    ]
    assert "0 0 3 -0.2500" in lines and "1 3 3 -0.7500" in lines
    assert f"[0]1+2[1]=4{EOS}" in out and "1+2=" in out.splitlines()


def test_one_life_as_json(run, capsys):
    _, out, _ = asked(capsys, "sums", "--rollout", "4", "--json")
    found = json.loads(out)
    assert found["pieces"] == ["1+2", f"=4{EOS}"] and found["tokens"] == ids("1+2=4$")
    assert found["versions"] == [0, 0, 0, 1, 1, 1] and found["rollout"]["engines"] == ["a-0", "b-1"]
    assert [c["state"] for c in found["changes"]][-1] == "SCORED"
    assert [s["logprob_mean"] for s in found["rollout"]["spans"]] == [-0.25, -0.75]


def test_tokens_of_the_environment_are_told_apart(run, capsys):
    _, log = run
    log.admit(9, [9], tokens=ids("1+2="), question="1+2=")
    log.state(9, "LEASED", group_id=9, lease_id=20, engine_id="a-0")
    log.segment(9, 0, ids("1+2$"), version=1, lease_id=20)
    log.segment(9, 4, ids("=3"), version=-1, lease_id=20, logprob=0.0)
    log.segment(9, 6, ids("3$"), version=1, lease_id=20, finish="stop")
    shown = asked(capsys, "sums", "--rollout", "9")[1]
    assert "8 tokens (2 of the environment), finish reason stop" in shown
    assert "env 4 2 -" in lines_of(shown)
    assert "[1]1+2" in shown and "[env]=3[1]3" in shown
    spans = json.loads(asked(capsys, "sums", "--rollout", "9", "--json")[1])["rollout"]["spans"]
    assert [(s["origin"], s["version"], s["tokens"]) for s in spans] == [
        ("model", 1, 4),
        ("environment", -1, 2),
        ("model", 1, 2),
    ]
    query = (
        "select origin, sum(len(tokens)) as n from segments where rollout_id = 9 group by origin order by n"
    )
    assert asked(capsys, "sums", "--sql", query)[1] == "origin\tn\nenvironment\t2\nmodel\t6\n"
    query = "select environment_tokens, first_version, last_version from rollouts where rollout_id = 9"
    assert asked(capsys, "sums", "--sql", query)[1].splitlines()[1] == "2\t1\t1"


def test_one_group(run, capsys):
    code, out, _ = asked(capsys, "sums", "--group", "2")
    lines = lines_of(out)
    assert code == 0 and "reward mean 0.500, standard deviation 0.500" in lines
    assert "prompt 1+2=" in lines and "4 scored 0.000 6 0x3 1x3 1+2=4" in lines
    found = json.loads(asked(capsys, "sums", "--group", "3", "--json")[1])
    assert [r["rollout_id"] for r in found["rollouts"]] == [5, 6, 7] and found["reward_mean"] is None


def test_a_baseline_is_marked_and_its_reward_is_not_in_the_mean(run, capsys):
    _, log = run
    log.admit(9, [20, 21], greedy_id=20, tokens=ids("1+3="), question="1+3=")
    for rollout_id, reward, cost in ((20, 0.0, 0.0), (21, 1.0, 0.25)):
        about = {"group_id": 9, "lease_id": rollout_id, "engine_id": "a-0"}
        log.state(rollout_id, "LEASED", **about)
        log.segment(rollout_id, 0, ids("4$"), finish="stop", lease_id=rollout_id)
        log.state(rollout_id, "COMPLETE", reason="stop", **about)
        log.state(rollout_id, "SCORED", reward=reward, cost=cost, **about)
    lines = lines_of(asked(capsys, "sums", "--group", "9")[1])
    assert "reward mean 1.000, standard deviation 0.000" in lines
    assert "20 scored 0.000 greedy 2 0x2 4" in lines and "21 scored 1.000 cost 0.250 2 0x2 4" in lines
    lines = lines_of(asked(capsys, "sums", "--rollout", "20")[1])
    assert "rollout 20 of group 9, its greedy baseline" in lines
    assert "reward 1 cost 0.25" in lines_of(asked(capsys, "sums", "--rollout", "21")[1])
    whole = json.loads(asked(capsys, "sums", "--json")[1])
    assert (
        sum(stretch["rollouts"] for stretch in whole["by_version"]) == 3
    )  # of the four that are scored, not the baseline


def test_sql_over_the_four_tables(run, capsys):
    query = "select rollout_id, prompt, answer, reward from rollouts where reward is not null order by all"
    code, out, errors = asked(capsys, "sums", "--sql", query)
    assert code == 0 and errors == ""
    assert out.splitlines() == [
        "rollout_id\tprompt\tanswer\treward",
        "2\t1+2=\t3\t1.0",
        "4\t1+2=\t1+2=4\t0.0",
    ]
    query = (
        "select (select count(*) from states where state = 'PUBLISHED') as published, "
        "(select sum(len(tokens)) from segments) as tokens, (select max(prompt) from prompts) as prompt"
    )
    assert json.loads(asked(capsys, "sums", "--sql", query, "--json")[1]) == {
        "published": 1,
        "tokens": 9,
        "prompt": "2+2=",
    }
    query = "select payload->>'$.answer' as a, to_timestamp(0) at time zone 'utc' as t from prompts limit 1"
    assert json.loads(asked(capsys, "sums", "--sql", query, "--json")[1]) == {
        "a": "2",
        "t": "1970-01-01T00:00:00",
    }


def test_a_limit_of_rows_is_told_of(run, capsys):
    code, out, errors = asked(capsys, "sums", "--sql", "from states order by shard, seq", "--limit", "2")
    assert code == 0 and len(out.splitlines()) == 3 and "first 2 rows" in errors
    code, out, errors = asked(capsys, "sums", "--sql", "select 1 as one", "--limit", "1")
    assert out == "one\n1\n" and errors == ""


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("selct 1", "Parser Error: syntax error"),
        ("select rewrd from rollouts", 'Referenced column "rewrd" not found'),
        ("select * from log", "Table with name log does not exist"),  # nor is it a variable of the program
        ("select error('no luck')", "no luck"),
        ("select * from 'nothing.parquet'", "No files found"),
        ("", "the query is empty"),
    ],
)
def test_a_query_that_fails_is_one_line(run, capsys, query, message):
    code, out, errors = asked(capsys, "sums", "--sql", query)
    assert code == 2 and out == ""
    assert message in errors and errors.count("\n") == 1 and "LINE" not in errors


def test_nothing_else_comes_out_of_a_process_whose_query_fails(run):
    command = [
        sys.executable,
        "-m",
        "asyncrl.runtime.cli",
        "inspect",
        "sums",
        "--sql",
        "select answer_text(1)",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Binder Error") and done.stderr.count("\n") == 1


def test_a_missing_tokenizer_leaves_the_text_out_and_says_so(run, capsys):
    folder, _ = run
    (folder / "recipe.json").write_text(json.dumps({"model": {"path": str(folder / "gone")}}))
    code, out, errors = asked(capsys, "sums", "--sql", "select prompt, answer, tokens_count from rollouts")
    assert code == 0 and out.splitlines()[1] == "\t\t2"
    assert errors.count("\n") == 1 and "no tokenizer in" in errors and "gone" in errors
    code, out, errors = asked(capsys, "sums", "--rollout", "2")
    assert code == 0 and "[0]3 40" in out and "no text is shown" in errors
    assert asked(capsys, "sums")[0] == 0
    # What asks for no text says nothing of it.
    assert asked(capsys, "sums", "--sql", "select 1")[2] == ""
    (folder / "recipe.json").unlink()
    code, _, errors = asked(capsys, "sums", "--group", "2")
    assert code == 0 and "recipe.json, which names the tokenizer" in errors


def test_a_tokenizer_is_not_looked_for_on_the_network(run, capsys, monkeypatch, model):
    folder, _ = run
    (folder / "recipe.json").write_text(json.dumps({"model": {"path": "nobody/no-such-model"}}))
    looked: list[str] = []

    def refuse(host, *_, **__):
        looked.append(host)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    code, _, errors = asked(capsys, "sums")
    assert code == 0 and "nor such a model in this machine's hub cache" in errors
    (folder / "recipe.json").write_text(json.dumps({"model": {"path": str(model)}}))
    assert asked(capsys, "sums")[::2] == (0, "")
    assert looked == []


def test_a_model_of_the_hub_is_read_from_its_cache(run, capsys, monkeypatch, model, tmp_path):
    folder, _ = run
    kept = tmp_path / "hub" / "models--nobody--sums"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots").mkdir()
    (kept / "snapshots" / ("0" * 40)).symlink_to(model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (folder / "recipe.json").write_text(json.dumps({"model": {"path": "nobody/sums"}}))
    query = "select answer from rollouts where rollout_id = 2"
    assert asked(capsys, "sums", "--sql", query) == (0, "answer\n3\n", "")


def test_a_model_beside_the_run_is_found_from_elsewhere(run, capsys, monkeypatch, model, tmp_path):
    folder, _ = run
    (tmp_path / "models").symlink_to(model)
    (folder / "recipe.json").write_text(json.dumps({"model": {"path": "models"}, "run": {"folder": "runs"}}))
    monkeypatch.chdir("/")
    query = "select answer from rollouts where rollout_id = 2"
    assert asked(capsys, str(folder), "--sql", query) == (0, "answer\n3\n", "")


def test_what_is_no_run_is_told_in_one_line(run, capsys, tmp_path):
    folder, _ = run
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "new" / "rollouts").mkdir(parents=True)
    LogWriter(tmp_path / "runs" / "started" / "rollouts")
    for name, message in (
        ("sum", "did you mean sums?"),
        ("zzz", "runs that are here: empty, new, started, sums"),
        ("empty", "is no run folder"),
        ("new", "holds no rollouts"),
        ("started", "has no rollouts yet"),
    ):
        code, out, errors = asked(capsys, name)
        assert code == 2 and out == "" and errors.count("\n") == 1 and message in errors, name
    assert asked(capsys, "sums", "--rollout", "77")[2] == "no rollout 77; the log has rollouts 2 to 7\n"
    assert asked(capsys, "sums", "--group", "0")[2] == "no group 0; the log has groups 2 to 3\n"
    assert asked(capsys, str(folder))[0] == asked(capsys, "runs/sums")[0] == 0


@pytest.mark.parametrize("wrong", [["--limit", "0"], ["--rollout", "4", "--group", "2"], ["--rollout", "x"]])
def test_options_that_cannot_be(run, capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "sums", *wrong])
    assert ended.value.code == 2


def test_it_follows_a_run_that_goes_on(run, capsys):
    """The files are open, the last message of each is torn at some byte; nothing of that may show."""
    log = run[1]
    for name in LAYOUTS:
        whole = len(log.path(name).read_bytes())
        log.segment(4, 6, ids("1")) if name == "segments" else None
        log.state(4, "BATCHED", group_id=2, batch_id=2) if name == "states" else None
        log.admit(8, [8]) if name == "prompts" else None
        data = log.path(name).read_bytes()
        log.path(name).write_bytes(data[: (whole + len(data)) // 2])
    code, out, errors = asked(capsys, "sums", "--rollout", "4", "--json")
    assert code == 0 and errors == "" and json.loads(out)["tokens"] == ids("1+2=4$")
    code, out, errors = asked(capsys, "sums")
    assert code == 0 and errors == ""


def test_what_a_model_wrote_is_not_obeyed_by_the_terminal(run):
    run[1].admit(9, [9], question="\x1b[2Jgone")
    screen, errors = io.StringIO(), io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120, legacy_windows=False)
    request = Request(run="sums", sql="select '\x1b[31mred' as x, payload from prompts order by group_id")
    assert inspect_run(request, terminal, Console(file=errors)) == 0
    assert "\x1b[31mred" not in screen.getvalue() and "\\x1b[31mred" in screen.getvalue()
    assert inspect_run(Request(run="sums", rollout=9), terminal, Console(file=errors)) == 0
    assert "\x1b[2J" not in screen.getvalue()
    assert printable("a\x07\x9bb\n\tc") == "a\\x07\\x9bb\n\tc" and one_line("a\n\tb") == "a\\n\\tb"


@pytest.mark.parametrize(("width", "lines"), [(120, 3), (60, 3), (40, 10)])
def test_a_terminal_shows_every_column_of_a_query(run, width, lines):
    """Cut to fit, and where that is not enough one row below the other."""
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=width, legacy_windows=False, no_color=True)
    query = "select rollout_id as number, state, repeat(answer, 20) as answer, engines from rollouts order by 1 limit 2"
    query = f"select * exclude engines, 7 as last from ({query})"
    assert inspect_run(Request(run="sums", sql=query), terminal, Console(file=io.StringIO())) == 0
    shown = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()]
    assert len(shown) == lines
    assert all(name in "".join(shown) for name in ("number", "state", "answer", "last", "TRAINED", "SCORED"))
    assert "".join(shown).count("7") == 2 and max(map(len, shown)) <= width


def test_a_character_between_two_spans_belongs_to_the_later_one():
    class Bytes:
        """A byte-level tokenizer: a token is a byte."""

        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode(errors="replace")

    decoder = Decoder(RunFolder(Path("nowhere")))
    decoder._tokenizer = Bytes()
    tokens = list("aé€z".encode())
    for first in range(len(tokens)):
        for second in range(first, len(tokens)):
            pieces = decoder.pieces(tokens, [first, second, len(tokens)])
            assert "".join(pieces) == "aé€z" and "\ufffd" not in "".join(pieces)
    assert decoder.pieces(tokens, [2, len(tokens)]) == ["a", "é€z"]


def test_spans_and_stretches():
    spans = inspect_facts.spans([3, 3, 4, 3], [-1.0, -2.0, -3.0, -4.0])
    assert [(s.version, s.start, s.tokens, s.logprob_mean) for s in spans] == [
        (3, 0, 2, -1.5),
        (4, 2, 1, -3.0),
        (3, 3, 1, -4.0),
    ]
    assert inspect_facts.spans([], []) == []


def test_a_long_run_is_told_in_few_stretches(tmp_path):
    log = LogWriter(tmp_path)
    for i in range(1, 101):
        log.admit(i, [i])
        log.live(i, [1] * i, i / 100, group_id=i, version=i + 4)
    facts = inspect_facts.overview("x", read_log(tmp_path), Decoder(RunFolder(tmp_path)), 3)
    stretches = facts.by_version
    assert len(stretches) <= inspect_facts.MOST_STRETCHES
    assert (stretches[0].first_version, stretches[-1].last_version) == (5, 104)
    assert all(a.last_version + 1 == b.first_version for a, b in itertools.pairwise(stretches))
    assert sum(s.rollouts for s in stretches) == 100
    assert stretches[0].reward_mean == pytest.approx(0.05) and stretches[0].tokens_mean == pytest.approx(5.0)
    assert facts.lengths.median == 50.5 and facts.lengths.longest == 100
    assert [r.rollout_id for r in facts.newest] == [100, 99, 98]


def test_rows_as_json():
    assert json_line(["a", "a", "b"], [1, 2, float("nan")]) == '{"a": 1, "a_2": 2, "b": null}'
    values = pa.array([{"x": [1.5, None]}]).to_pylist()
    assert json_line(["s"], values) == '{"s": {"x": [1.5, null]}}'


# ---- docs/data.md ----------------------------------------------------------------------------------------------------


def snippets():
    return re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)


@pytest.fixture
def quickstart(run):
    folder, log = run
    log.segment(4, 6, ids("1"))
    path = log.path("states")
    log.state(4, "BATCHED", group_id=2, batch_id=2)
    path.write_bytes(path.read_bytes()[:-5])  # torn, as in a run that goes on
    folder.rename(folder.with_name("quickstart"))


def test_the_snippet_with_pyarrow_runs(quickstart, capsys):
    names = {}
    exec(snippets()[0], names)
    states = read_log(Path("runs/quickstart/rollouts")).states.drop_columns("shard")
    assert names["states"].equals(states)
    assert "'PUBLISHED'" in capsys.readouterr().out


def test_the_snippet_with_duckdb_runs(quickstart, capsys):
    exec(snippets()[1], {})
    assert capsys.readouterr().out == "[('sums#2', '1+2=', 1.0, 2)]\n"
    assert Path("rollouts.parquet").stat().st_size > 0
    assert len(snippets()) == 2


def test_the_document_names_every_column(run):
    text = DOCUMENT.read_text()
    folder, _ = run
    tables = {name: layout.names[2:] for name, layout in LAYOUTS.items()}
    tables["rollouts"] = rollouts_table(read_log(folder / "rollouts")).column_names
    for name, columns in tables.items():
        part = text.partition(f"\n**{name}**")[2].partition("\n\n**")[0].partition("\n## ")[0]
        cells = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
        assert re.findall(r"`(\w+)`", "".join(cells)) == list(columns), name
