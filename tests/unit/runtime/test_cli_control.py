"""`asyncrl status`, `scale`, `pause`, `continue`, `drain`, `stop` as they are typed: what is said, and the exit codes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from asyncrl.runtime import status_watch
from asyncrl.runtime.cli import main
from asyncrl.runtime.control import CommandRefused
from asyncrl.runtime.control_place import read_place
from tests.control_world import ObedientRun, Serving, end, run_folder

WORLD = Path(__file__).resolve().parents[2] / "control_world.py"
ASYNCRL = [sys.executable, "-P", "-m", "asyncrl.runtime.cli"]
GENERATION = "learner waits for rollouts 41 %: generation is the bottleneck"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    return tmp_path / "runs"


@pytest.fixture
def serving(runs):
    with Serving(run_folder(runs / "sums"), ObedientRun()) as serving:
        yield serving


def asked(capsys, *arguments):
    """(exit code, stdout, stderr) of `asyncrl ARGUMENTS`; stderr is one line."""
    capsys.readouterr()
    try:
        code = main(list(arguments))
    except SystemExit as error:  # argparse's own
        code = error.code
    out, errors = capsys.readouterr()
    assert "Traceback" not in errors
    return code, out, errors


def refused(capsys, *arguments):
    code, out, errors = asked(capsys, *arguments)
    assert out == "" and errors.count("\n") == 1, errors
    return code, errors


@contextlib.contextmanager
def process(folder, seconds=60.0):
    """A run in a process of its own, once it listens."""
    command = [sys.executable, str(WORLD), str(folder.path), str(seconds)]
    with subprocess.Popen(command) as child:
        try:
            deadline = time.monotonic() + 30
            while read_place(folder.control) is None and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert read_place(folder.control).pid == child.pid
            yield child
        finally:
            child.kill()


# ---- what a run does -------------------------------------------------------------------------------------------------


def test_status_by_name_by_folder_and_from_within(serving, runs, capsys, monkeypatch):
    for name in ("sums", "runs/sums", str(runs / "sums")):
        code, out, errors = asked(capsys, "status", name)
        assert (code, errors) == (0, "") and out.startswith(GENERATION)
        assert "big-0" in out and serving.endpoint in out and " \n" not in out
    monkeypatch.chdir(runs / "sums")
    assert asked(capsys, "status", ".")[0] == 0


def test_status_as_json(serving, capsys):
    code, out, _ = asked(capsys, "status", "sums", "--json")
    (line,) = out.splitlines()
    found = json.loads(line)
    assert code == 0 and found["name"] == "sums" and found["who_waits"] == GENERATION
    assert found["snapshot"]["pools"][1] == {
        "name": "small",
        "state": "serving",
        "engines_wanted": 1,
        "engines_serving": 1,
        "concurrency": 8,
        "reason": "",
    }


@pytest.mark.parametrize(
    ("arguments", "said", "done"),
    [
        (["scale", "--concurrency", "4"], "big, small: 4 slots", ("scale", None, 4, None)),
        (
            ["scale", "--pool", "big", "--concurrency", "auto"],
            "big: auto slots",
            ("scale", "big", "auto", None),
        ),
        (["scale", "--pool", "big", "--engines", "0"], "0 engines", ("scale", "big", None, 0)),
        (
            ["scale", "--pool", "big", "--engines", "3", "--concurrency", "2"],
            "3 engines",
            ("scale", "big", 2, 3),
        ),
        (["pause"], "engines hand back what they have and hold still", ("pause",)),
        (["drain"], "the run finishes what it has", ("drain", None)),
        (["drain", "--pool", "small"], "small finishes what it has", ("drain", "small")),
        (["stop"], "the run ends in order", ("stop",)),
    ],
)
def test_a_command_is_carried_out_and_its_sentence_printed(serving, capsys, arguments, said, done):
    code, out, errors = asked(capsys, arguments[0], "sums", *arguments[1:])
    assert (code, errors) == (0, "") and said in out and out.count("\n") == 1
    assert serving.run.done == [done]


def test_continue_after_a_pause(serving, capsys):
    assert asked(capsys, "pause", "sums")[0] == 0
    assert asked(capsys, "continue", "sums")[:2] == (0, "engines take rollouts again\n")
    assert refused(capsys, "continue", "sums") == (
        1,
        "continue: the run is not paused and no pool is drained\n",
    )


def test_from_elsewhere_with_one_key_file(serving, tmp_path, capsys):
    key = tmp_path / "sums.key"
    shutil.copy(serving.folder.keys / "client.key", key)
    away = ["--address", serving.endpoint, "--key", str(key)]
    code, out, _ = asked(capsys, "status", *away)
    assert code == 0 and out.startswith(GENERATION)
    assert asked(capsys, "scale", *away, "--concurrency", "4")[0] == 0
    assert serving.run.done == [("scale", None, 4, None)]


# ---- what is written wrong: 2 ----------------------------------------------------------------------------------------


def test_a_name_that_is_no_runs(serving, runs, capsys):
    run_folder(runs / "sums-2")
    code, said = refused(capsys, "status", "sum")
    assert code == 2 and "no run sum: " in said and "did you mean sums or sums-2?" in said
    code, said = refused(capsys, "pause", "zzz")
    assert code == 2 and "runs that are here: sums, sums-2" in said
    (runs / "empty").mkdir()
    code, said = refused(capsys, "stop", "empty")
    assert code == 2 and "runs/empty is no run folder" in said


def test_a_pool_that_the_run_does_not_have(serving, capsys):
    expected = "the run has no pool 'smal'; did you mean small?\n"
    assert refused(capsys, "scale", "sums", "--pool", "smal", "--engines", "2") == (2, f"scale: {expected}")
    assert refused(capsys, "drain", "sums", "--pool", "smal") == (2, f"drain: {expected}")
    assert serving.run.done == []


def test_engines_without_a_pool_where_there_are_several(serving, capsys):
    code, said = refused(capsys, "scale", "sums", "--engines", "2")
    assert (
        code == 2 and "--engines 2 of which pool? the run has 2: give --pool with one of big, small" in said
    )


def test_engines_without_a_pool_where_there_is_one(runs, capsys):
    with Serving(run_folder(runs / "one"), ObedientRun("one", pools=("big",))):
        assert asked(capsys, "scale", "one", "--engines", "2")[:2] == (
            0,
            "big: None slots per engine, 2 engines\n",
        )


def test_a_scale_of_nothing(serving, capsys):
    code, said = refused(capsys, "scale", "sums")
    assert code == 2 and "expected --concurrency N, --concurrency auto or --engines N" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scale", "sums", "--concurrency", "0"], 'from 1 to 65536, or auto, got "0"; `pause` and `drain`'),
        (["scale", "sums", "--concurrency", "all"], 'or auto, got "all"'),
        (["scale", "sums", "--engines", "-1"], 'from 0 to 65536, got "-1"'),
        (
            ["status", "--address", "10.0.0.5:7", "--key", "k"],
            'such as tcp://10.0.0.5:61234, got "10.0.0.5:7"',
        ),
        (["status", "--address", "tcp://h:77777", "--key", "k"], 'got "tcp://h:77777"'),
        (["status", "--address", "tcp://h", "--key", "k"], 'got "tcp://h"'),
        (["status", "sums", "--pool", "big"], "unrecognized arguments: --pool big"),
        (["pause"], "expected either RUN, or --address and --key; got none of them"),
        (["pause", "sums", "--key", "k"], "or --address and --key; got RUN and --key"),
        (["pause", "--address", "tcp://h:1"], "or --address and --key; got --address"),
    ],
)
def test_options_that_do_not_fit(serving, capsys, arguments, words):
    code, out, errors = asked(capsys, *arguments)
    assert code == 2 and out == "" and words in errors
    assert serving.run.began == []


def test_a_key_that_cannot_be_used(serving, tmp_path, capsys):
    away = ["status", "--address", serving.endpoint, "--key"]
    code, said = refused(capsys, *away, str(tmp_path / "none.key"))
    assert (
        code == 2
        and "--key" in said
        and "No such file" in said
        and "copy of the run's keys/client.key" in said
    )
    key = tmp_path / "my.key"
    shutil.copy(serving.folder.keys / "buffer.key", key)
    code, said = refused(capsys, *away, str(key))
    assert code == 2 and "holds no whole ClientKeys" in said
    shutil.copy(serving.folder.keys / "client.key", key)
    key.chmod(0o644)
    code, said = refused(capsys, *away, str(key))
    assert code == 2 and "is open to others (mode 0644, expected 0600)" in said
    key.chmod(0o600)
    assert asked(capsys, *away, str(key))[0] == 0


def test_the_runs_own_key_is_gone(serving, capsys):
    (serving.folder.keys / "client.key").unlink()
    code, said = refused(capsys, "status", "sums")
    assert code == 2 and "client.key cannot be read (No such file or directory)" in said


# ---- a run that does not answer: 1 -----------------------------------------------------------------------------------


def test_the_key_of_another_run(serving, runs, capsys):
    other = run_folder(runs / "other").keys / "client.key"
    code, said = refused(capsys, "stop", "--address", serving.endpoint, "--key", str(other))
    assert code == 1 and "the key is another run's" in said and serving.run.done == []


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        ("finished", "run sums has ended: finished, 0 of 60 steps done in 0:00; `asyncrl report runs/sums`"),
        ("stopped", "run sums has ended: stopped"),
        ("failed: learner-0 ended by itself", "has ended: failed: learner-0 ended by itself, 0 of 60"),
    ],
)
def test_a_run_that_has_ended(runs, capsys, outcome, words):
    run_folder(runs / "sums", summary=outcome)
    for command in ("status", "pause"):
        code, said = refused(capsys, command, "sums")
        assert code == 1 and words in said


def test_an_ended_run_beside_one_of_its_name_that_goes_on(runs, capsys):
    run_folder(runs / "sums", summary="finished")
    with Serving(run_folder(runs / "sums-2"), ObedientRun("sums-2")):
        code, said = refused(capsys, "status", "sums")
        assert code == 1 and "of the runs beside it sums-2 can be asked" in said


def test_a_run_that_has_not_begun_to_listen(runs, capsys):
    run_folder(runs / "sums")
    code, said = refused(capsys, "status", "sums")
    assert code == 1 and "has no control socket: it is just starting, is just ending, or was killed" in said


def test_a_run_that_was_killed(runs, capsys):
    folder = run_folder(runs / "sums")
    with process(folder) as child:
        assert asked(capsys, "status", "sums")[0] == 0
        child.kill()
        child.wait(10)
    began = time.monotonic()
    code, said = refused(capsys, "status", "sums")
    assert code == 1 and time.monotonic() - began < 5
    assert "run sums does not answer" in said and "nothing listens there" in said
    assert f"its process {child.pid} is gone and did not end in order" in said
    assert "`asyncrl inspect runs/sums` shows what it had" in said


def test_a_run_that_is_stopped_by_a_debugger_or_the_like(runs, capsys, monkeypatch):
    folder = run_folder(runs / "sums")
    monkeypatch.setattr("asyncrl.runtime.control_client.ControlClient.ask.__defaults__", (0.8, 1.0))
    with process(folder) as child:
        child.send_signal(signal.SIGSTOP)
        code, said = refused(capsys, "pause", "sums")
        assert code == 1 and "no answer from" in said
        assert f"its process {child.pid} is there and may be stuck" in said


def test_a_run_of_another_machine_in_a_shared_folder(serving, capsys):
    place = read_place(serving.folder.control)
    serving.end()
    moved = msgspec.structs.replace(place, host="gpu-7")
    serving.folder.control.write_bytes(msgspec.json.encode(moved))
    code, said = refused(capsys, "status", "sums")
    assert code == 1 and "it was started on gpu-7, and this is" in said and "--address and --key" in said


def test_a_place_and_a_summary_that_cannot_be_read(runs, capsys):
    folder = run_folder(runs / "sums")
    folder.summary.write_text("{}")
    code, said = refused(capsys, "status", "sums")
    assert code == 1 and "expected a run's summary" in said
    folder.control.parent.mkdir()
    folder.control.write_text("tcp://127.0.0.1:77\n")
    code, said = refused(capsys, "status", "sums")
    assert code == 1 and "expected where a run's control socket listens" in said


def test_a_run_that_refuses(serving, capsys):
    serving.run.raises["status"] = CommandRefused("the run is starting: nothing is known yet")
    assert refused(capsys, "status", "sums") == (1, "status: the run is starting: nothing is known yet\n")


# ---- --watch ---------------------------------------------------------------------------------------------------------


def watching(folder, *options):
    command = [*ASYNCRL, "status", str(folder.path), "--watch", *options]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_watch_as_json_until_the_runs_end(runs):
    folder = run_folder(runs / "sums")
    with process(folder, 60.0) as child, watching(folder, "--json") as watch:
        lines = [watch.stdout.readline() for _ in range(2)]
        child.send_signal(signal.SIGTERM)
        rest, errors = watch.stdout.read(), watch.stderr.read()
    statuses = [json.loads(line) for line in (*lines, *rest.splitlines())]
    assert len(statuses) >= 2 and statuses[0]["snapshot"]["state"] == "running"
    assert watch.returncode == 0
    assert errors == (
        f"run sums has ended: stopped, 0 of 60 steps done in 0:00; `asyncrl report {folder.path}` shows its summary\n"
    )


def test_watch_of_a_run_that_is_killed(runs):
    folder = run_folder(runs / "sums")
    with process(folder) as child, watching(folder) as watch:
        assert watch.stdout.readline().strip() == GENERATION
        child.kill()
        child.wait(10)
        out, errors = watch.stdout.read(), watch.stderr.read()
    assert watch.returncode == 1 and "did not end in order" in errors and "big-0" in out


def test_watch_until_ctrl_c(serving):
    with watching(serving.folder) as watch:
        assert watch.stdout.readline().strip() == GENERATION
        watch.send_signal(signal.SIGINT)
        watch.stdout.read()
        errors = watch.stderr.read()
    assert watch.returncode == 130 and errors == ""


def test_watch_of_a_start_says_why_there_is_no_status_yet_and_then_shows_it(serving, capsys, monkeypatch):
    monkeypatch.setattr(status_watch, "EVERY_S", 0.05)
    serving.run.raises["status"] = CommandRefused("the run is starting")
    sleeps = []

    def sleep(seconds, real=time.sleep):
        """The run moves on while the watcher sleeps."""
        sleeps.append(seconds)
        if len(sleeps) == 3:
            serving.run.raises.clear()
        if len(sleeps) == 6:
            end(serving.folder, "failed: it broke")
            serving.end()
        real(seconds)

    monkeypatch.setattr(status_watch.time, "sleep", sleep)
    code, out, errors = asked(capsys, "status", "sums", "--watch")
    assert code == 1 and out.count(GENERATION) == 3
    assert errors.splitlines()[0] == "the run is starting" and "failed: it broke" in errors.splitlines()[1]


@pytest.mark.parametrize(
    ("state", "step", "expected"),
    [("stopping", 3, 0), ("running", 60, 0), ("running", 3, 1)],
)
def test_watch_from_elsewhere_until_the_runs_end(serving, capsys, monkeypatch, state, step, expected):
    serving.run.state, serving.run.step = state, step
    monkeypatch.setattr(status_watch, "EVERY_S", 0.05)
    monkeypatch.setattr(status_watch.time, "sleep", lambda seconds: serving.end())
    key = str(serving.folder.keys / "client.key")
    code, out, errors = asked(capsys, "status", "--watch", "--address", serving.endpoint, "--key", key)
    assert code == expected and out.count(GENERATION) == 1
    assert f"run sums {'has ended' if expected == 0 else 'was running at step 3/60 and is gone'}" in errors


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_watch_whose_reader_goes_away_ends_quietly(serving, options):
    with watching(serving.folder, *options) as watch:
        assert watch.stdout.readline()
        watch.stdout.close()
        watch.wait(timeout=20)
        errors = watch.stderr.read()
    assert "Traceback" not in errors and "Exception" not in errors


def test_a_watch_on_a_terminal_redraws_and_gives_it_back(serving):
    """On a pseudo-terminal, which is what makes it a live one."""
    import pty

    ours, theirs = pty.openpty()
    environment = os.environ | {
        "PYTHONSAFEPATH": "1",
        "TERM": "xterm-256color",
        "COLUMNS": "100",
        "LINES": "40",
    }
    command = [*ASYNCRL, "status", str(serving.folder.path), "--watch"]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, text=True, env=environment
    ) as watch:
        os.close(theirs)
        seen, deadline = "", time.monotonic() + 20
        while seen.count("generation is the bottleneck") < 2 and time.monotonic() < deadline:
            seen += os.read(ours, 4096).decode(errors="replace")
        watch.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal's end
            while more := os.read(ours, 4096):
                seen += more.decode(errors="replace")
        watch.wait(20)
    os.close(ours)
    assert watch.returncode == 130
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")  # the cursor is shown again
    assert "big-0" in seen and "\x1b[1A" in seen
