"""A torch.distributed group beside the learner's own: one sender, rank 0, and the engines that it broadcasts to.

Members find each other through a TCPStore that the sender serves. Each says there that it is here; the sender waits until all
have, while it looks after its other affairs, and says go; only then the group is made, so that nobody waits in torch's code
for a process that is gone.

Invariants
----------
- Nothing here is registered with torch.distributed's default group, and nothing but names and addresses goes through the store.
- A broadcast of gloo cannot be called off: torch's `abort` does nothing there, and a peer's death need not show. So nobody waits
  for one in torch's code: `wait_for` looks around meanwhile, and who gives up drops the group and the buffers. They are freed in
  a thread of their own once the broadcast has run into the group's timeout, and stand in the way of nothing, the end of the
  process included.
- NCCL is aborted at once when a group is dropped. Its watchdog, which would end the process, is kept from doing so.
- What travels is neither encrypted nor authenticated, and the store is open to whoever can reach it: for networks that are the
  run's own. It listens on the given address alone.
Imports torch: used by the senders at the learner, and by engines that are offered a `wire.Group`, in threads of their own.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from asyncrl.weight_sync.errors import GroupBroken
from asyncrl.weight_sync.torch_threads import stand_still, start_thread

STORE_S: Final = 10.0
"""How long a connection to a store may take, and one of its answers."""
SHORTEST_S: Final = 1e-4
LONGEST_S: Final = 2e-3
"""Between two looks at a broadcast under way."""
_ERRORS: Final = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_environment = threading.Lock()


def backend_of(device: torch.device) -> str:
    """What carries buffers of this device."""
    return "nccl" if device.type == "cuda" else "gloo"


def serve_store(host: str) -> tuple[TCPStore, str]:
    """A store of this process, on a free port of `host` alone, and its `host:port`. Served by a thread of torch's until it is
    deleted."""
    listening = socket.create_server((host, 0), backlog=1024)
    port: int = listening.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=STORE_S),
        master_listen_fd=listening.detach(),
    )
    return store, f"{host}:{port}"


def connect_store(address: str) -> TCPStore:
    """A connection to the store at `host:port`. Blocks, up to a few times `STORE_S`. Raises `GroupBroken`."""
    host, _, port = address.rpartition(":")
    try:
        return TCPStore(
            host,
            int(port),
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=STORE_S),
        )
    except dist.DistError as error:
        raise GroupBroken(
            f"the sender's store at {address} cannot be reached: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Turns torch's errors of a store that is gone into `GroupBroken`."""
    try:
        yield
    except dist.DistError as error:
        raise GroupBroken(f"{what}: the sender's store is gone: {_first_line(error)}") from error


class PeerGroup:
    """One process's membership."""

    def __init__(
        self,
        store: Store,
        name: str,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
        address: str,
    ) -> None:
        """Blocks until every rank is connected. `timeout_s`: for that, and for each broadcast. `address`: of this host, by which
        the others reach it (gloo). Raises `GroupBroken`."""
        self._device = device
        self._works: deque[dist.Work] = deque(maxlen=2)
        """The last ones: whoever uses the group has no more under way."""
        prefixed = PrefixStore(name, store)
        make = _gloo if device.type == "cpu" else _nccl
        try:
            self._group: Any = make(
                prefixed, rank, size, device, datetime.timedelta(seconds=timeout_s), address
            )
        except RuntimeError as error:
            raise GroupBroken(
                f"group {name}, rank {rank} of {size}: not every rank connected: {_first_line(error)}"
            ) from error

    def broadcast(self, buffer: torch.Tensor) -> dist.Work:
        """Start sending (rank 0) or receiving the bytes of `buffer` (uint8, contiguous, same size on all ranks), which is left
        alone until the work is done. At most two may be under way. Raises `GroupBroken`."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        try:
            work: dist.Work = self._group.broadcast([buffer], options)
        except RuntimeError as error:
            raise GroupBroken(f"a broadcast cannot be started: {_first_line(error)}") from error
        self._works.append(work)
        return work

    def drop(self) -> None:
        """Leave, in a thread of its own, whatever is under way: returns at once. Called once."""
        group, self._group = self._group, None
        works, self._works = self._works, deque()
        start_thread(functools.partial(_free, group, works), "asyncrl-group-end")


def wait_for(work: dist.Work, look: Callable[[], None]) -> None:
    """Return when `work` is done. `look` is called again and again meanwhile; what it raises ends the wait, not the work. Raises
    `GroupBroken` if the work failed."""
    pause_s = SHORTEST_S
    # Waits for: the broadcast. Unblocked by: the other ranks, the group's timeout, or what `look` raises.
    while not work.is_completed():
        look()
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.5, LONGEST_S)
    try:
        work.wait()
    except RuntimeError as error:
        raise GroupBroken(f"a broadcast failed: {_first_line(error)}") from error


def own_address(peer: str) -> str:
    """The address of this host by which it reaches `peer` (host:port)."""
    host, _, port = peer.rpartition(":")
    family, _, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(where)
        found: str = probe.getsockname()[0]
    return found


def _gloo(
    store: Store, rank: int, size: int, device: torch.device, timeout: datetime.timedelta, address: str
) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    options._threads = 2  # one for each broadcast that may be under way
    return gloo(store, rank, size, options)


def _nccl(
    store: Store, rank: int, size: int, device: torch.device, timeout: datetime.timedelta, address: str
) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    # Far off: a broadcast that takes too long is given up here, by who waits for it, and not by the watchdog.
    options._timeout = datetime.timedelta(days=1)
    # Read when a group is made: 0 has the watchdog note an error, which the work then raises, and not end the process.
    with _environment:
        before = os.environ.get(_ERRORS)
        os.environ[_ERRORS] = "0"
        try:
            group = dist.ProcessGroupNCCL(store, rank, size, options)
        finally:
            if before is None:
                del os.environ[_ERRORS]
            else:
                os.environ[_ERRORS] = before
    # Else the first broadcast would wait for the others.
    group.eager_connect_single_device(device)
    return group


def _free(group: Any, works: Iterable[dist.Work]) -> None:
    """Waits for: broadcasts under way. Unblocked by: `abort` (NCCL), the group's timeout (gloo). Ends: then; never, if the
    process ends first."""
    group.abort()
    while not all(work.is_completed() for work in works):
        stand_still()
        time.sleep(0.05)


def _first_line(error: BaseException) -> str:
    """What torch says, without the place in its sources and its advice."""
    line = str(error).partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(" This is typically")[0]
