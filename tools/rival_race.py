"""One run of one rival: two producer processes, one consumer, one clock.

Invariants:
- Rollouts are made before the clock starts, and some have gone the whole way: memory is touched, connections stand.
- Every wait has a deadline. A process that fails ends the run at once, and the others with it.
Called by `buffer_rivals`; spawned children import this file by its name.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from typing import Any

import msgspec
import numpy as np
import psutil
import zmq
from rival_base import RUN_S, SPAWN, START_S, WAIT_S, Receive, Rival, read_slot, write_slot
from rival_workload import (
    PRODUCERS,
    Figures,
    Push,
    RivalError,
    Rollout,
    Sums,
    Workload,
    make_figures,
    make_rollouts,
    touch,
)


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of one worker, over its pipe."""

    role: str
    cpu_s: float
    seconds: float = 0.0
    sums: Sums = Sums()


@contextmanager
def named_timeouts(role: str) -> Iterator[None]:
    """Queues and sockets say only that they are empty or busy."""
    try:
        yield
    except (queue.Empty, queue.Full, zmq.Again) as error:
        raise TimeoutError(
            f"{role}: waited {WAIT_S:.0f} s for the other side, or rollouts were lost"
        ) from error


def get_ready(pipe: Connection, go: Event) -> None:
    """Waits for the parent, who waits until all are ready."""
    pipe.send_bytes(b"ready")
    if not go.wait(START_S):
        raise TimeoutError(f"no start from the parent within {START_S:.0f} s")


def produce(rival: Rival, producer: int, pipe: Connection, go: Event, done: Event) -> None:
    pushes = make_rollouts(rival.workload, producer)
    with named_timeouts(f"producer {producer}"), contextmanager(rival.sending)(producer) as send:
        for rollouts in warm_up(rival.workload, producer):
            send(rollouts)
        rival.finish()
        get_ready(pipe, go)
        used = time.process_time()
        for rollouts in pushes:
            send(rollouts)
        rival.finish()
        # Threads of this process may still send, and objects may still lie in its memory.
        if not done.wait(RUN_S):
            raise TimeoutError(f"producer {producer}: the consumer was not done within {RUN_S:.0f} s")
        pipe.send_bytes(msgspec.msgpack.encode(Report(f"producer {producer}", time.process_time() - used)))


def consume(rival: Rival, pipe: Connection, go: Event, done: Event) -> None:
    workload = rival.workload
    with named_timeouts("consumer"), contextmanager(rival.receiving)() as receive:
        before = [warm_up(workload, producer) for producer in range(PRODUCERS)]
        read_all(receive, workload, sum(len(push) for pushes in before for push in pushes))
        get_ready(pipe, go)
        began, used = time.monotonic(), time.process_time()
        sums = read_all(receive, workload, workload.rollouts)
        seconds, used = time.monotonic() - began, time.process_time() - used
        done.set()
        pipe.send_bytes(msgspec.msgpack.encode(Report("consumer", used, seconds, sums)))


def warm_up(workload: Workload, producer: int) -> list[list[Rollout]]:
    """Pushes that go ahead of the clock: each slot is used once, where there are so many."""
    return make_rollouts(workload, producer)[: workload.slots]


def read_all(receive: Receive, workload: Workload, rollouts: int) -> Sums:
    """Batch by batch: a batch is whole before it is touched. Ends at so many rollouts; each `receive` has a deadline."""
    sums = Sums()
    while sums.rollouts < rollouts:
        batch: list[Push] = []
        wanted = min(workload.batch, rollouts - sums.rollouts)
        while (have := sum(len(push.lengths) for push in batch)) < wanted:
            batch.append(receive(wanted - have))
        sums = functools.reduce(operator.add, map(touch, batch), sums)
    return sums


Workers = dict[Connection, SpawnProcess]


def start_workers(rival: Rival, go: Event, done: Event, resources: ExitStack) -> Workers:
    """They end with `resources`: by themselves when the run is done, at once when it is not."""

    def end(process: SpawnProcess) -> None:
        process.join(10.0 if done.is_set() else 0.0)
        process.kill()
        process.join(10.0)

    tasks: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [("consumer", consume, (rival,))]
    tasks += [(f"producer {i}", produce, (rival, i)) for i in range(PRODUCERS)]
    workers = {}
    for role, task, arguments in tasks:
        ours, theirs = SPAWN.Pipe(duplex=False)
        resources.callback(ours.close)
        process = SPAWN.Process(target=task, args=(*arguments, theirs, go, done), name=role, daemon=True)
        process.start()
        theirs.close()
        resources.callback(end, process)
        workers[ours] = process
    return workers


def gather(workers: Workers, rival: str, what: str, within_s: float) -> list[bytes]:
    """The next message of each. Ends when all have come, when a worker has ended (its pipe closes), or in time."""
    deadline = time.monotonic() + within_s
    missing = dict(workers)
    messages = []
    while missing:
        ready = wait(list(missing), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            late = ", ".join(process.name for process in missing.values())
            raise RivalError(f"{rival}: expected {what} within {within_s:.0f} s, got none from {late}")
        for pipe in (pipe for pipe in workers if pipe in ready):
            process = missing.pop(pipe)
            try:
                messages.append(pipe.recv_bytes())
            except EOFError:
                process.join(5.0)
                raise RivalError(
                    f"{rival}: expected {what}, but the {process.name} ended with exit code {process.exitcode}; its "
                    "traceback stands above"
                ) from None
    return messages


def servers_cpu_s(workers: Workers) -> float:
    """CPU seconds so far of this process and of all below it, workers left out: they count more finely themselves."""
    pids = {process.pid for process in workers.values()}
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        if child.pid not in pids:
            with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed
                times = child.cpu_times()
                total += times.user + times.system
    return total


def run_memcpy(workload: Workload) -> Figures:
    """One process copies each push into one piece of memory and out of it, and adds it up: the floor in CPU time (the
    ring has two cores)."""
    sent = [push for producer in range(PRODUCERS) for push in make_rollouts(workload, producer)]
    tokens = max(sum(len(rollout.ids) for rollout in push) for push in sent)
    area = np.zeros(1 + 2 * workload.push + 2 * tokens, np.int32)
    for rollouts in sent[: PRODUCERS * workload.slots]:
        touch(read_slot(area[: write_slot(area, rollouts)]))
    sums, began, used = Sums(), time.monotonic(), time.process_time()
    for rollouts in sent:
        sums += touch(read_slot(area[: write_slot(area, rollouts)]))
    return make_figures(
        "memcpy", workload, time.monotonic() - began, {"consumer": time.process_time() - used}, sums
    )


def run(rival: Rival) -> Figures:
    """Raises `RivalError`; whatever the rival opened is closed then too."""
    go, done = SPAWN.Event(), SPAWN.Event()
    with ExitStack() as resources:
        rival.open(resources)
        workers = start_workers(rival, go, done, resources)
        gather(workers, rival.name, "a sign of readiness", START_S)
        servers_s = servers_cpu_s(workers)
        go.set()
        messages = gather(workers, rival.name, "a report", RUN_S)
        reports = [msgspec.msgpack.decode(message, type=Report) for message in messages]
        servers_s = servers_cpu_s(workers) - servers_s
    consumer = max(reports, key=lambda report: report.seconds)
    cpu_s = {"servers": servers_s, **{report.role: report.cpu_s for report in reports}}
    return make_figures(rival.name, rival.workload, consumer.seconds, cpu_s, consumer.sums)
