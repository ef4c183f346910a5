"""For tests of the `tcp` transport: versions of a small model, keys, and a link that is slow, stands still or breaks."""

import asyncio
import contextlib
import itertools
import mmap
import socket
import threading
import time

import numpy as np
import zmq

from asyncrl.weight_sync.checksum import bucket_checksum
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.wire import Offer, Served


def small_plan(tensors=6, elements=5000, bucket_bytes=16 * 1024, senders=1):
    """bfloat16 tensors, cut among `senders` by rows where there are several."""
    specs = [(f"layers.{i}.weight", "bfloat16", (elements,)) for i in range(tensors)]
    cut = [elements * rank // senders for rank in range(senders + 1)]
    rows = tuple((start, end - start) for start, end in itertools.pairwise(cut))
    return make_plan(specs, bucket_bytes, shares={name: rows for name, _, _ in specs})


class Bytes:
    """One version: its bytes, as numbers and as a mapping, and its checksums."""

    def __init__(self, plan, seed=0, *, base=None, share=0.02):
        self.plan = plan
        self.map = mmap.mmap(-1, plan.total_bytes)
        rng = np.random.default_rng(seed)
        numbers = np.frombuffer(self.map, dtype=np.uint16)
        if base is not None:
            numbers[:] = np.frombuffer(base.map, dtype=np.uint16)
        for spec in plan.tensors:
            part = numbers[spec.offset // 2 : (spec.offset + spec.size) // 2]
            if base is None:
                part[:] = rng.integers(0, 65536, len(part), dtype=np.uint16)
            else:
                places = rng.random(len(part)) < share
                part[places] += rng.choice([1, 65535], places.sum()).astype(np.uint16)
        self.view = memoryview(self.map)
        self.checksums = tuple(bucket_checksum(self.map, bucket) for bucket in plan.buckets)

    def offer(self, version, endpoint):
        return Offer(
            version=version, source=Served(endpoint=endpoint), plan=self.plan, checksums=self.checksums
        )

    def open_at(self, server, version):
        server.open(version, self.view, self.plan, self.checksums)

    def is_in(self, offer):
        """Whether the file that a fetched offer names has these bytes."""
        with open(offer.source.path, "rb") as file:
            return file.read(self.plan.total_bytes) == self.map[:]


class Keys:
    """Of one run: `server` and `client` secure a socket; who has other keys is a stranger."""

    def __init__(self):
        self._server_public, self._server_secret = zmq.curve_keypair()
        self._public, self._secret = zmq.curve_keypair()

    def server(self, made):
        made.curve_server = True
        made.curve_publickey, made.curve_secretkey = self._server_public, self._server_secret

    def client(self, made):
        made.curve_serverkey = self._server_public
        made.curve_publickey, made.curve_secretkey = self._public, self._secret


class Link:
    """TCP in front of a server, whose answers it lets through at `bytes_per_s`, not at all (`stand_still`), or not to the end
    (`break_after`)."""

    def __init__(self, endpoint, bytes_per_s=None):
        host, port = endpoint.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._rate = bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._moving = threading.Event()
        self._moving.set()
        self._closed = False
        self._left = None
        self._still_after = 0
        self.breaks = 0
        self.carried = 0
        """Bytes of the server's."""
        self._open = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def break_after(self, size):
        """Hang up once, after `size` more bytes of the server's."""
        self._left = size

    def stand_still(self, after):
        """Hold back what comes of the server's after `after` bytes, until `go_on`."""
        self._still_after = self.carried + after
        self._moving.clear()

    def go_on(self):
        self._moving.set()

    def close(self):
        self._closed = True
        self._moving.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for side in self._open:
            _hang_up(side)
        self._thread.join(5)

    def _accept(self):
        """Waits for connections; ends when the listener is closed."""
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            self._open += [client, server]
            for source, sink, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pump, args=(source, sink, answers), daemon=True).start()

    def _pump(self, source, sink, answers):
        """Waits for bytes of one side; ends when either side hangs up, or when the link breaks."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if answers:
                    if self.carried + len(data) > self._still_after:
                        self._moving.wait(30)
                    if self._rate:
                        time.sleep(len(data) / self._rate)
                    if self._left is not None and len(data) >= self._left:
                        self._left = None
                        self.breaks += 1
                        break
                    if self._left is not None:
                        self._left -= len(data)
                    self.carried += len(data)
                sink.sendall(data)
        _hang_up(source)
        _hang_up(sink)


def _hang_up(side):
    with contextlib.suppress(OSError):
        side.shutdown(socket.SHUT_RDWR)
    side.close()


def fetched(puller, offer, timeout_s=20):
    return asyncio.run(puller.fetch(offer, timeout_s))
