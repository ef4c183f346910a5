"""The rules of the house, held by parsing the code: direction of imports, who may import what, sizes, packaging."""

import ast
import functools
import importlib.util
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("buffer", "generators", "learner", "recipes", "runtime", "weight_sync")
MAY_IMPORT = {
    "buffer": set(),
    "weight_sync": set(),
    "learner": {"buffer", "weight_sync"},
    "generators": {"buffer", "weight_sync"},
    "recipes": {"buffer", "weight_sync", "learner", "generators"},
    "runtime": {"buffer", "weight_sync", "learner", "generators", "recipes"},
}
VLLM_FILES = {
    "generators/vllm_core.py",
    "generators/vllm_requests.py",
    "generators/vllm_start.py",
    "generators/vllm_weights.py",
    "weight_sync/vllm_adapter.py",
    "weight_sync/vllm_fit.py",
    "weight_sync/vllm_worker.py",
}
PURE = (
    "buffer/accounts.py",
    "buffer/arrow_message.py",
    "buffer/batches.py",
    "buffer/book.py",
    "buffer/journal.py",
    "buffer/ledger.py",
    "buffer/records.py",
    "buffer/reports.py",
    "buffer/rollout_rows.py",
    "buffer/rows.py",
    "buffer/staleness.py",
    "buffer/waiting.py",
    "weight_sync/plan.py",
    "weight_sync/transaction.py",
    "weight_sync/transaction_actions.py",
    "weight_sync/rolling.py",
    "recipes/recipe.py",
    "recipes/sizes.py",
    "buffer/leasing.py",
    "generators/concurrency.py",
    "generators/in_flight.py",
    "generators/reward_batching.py",
    "generators/score.py",
    "generators/slots.py",
    "learner/division.py",
    "learner/lora_config.py",
    "learner/objective_config.py",
    "learner/faults.py",
    "learner/objective_needs.py",
    "learner/sharding_config.py",
    "generators/calculator.py",
    "recipes/gpus.py",
    "recipes/plan.py",
    "recipes/plan_facts.py",
    "recipes/plan_lengths.py",
    "recipes/plan_lora.py",
    "recipes/plan_memory.py",
    "recipes/plan_model.py",
    "recipes/plan_pacing.py",
    "recipes/plan_recipe.py",
    "recipes/plan_search.py",
    "recipes/plan_speed.py",
    "recipes/checkpoints_config.py",
    "recipes/deterministic.py",
    "recipes/resume_rules.py",
    "generators/seeds.py",
    "generators/estimates.py",
    "generators/evaluation_config.py",
    "generators/final_answers.py",
    "recipes/rft_config.py",
    "runtime/held_out_results.py",
    "runtime/rft_keep.py",
    "runtime/bottleneck.py",
    "runtime/deaths.py",
    "runtime/fleet_rules.py",
    "weight_sync/roster.py",
    "weight_sync/fit.py",
    "weight_sync/float8.py",
    "weight_sync/verification.py",
    "weight_sync/topology.py",
    "weight_sync/collective_words.py",
    "weight_sync/chunks.py",
    "weight_sync/pull.py",
    "weight_sync/credit.py",
    "weight_sync/delta.py",
    "weight_sync/ranks.py",
    "learner/shares.py",
    "learner/send_order.py",
)
IMPURE = {"torch", "zmq", "time", "socket", "asyncio", "os", "random", "ray", "vllm"}


def sources():
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]


def imports(path):
    """(dotted name, line) of each import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def test_imports_run_one_way():
    wrong = []
    for path in sources():
        folder = path.parent.name
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] in FOLDERS:
                wrong.append(f"{path}:{line}: bare import of {name}")
            if parts[0] == "asyncrl" and len(parts) > 1 and parts[1] not in MAY_IMPORT[folder] | {folder}:
                wrong.append(f"{path}:{line}: {folder} must not import {parts[1]}")
    assert not wrong, "\n".join(wrong)


def test_only_the_adapter_and_the_receiver_import_vllm():
    found = {
        f"{path.parent.name}/{path.name}"
        for path in sources()
        for name, _ in imports(path)
        if name.split(".")[0] == "vllm"
    }
    assert found == VLLM_FILES


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_touch_no_clock_socket_file_or_torch(name):
    assert not {imported.split(".")[0] for imported, _ in imports(ROOT / name)} & IMPURE


def test_the_buffer_does_not_need_torch():
    assert not any(
        name.split(".")[0] == "torch" for path in (ROOT / "buffer").glob("*.py") for name, _ in imports(path)
    )


def test_no_wait_swallows_a_cancellation():
    """`asyncio.wait_for` of Python 3.11 can return its result and forget that it was cancelled."""
    assert not [str(path) for path in sources() if "asyncio.wait_for(" in path.read_text()]


def test_files_and_functions_keep_their_size():
    wrong = []
    for path in sources():
        text = path.read_text()
        if text.count("\n") > 500:
            wrong.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                and node.end_lineno - node.lineno >= 80
            ):
                wrong.append(f"{path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
        if not ast.get_docstring(ast.parse(text)) and text.strip():
            wrong.append(f"{path}: no module docstring")
    assert not wrong, "\n".join(wrong)


def test_the_bare_folders_cannot_be_imported():
    """From the repository root `import buffer` would be a second copy of every class."""
    program = f"import importlib.util as u; print([n for n in {FOLDERS!r} if u.find_spec(n)])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert all(importlib.util.find_spec(f"asyncrl.{name}") for name in FOLDERS)


def test_pyproject_names_every_folder():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert project["packages"] == [f"asyncrl.{name}" for name in FOLDERS]
    assert project["package-dir"] == {f"asyncrl.{name}": name for name in FOLDERS}
    for name in FOLDERS:
        assert not [p for p in (ROOT / name).iterdir() if p.is_dir() and p.name != "__pycache__"], (
            "keep folders flat"
        )
        assert (ROOT / name / "py.typed").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
        check=True,
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_and_recipe(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"asyncrl/{name}/{path.name}"
        for name in FOLDERS
        for path in (ROOT / name).iterdir()
        if path.suffix in (".py", ".toml") or path.name == "py.typed"
    }
    assert expected <= names, sorted(expected - names)
    assert not any(name.startswith("asyncrl/tests") for name in names)


def test_the_wheel_works_in_a_new_environment_elsewhere(wheel, tmp_path):
    """The dependencies are this environment's (a path file lends them); asyncrl itself comes from the wheel alone."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, timeout=120, capture_output=True)
    run = functools.partial(
        subprocess.run,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin"},
    )
    where = run([python, "-P", "-c", "import asyncrl.recipes.recipe as r; print(r.__file__)"])
    assert str(site) in where.stdout
    command = tmp_path / "env" / "bin" / "asyncrl"
    assert "launch" in run([command, "--help"]).stdout
    checked = run([command, "check", "quickstart"])
    assert checked.returncode == 0, checked.stderr
    assert "rollouts per step" in checked.stdout
