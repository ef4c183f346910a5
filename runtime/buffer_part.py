"""One shard of the buffer, as a process. Made by `placement` as a Ray actor; its wire is ZMQ, Ray only starts and watches it.

Ray starts the process again when it dies, and the supervisor then calls `start` and `run` again (`buffer_watch`). The shard
goes on from its log, and binds the port that it bound the first time, so that its clients find it by sending once more.
"""

from __future__ import annotations

import threading
from pathlib import Path

from asyncrl.buffer import BufferService, base, ledger_settings
from asyncrl.buffer.keys import read_server_keys
from asyncrl.buffer.process import tune_process
from asyncrl.recipes import Recipe
from asyncrl.runtime.part_log import write_log_to
from asyncrl.runtime.run_folder import RunFolder


class BufferPart:
    """`start`, then `run`. Several threads of Ray's: one in `run`, others for short calls."""

    def __init__(self, recipe: Recipe, folder: str, host: str, shard: int) -> None:
        self._folder = RunFolder(Path(folder))
        write_log_to(self._folder.log(f"buffer-{shard}"))
        tune_process()
        self._recipe, self._host, self._shard = recipe, host, shard
        self._service: BufferService | None = None
        self._lock = threading.Lock()
        self._run_began = False

    def start(self) -> str:
        """Reads the log back and takes requests; returns the endpoint. Another call returns it again."""
        with self._lock:
            return self._opened().endpoint

    def run(self) -> None:
        """Serves until it is told to stop. A process that Ray started unasked, after `start`, opens the service here."""
        with self._lock:
            if self._run_began:
                raise RuntimeError(
                    f"buffer shard {self._shard} is served already: run is called once for each process; if Ray lost "
                    "sight of a process that lives, look at the network between the machines"
                )
            self._run_began, service = True, self._opened()
        service.run()

    def _opened(self) -> BufferService:
        if self._service is None:
            self._service = self._open()
        return self._service

    def _open(self) -> BufferService:
        recipe, path = self._recipe, self._folder.endpoint(self._shard)
        before = path.read_text() if path.is_file() else ""
        service = BufferService(
            settings=ledger_settings(
                recipe.buffer,
                recipe.staleness,
                recipe.prompts.prompts_per_step,
                recipe.prompts.rollouts_per_prompt,
                self._shard,
                greedy_baseline=recipe.greedy_baseline,
            ),
            config=recipe.buffer,
            folder=self._folder.rollouts / str(self._shard),
            keys=read_server_keys(self._folder.keys),
            host=self._host,
            port=int(before.rpartition(":")[2]) if before else 0,
        )
        if not before:
            path.parent.mkdir(exist_ok=True)
            base.write(path, service.endpoint.encode(), fsync=False)
        return service
