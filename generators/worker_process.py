"""A process that runs users' code, rewards or an environment: `python -m asyncrl.generators.worker_process FD WHAT`.
Started by `worker_pool`; WHAT is for whoever looks at the list of processes.

It speaks over one inherited socket, one question and one answer at a time; standard output stays free for what users'
functions print. It imports what it is told to and nothing of the parent: no `__main__`, no vLLM, no Ray.

It ends when the socket closes, when its parent is gone, or, while a function hangs, by the kernel's alarm.
"""

from __future__ import annotations

import importlib
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Final

from asyncrl.generators.functions import FunctionError
from asyncrl.generators.worker_messages import Answer, Ask, Hello, Raised, Ready, receive, send

_PARENT_CHECK_S: Final = 5.0
_ALARM_MARGIN_S: Final = 5.0
"""The parent kills a hanging worker at its deadline; the alarm is for a worker whose parent is dead."""
_LONGEST_REASON: Final = 2000

Answerer = Callable[[bytes], bytes]


def _make(hello: Hello) -> Answerer:
    """Raises whatever the user's code raises where it is imported."""
    sys.path.extend(path for path in hello.sys_path if path not in sys.path)
    module, _, function = hello.make.partition(":")
    answerer: Answerer = getattr(importlib.import_module(module), function)(hello.setup)
    return answerer


def limit_memory(more_bytes: int) -> None:
    """Let this process map `more_bytes` more than it has mapped; 0: as much as it likes. An allocation past it fails, in
    Python with MemoryError. The soft limit alone is set, so that `lift_limit` can take it back."""
    if not more_bytes:
        return
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = mapped + more_bytes
    resource.setrlimit(
        resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )


def lift_limit() -> None:
    """So that there is memory to say what happened."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _answer(ask: Ask, answerer: Answerer, memory_bytes: int) -> Answer | Raised:
    signal.setitimer(signal.ITIMER_REAL, ask.timeout_s + _ALARM_MARGIN_S)
    try:
        return Answer(body=answerer(ask.body))
    except MemoryError:
        lift_limit()
        return Raised(
            reason=f"it ran out of memory: memory_bytes = {memory_bytes:,} on top of what loading it took",
            worn=True,
        )
    except FunctionError as error:
        return Raised(reason=str(error)[:_LONGEST_REASON])
    except Exception as error:  # noqa: BLE001 - the edge of foreign code: the parent fails the rollout with it
        return Raised(reason=_told(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _told(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {error}"[:_LONGEST_REASON]
    return f"it raised {said} ({last.filename}, line {last.lineno})"


def serve(connection: socket.socket) -> None:
    """Make the answerer, say so, and answer until the parent goes away."""
    parent = os.getppid()
    hello = receive(connection)
    assert isinstance(hello, Hello)
    try:
        answerer = _make(hello)
        limit_memory(hello.memory_bytes)
    except FunctionError as error:
        send(connection, Ready(problem=str(error)))
        return
    except Exception as error:  # of foreign code: the pool tells of it, and the traceback is printed
        send(connection, Ready(problem=f"loading it failed: {_told(error)}"))
        raise
    send(connection, Ready())
    # Waits for the next question; ends when the parent closes the socket or is gone.
    while (ask := _next_ask(connection, parent)) is not None:
        reply = _answer(ask, answerer, hello.memory_bytes)
        try:
            send(connection, reply)
        except OSError:
            return  # the parent closed the pool meanwhile
        except ValueError as error:
            send(connection, Raised(reason=f"its answer is too long: {error}"))


def _next_ask(connection: socket.socket, parent: int) -> Ask | None:
    """The next question; None where the parent is gone.

    Processes forked from the parent may hold the socket open after its death: so the parent is looked for as well.
    """
    while os.getppid() == parent:
        if select.select([connection], [], [], _PARENT_CHECK_S)[0]:
            try:
                ask = receive(connection)
            except (EOFError, OSError):
                return None
            assert isinstance(ask, Ask)
            return ask
    return None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # what a function starts must not keep the socket open
    serve(socket.socket(fileno=descriptor))


if __name__ == "__main__":
    main()
