"""Keys of a run: who can read them, that no secret is shown, and whom a secured socket lets through."""

import asyncio
import contextlib
import itertools
import json
import os
import socket as sockets
import stat
import threading
from pathlib import Path

import msgspec
import pytest
import zmq
import zmq.asyncio
from rich.pretty import pretty_repr
from zmq.utils.monitor import recv_monitor_message

from asyncrl.buffer import keys as module
from asyncrl.buffer.errors import BufferFault
from asyncrl.buffer.keys import (
    Authenticator,
    ClientKeys,
    KeysRefused,
    ServerKeys,
    make_keys,
    read_client_keys,
    read_server_keys,
    secure_client,
    secure_server,
)

NAMES = ("buffer.key", "client.key")
READ = {"buffer.key": read_server_keys, "client.key": read_client_keys}
ANSWER_MS = 10_000
SILENCE_MS = 700


class Holder(msgspec.Struct, frozen=True):
    keys: ServerKeys | ClientKeys


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def pair():
    return [key.decode() for key in zmq.curve_keypair()]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "keys"


@pytest.fixture
def made(folder):
    return make_keys(folder)


def test_keys_are_made_once_and_read_afterwards(folder, made):
    server, client = made
    assert (server.client_public, client.server_public) == (client.public, server.public)
    assert len({server.public, server.secret, client.public, client.secret}) == 4
    assert make_keys(folder) == (read_server_keys(folder), read_client_keys(folder)) == made
    assert sorted(os.listdir(folder)) == list(NAMES) and os.listdir(folder.parent) == ["keys"]


def test_an_empty_folder_is_taken_over(folder):
    folder.mkdir(parents=True, mode=0o755)
    make_keys(folder)
    assert mode(folder) == 0o700


def test_files_are_closed_to_others_from_their_first_byte(folder, monkeypatch):
    created = []
    real = os.open

    def watched(path, flags, *args, **kwargs):
        descriptor = real(path, flags, *args, **kwargs)
        if flags & os.O_CREAT:
            created.append(
                (Path(path).name, bool(flags & os.O_EXCL), stat.S_IMODE(os.fstat(descriptor).st_mode))
            )
        return descriptor

    monkeypatch.setattr(module.os, "open", watched)
    before = os.umask(0)
    try:
        make_keys(folder)
    finally:
        os.umask(before)
    assert created == [(name, True, 0o600) for name in NAMES]
    assert mode(folder) == 0o700 and [mode(folder / name) for name in NAMES] == [0o600] * 2


def test_makers_at_the_same_time_get_the_same_keys(folder):
    barrier, results = threading.Barrier(8), []

    def make():
        barrier.wait(timeout=20)
        results.append(make_keys(folder))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(results) == 8 and all(result == results[0] for result in results)
    assert os.listdir(folder.parent) == ["keys"], "no drafts are left"


def test_a_failed_write_leaves_nothing(folder, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(KeysRefused, match="No space left on device"):
        make_keys(folder)
    assert os.listdir(folder.parent) == []


def test_a_folder_with_other_files_is_refused(folder):
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text("{}")
    with pytest.raises(KeysRefused, match="folder of their own"):
        make_keys(folder)
    assert os.listdir(folder) == ["recipe.json"] and os.listdir(folder.parent) == ["keys"]


@pytest.mark.parametrize("keys", [0, 1], ids=["server", "client"])
def test_no_text_shows_a_secret(made, keys):
    keys = made[keys]
    for holder in (keys, Holder(keys), [keys], {"keys": Holder(keys)}):
        for text in (
            repr(holder),
            str(holder),
            f"{holder}",
            f"{holder!r}",
            pretty_repr(holder),
        ):
            assert keys.secret not in text
            assert keys.public in text, "and yet it tells the keys of one run from another's"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("open_mode", [0o640, 0o604, 0o610, 0o602])
def test_a_file_open_to_others_is_refused(folder, made, name, open_mode):
    (folder / name).chmod(open_mode)
    with pytest.raises(KeysRefused, match=f"mode {open_mode:04o}, expected 0600.*chmod 600 ") as caught:
        READ[name](folder)
    assert isinstance(caught.value, BufferFault)
    with pytest.raises(KeysRefused, match="chmod 600 "):
        make_keys(folder)
    (folder / name).chmod(0o600)
    assert make_keys(folder) == made, "the message's way out works"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_another_user_is_refused(folder, made, name, monkeypatch):
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(KeysRefused, match=f"belongs to user {os.getuid()}, expected {os.getuid() + 1}"):
        READ[name](folder)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused(folder, made, name):
    (folder / name).unlink()
    for read in (READ[name], make_keys):
        with pytest.raises(KeysRefused, match=r"No such file.*to get new keys, stop the run, remove"):
            read(folder)
    assert len(os.listdir(folder)) == 1, "the other half is not replaced"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_what_is_no_file_is_refused(folder, made, kind):
    path = folder / "client.key"
    path.rename(folder / "elsewhere")
    {"link": lambda p: p.symlink_to("elsewhere"), "fifo": os.mkfifo, "folder": os.mkdir}[kind](path)
    with pytest.raises(KeysRefused):
        read_client_keys(folder)


def torn(text):
    """Shortened and falsified forms of a key file."""
    whole = json.loads(text)
    yield text[: len(text) // 2]
    yield b""
    yield b"\xff\xfe"
    yield b"[]"
    yield text + b"{}"
    for changes in (
        {"secret": "short"},
        {"secret": whole["secret"] + "\n"},
        {"secret": "é" * 40},
        {"secret": "#" * 40},
        {"secret": pair()[1]},
        {"public": pair()[0]},
        {"more": 1},
    ):
        yield json.dumps(whole | changes).encode()


@pytest.mark.parametrize("name", NAMES)
def test_a_torn_file_is_refused_and_not_shown(folder, made, name):
    path = folder / name
    whole = path.read_bytes()
    for text in torn(whole):
        path.write_bytes(text)
        with pytest.raises(KeysRefused, match=r"holds no whole.*to get new keys") as caught:
            READ[name](folder)
        assert made[0].secret not in str(caught.value) and made[1].secret not in str(caught.value)


def test_halves_of_two_makings_are_refused(tmp_path):
    for name in ("a", "b"):
        make_keys(tmp_path / name)
    (tmp_path / "b" / "client.key").replace(tmp_path / "a" / "client.key")
    with pytest.raises(KeysRefused, match="not of one making"):
        make_keys(tmp_path / "a")


class Server:
    """A secured socket and clients that try it."""

    def __init__(self, stack, keys):
        self.contexts = [stack.enter_context(zmq.Context()) for _ in range(2)]
        self.auth = stack.enter_context(Authenticator(self.contexts[0], keys))
        self.socket = self.contexts[0].socket(zmq.ROUTER)
        self.socket.linger = 0
        stack.callback(self.socket.close)
        secure_server(self.socket, keys)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    @contextlib.contextmanager
    def client(self, keys, body=b"hello"):
        client = self.contexts[1].socket(zmq.DEALER)
        client.linger = 0
        if keys is not None:
            secure_client(client, keys)
        monitor = client.get_monitor_socket()
        client.connect(f"tcp://127.0.0.1:{self.port}")
        client.send(body)
        try:
            yield client, monitor
        finally:
            client.disable_monitor()
            client.close()

    def received(self, wait_ms):
        return self.socket.recv_multipart()[1] if self.socket.poll(wait_ms) else None

    def works_for(self, keys):
        """There and back again."""
        with self.client(keys, b"ping") as (client, _):
            if not self.socket.poll(ANSWER_MS):
                return False
            sender, body = self.socket.recv_multipart()
            self.socket.send_multipart([sender, body + b" pong"])
            return bool(client.poll(ANSWER_MS)) and client.recv() == b"ping pong"


@pytest.fixture
def server(made):
    with contextlib.ExitStack() as stack:
        yield Server(stack, made[0])


def events(monitor, last, wait_ms=ANSWER_MS):
    """Names of what the client's socket went through, up to `last` or until nothing happens for the wait."""
    seen = []
    for _ in itertools.takewhile(lambda _: monitor.poll(wait_ms), range(1000)):
        seen.append(zmq.Event(recv_monitor_message(monitor)["event"]).name)
        if seen[-1] == last:
            break
    return seen


def intruder(kind, client):
    public, secret = pair()
    return {
        "no curve": None,
        "foreign client key": ClientKeys(public, secret, client.server_public),
        "wrong server key": ClientKeys(client.public, client.secret, public),
        "client key as server key": ClientKeys(client.public, client.secret, client.public),
    }[kind]


def test_the_right_key_goes_through(server, made):
    assert server.works_for(made[1])


@pytest.mark.parametrize(
    "kind", ["no curve", "foreign client key", "wrong server key", "client key as server key"]
)
def test_other_keys_get_silence_and_the_server_lives_on(server, made, kind):
    with server.client(intruder(kind, made[1])) as (client, monitor):
        seen = events(monitor, "DISCONNECTED")
        assert "DISCONNECTED" in seen and "HANDSHAKE_SUCCEEDED" not in seen, seen
        assert server.received(SILENCE_MS) is None
        assert not client.poll(0)
        assert server.works_for(made[1]), "while the intruder still tries"
    assert server.works_for(made[1])


def test_a_foreign_key_is_told_so_once(server, made):
    """libzmq ends the connection with code 400 and its client does not try again: no storm of handshakes."""
    with server.client(intruder("foreign client key", made[1])) as (_, monitor):
        assert "HANDSHAKE_FAILED_AUTH" in events(monitor, "HANDSHAKE_FAILED_AUTH")
        assert "CONNECT_RETRIED" not in events(monitor, "CONNECT_RETRIED", wait_ms=1000)


def test_without_its_authenticator_a_server_admits_nobody(server, made):
    server.auth.close()
    for keys in (made[1], intruder("foreign client key", made[1])):
        with server.client(keys):
            assert server.received(SILENCE_MS) is None


def test_a_client_that_came_before_the_authenticator_gets_through_later(server, made):
    server.auth.close()
    with server.client(made[1]):
        assert server.received(SILENCE_MS) is None
        with Authenticator(server.contexts[0], made[0]):
            assert server.received(ANSWER_MS) == b"hello"


def test_admitted_connections_outlive_the_authenticator(server, made):
    with server.client(made[1]) as (client, _):
        assert server.received(ANSWER_MS) == b"hello"
        server.auth.close()
        client.send(b"again")
        assert server.received(ANSWER_MS) == b"again"


OLD_HELLO = b"\xff" + bytes(8) + b"\x7f" + b"\x01\x05" + b"\x00\x00" + b"\x00\x05hello"
"""ZMTP 2.0, which knows no keys: greeting of a DEALER, empty identity, one message."""
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"


def shout(port, text):
    """Sends raw bytes and reads until the other side closes or says nothing more for a moment."""
    raw = sockets.create_connection(("127.0.0.1", port), timeout=SILENCE_MS / 1000)
    with raw, contextlib.suppress(OSError):
        raw.sendall(text)
        while raw.recv(4096):
            pass


@pytest.mark.parametrize(
    "text",
    [
        OLD_HELLO,
        b"\x01\x00\x06hello",
        b"GET / HTTP/1.1\r\n\r\n",
        GREETING + b"CURVE".ljust(20, b"\0") + b"\x00" + bytes(31) + b"\x04\x06\x05HELLO" + bytes(300),
        GREETING
        + b"CURVE".ljust(20, b"\0")
        + b"\x00"
        + bytes(31)
        + b"\x04\xc8\x05HELLO\x01\x00"
        + bytes(192),
        GREETING + b"NULL".ljust(20, b"\0") + b"\x00" + bytes(31) + b"\x04\x06\x05READY\x00\x05hello",
        bytes(range(256)) * 64,
    ],
    ids=["zmtp 2", "zmtp 1", "http", "bad hello", "hello of zeros", "null", "noise"],
)
def test_raw_bytes_bring_nothing_in_and_nothing_down(server, made, text):
    shout(server.port, text)
    assert server.received(SILENCE_MS // 3) is None
    assert server.works_for(made[1])


def test_the_old_protocol_would_get_through_without_keys():
    """Shows that the bytes of the test above are a message."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as plain:
        port = plain.bind_to_random_port("tcp://127.0.0.1")
        shout(port, OLD_HELLO)
        assert plain.poll(ANSWER_MS) and plain.recv_multipart()[1] == b"hello"


def authenticators():
    return [thread for thread in threading.enumerate() if type(thread).__name__ == "AuthenticationThread"]


def test_closing_ends_the_thread_and_frees_the_context(made):
    before = authenticators()
    context = zmq.Context()
    auth = Authenticator(context, made[0])
    assert len(authenticators()) == len(before) + 1
    for _ in range(2):
        auth.close()
    assert authenticators() == before
    ender = threading.Thread(target=context.term, daemon=True)
    ender.start()
    ender.join(timeout=10)
    assert not ender.is_alive(), "no socket is left open"


@pytest.mark.timeout(30)
def test_an_authenticator_whose_thread_died_can_be_closed(made):
    with zmq.Context() as context:
        auth = Authenticator(context, made[0])
        auth._zap.pipe.send(b"TERMINATE")
        auth._zap.thread.join(timeout=10)
        assert not auth._zap.pipe.poll(200), "time for libzmq to notice that the other end is gone"
        auth.close()


def test_one_context_has_one_authenticator(server, made):
    with pytest.raises(zmq.ZMQError, match="in use"):
        Authenticator(server.contexts[0], made[0])
    assert server.works_for(made[1])


def test_an_event_loop_s_context_will_do(made):
    async def talk():
        context = zmq.asyncio.Context()
        with context, Authenticator(context, made[0]), context.socket(zmq.ROUTER) as server:
            secure_server(server, made[0])
            port = server.bind_to_random_port("tcp://127.0.0.1")
            with context.socket(zmq.DEALER) as client:
                secure_client(client, made[1])
                client.connect(f"tcp://127.0.0.1:{port}")
                async with asyncio.timeout(10):
                    await client.send(b"hello")
                    return (await server.recv_multipart())[1]

    assert asyncio.run(talk()) == b"hello"
