"""What the buffer's tests under fire need: a batch's whole way with tokens that tell whose they are, raw sockets, a
proxy that loses answers, shards as processes that can be killed, and a folder on a small disk."""

import asyncio
import contextlib
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import zmq

from asyncrl.buffer import (
    BlockingBufferClient,
    BufferAddress,
    BufferClient,
    BufferConfig,
    Segment,
    StalenessConfig,
    process,
    wire,
)
from asyncrl.buffer.columns import slices
from asyncrl.buffer.keys import make_keys, secure_client
from asyncrl.buffer.reading import read_log, rollouts_table
from tests.buffers import admit_all

ROOT = Path(__file__).resolve().parents[1]

# ---- answers that tell whose they are ----------------------------------------------------------------------------------


def tokens_of(rollout_id, count, first=0, attempt=0):
    """No two rollouts or attempts share a token, and each token tells its place."""
    return np.arange(first, first + count, dtype=np.int32) + np.int32(
        (rollout_id * 7 + attempt) % 20_000 * 100_000
    )


def logprobs_of(rollout_id, count, first=0):
    """Eighths, which float32 holds exactly."""
    return -(np.arange(first, first + count, dtype=np.float32) % 64 + rollout_id % 5) / 8


def part(rollout_id, lease_id, start, count, version=0, finish_reason="", attempt=0):
    return Segment(
        rollout_id=rollout_id,
        lease_id=lease_id,
        start=start,
        version=version,
        tokens=tokens_of(rollout_id, count, start, attempt),
        logprobs=logprobs_of(rollout_id, count, start),
        finish_reason=finish_reason,
    )


def reward_of(rollout_id):
    return float(rollout_id % 3)


async def generate(client, *, tokens=4, version=0, engine="e", wait_s=2.0):
    """Leases whatever is queued, finishes it from its prefix on and scores it; returns the rollouts' ids."""
    done, leases = [], await client.lease(engine, 1000, wait_s)
    while leases:
        for lease in leases:
            have = len(lease.tokens) // 4
            last = part(lease.rollout_id, lease.lease_id, have, max(0, tokens - have), version, "stop")
            assert await client.append(engine, [last]) == []
            await score(client, lease)
            done.append(lease.rollout_id)
        leases = await client.lease(engine, 1000, 0.0)
    return done


async def score(client, lease):
    scored = wire.Scored(lease.rollout_id, lease.lease_id, reward_of(lease.rollout_id))
    assert await client.score([scored]) == []


def check_rows(rows, tokens=None):
    """Each rollout of a batch has its own tokens and logprobs, all of them, in order."""
    columns = zip(
        rows["rollout_id"].to_pylist(),
        rows["reward"].to_pylist(),
        slices(rows["tokens"]),
        slices(rows["logprobs"]),
        strict=True,
    )
    for rollout_id, reward, answer, logprobs in columns:
        assert tokens is None or len(answer) == tokens
        assert np.array_equal(answer, tokens_of(rollout_id, len(answer)))
        assert np.array_equal(logprobs, logprobs_of(rollout_id, len(answer)))
        assert reward == reward_of(rollout_id)


def goes_round(buffer, *, tokens=4, engine="lives"):
    """The service lives: whatever is queued or can be admitted becomes batches, which are read, checked and committed."""
    status = buffer.client.status()

    async def fill():
        async with BufferClient(buffer.address) as client:
            await admit_all(client, 1000)
            return await generate(client, tokens=tokens, version=status.version, engine=engine, wait_s=0.1)

    asyncio.run(fill())
    found = buffer.client.read_batch(10.0)
    assert found is not None, buffer.client.status()
    selection, rows = found
    check_rows(rows, tokens)
    counts = buffer.client.commit(selection.batch_ids, status.version + 1)
    assert counts.holds and counts.trained == status.counts.trained + rows.num_rows
    return rows


def accounts(status):
    """What must not change where nothing happened, nor by a restart. (Waiting times grow all the time.)"""
    return msgspec.structs.replace(status, waits_s={}, recovery=None, rotations=0, longest_rotation_s=0.0)


# ---- below the client ----------------------------------------------------------------------------------------------------


class RawClient:
    """A DEALER with the run's keys (or with what else `secure` does) that sends any frames."""

    def __init__(self, endpoint, keys, secure=secure_client):
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.IDENTITY, b"r" + secrets.token_bytes(15))
        if secure is not None:
            secure(self._socket, keys)
        self._socket.connect(endpoint)
        self._next = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self._socket.close()

    def send(self, *frames):
        """Raises zmq.Again where there is nobody to send to any more."""
        self._socket.send_multipart(frames, zmq.NOBLOCK)

    def send_request(self, request, body=None, request_id=None):
        if request_id is None:
            self._next += 1
            request_id = self._next.to_bytes(8, "big")
        self.send(request_id, wire.encode(request), *([] if body is None else [body]))
        return request_id

    def receive(self, timeout_s=5.0):
        """Frames of the next answer; None when none comes."""
        if not self._socket.poll(int(1000 * timeout_s)):
            return None
        return self._socket.recv_multipart()

    def ask(self, request, body=None, request_id=None):
        sent = self.send_request(request, body, request_id)
        frames = self.receive()
        assert frames is not None and frames[0] == sent, frames
        return wire.decode_reply(frames[1])


class LosingProxy:
    """TCP in front of one shard. After `lose()` the next bytes from the shard are thrown away with their connection."""

    def __init__(self, endpoint):
        host, port = endpoint.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._losing = threading.Event()
        self.lost = 0
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self):
        self._losing.set()

    def close(self):
        self._listener.close()
        for side in self._open:
            _hang_up(side)

    def _accept(self):
        """Waits for connections; ends when the listener is closed."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            shard = socket.create_connection(self._target)
            self._open += [client, shard]
            for source, sink, answers in ((client, shard, False), (shard, client, True)):
                threading.Thread(target=self._pump, args=(source, sink, answers), daemon=True).start()

    def _pump(self, source, sink, answers):
        """Waits for bytes of one side; ends when either side hangs up, or when an answer is lost."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers and self._losing.is_set():
                    self._losing.clear()
                    self.lost += 1
                    break
                sink.sendall(data)
        _hang_up(source)
        _hang_up(sink)


def _hang_up(side):
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
    side.close()


# ---- shards as processes ---------------------------------------------------------------------------------------------------


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class ProcessBuffer:
    """A buffer whose shards are processes (`asyncrl.buffer.process`), on ports that stay theirs."""

    def __init__(
        self, folder, *, prompts_per_step=2, rollouts_per_prompt=2, bound=1, log_folder=None, **config
    ):
        self.folder = Path(folder)
        self.log_folder = Path(log_folder or self.folder / "rollouts")
        self.config = BufferConfig(**config)
        staleness = StalenessConfig(max_staleness_versions=bound)
        _, self.client_keys = make_keys(self.folder / "keys")
        self.ports = [free_port() for _ in range(self.config.shards)]
        self.processes = [None] * self.config.shards
        self.address = BufferAddress(
            endpoints=tuple(f"tcp://127.0.0.1:{port}" for port in self.ports), keys=self.client_keys
        )
        self._files = process.describe(
            self.folder,
            self.config,
            staleness,
            prompts_per_step,
            rollouts_per_prompt,
            log_folder=self.log_folder,
            ports=self.ports,
        )
        for shard in range(self.config.shards):
            self.start(shard)
        self.client = BlockingBufferClient(self.address)

    def start(self, shard=0):
        self.processes[shard] = process.start(self._files[shard])

    def kill(self, shard=0):
        """SIGKILL; returns when the process is gone. It must have lived until now."""
        killed = self.processes[shard]
        assert killed.poll() is None, f"shard {shard} ended by itself ({killed.returncode}):\n{self.said()}"
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)

    def said(self, last_bytes=3000):
        return "\n".join(files.said.read_text()[-last_bytes:] for files in self._files)

    def stop(self):
        """In order, so that the log is whole; the processes end by themselves, with 0."""
        counts = self.client.stop()
        for ended in self.processes:
            assert ended.wait(10) == 0, self.said()
        return counts

    def close(self):
        self.client.close()
        for left in self.processes:
            if left.poll() is None:
                left.kill()
                left.wait(10)


@contextlib.contextmanager
def process_buffer(folder, **settings):
    buffer = ProcessBuffer(folder, **settings)
    try:
        yield buffer
    finally:
        buffer.close()


def until(true, timeout_s, what):
    """Waits for `true()`; fails past the deadline."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)
    return found


# ---- what the log says -----------------------------------------------------------------------------------------------------


def logged_rollouts(log_folder):
    """rollout_id -> its row in `rollouts_table`, tokens and all."""
    log = read_log(log_folder)
    assert not log.notes, log.notes
    return {row["rollout_id"]: row for row in rollouts_table(log).to_pylist()}


def check_order(log_folder):
    """`seq` numbers the rows of a shard's files without a gap, and every state follows from the one before it."""
    follows = {
        "QUEUED": {"QUEUED", "LEASED", "COMPLETE", None},
        "LEASED": {"QUEUED"},
        "COMPLETE": {"LEASED"},
        "SCORED": {"COMPLETE"},
        "BATCHED": {"SCORED"},
        "TRAINED": {"BATCHED"},
        "DROPPED": {"QUEUED", "LEASED", "COMPLETE", "SCORED"},
        "FAILED": {"LEASED", "COMPLETE"},
    }
    log = read_log(log_folder)
    assert not log.notes, log.notes
    numbers = {}
    for table in (log.prompts, log.segments, log.states):
        for shard, seq in zip(table["shard"].to_pylist(), table["seq"].to_pylist(), strict=True):
            numbers.setdefault(shard, []).append(seq)
    for shard, found in numbers.items():
        assert sorted(found) == list(range(len(found))), f"shard {shard}"
    last = {}
    for row in log.states.sort_by([("shard", "ascending"), ("seq", "ascending")]).to_pylist():
        if row["rollout_id"]:
            before = last.get(row["rollout_id"])
            assert before in follows[row["state"]], (before, row)
            last[row["rollout_id"]] = row["state"]
    return log


# ---- a small disk ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder, nbytes):
    """A tmpfs of so many bytes at `folder`. Yields None, and a reason in place of it where nobody may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    if mount is None:
        yield "there is no `mount` here"
        return
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        yield f"no tmpfs can be mounted: {done.stderr.strip()}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)
