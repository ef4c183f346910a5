"""The run's CURVE keys: which sockets may talk to the buffer, and that nobody reads or changes what they say.

One pair of keys is the buffer's, one is shared by all of the run's clients. Who can read the files is of the run; they
are readable by their owner alone from their first byte on, so the run's user is what is authenticated.

Invariants
----------
- Keys appear both at once or not at all, and are never replaced: whoever comes second reads the first one's.
- A file that another user owns or can read is not used.
- No secret is in a `repr`, and so in no log, error or debugger's output that shows one.
- Closed by default: a secured server without its `Authenticator` admits nobody (libzmq's own default is everybody).

Called by the launcher (`make_keys`), the buffer's process and its clients.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from asyncrl.buffer.errors import BufferFault

SERVER_FILE: Final = "buffer.key"
CLIENT_FILE: Final = "client.key"
_DOMAIN: Final = "asyncrl"
_MOST_BYTES: Final = 4096
_CLOSE_S: Final = 10.0
_Key = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-zA-Z.:+=^!/*?&<>()\[\]{}@%$#-]{40}\Z")]
"""32 bytes as Z85 text."""


class KeysRefused(BufferFault):
    """The run's keys are missing or not fit for use; the message says how to repair that."""


class _Keys(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    public: _Key
    secret: _Key

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(n, "..." if n == "secret" else getattr(self, n)) for n in self.__struct_fields__]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={value!r}' for n, value in self.__rich_repr__())})"


class ServerKeys(_Keys, frozen=True, forbid_unknown_fields=True):
    """What the buffer's process holds."""

    client_public: _Key


class ClientKeys(_Keys, frozen=True, forbid_unknown_fields=True):
    """What every client of the run holds."""

    server_public: _Key


_K = TypeVar("_K", ServerKeys, ClientKeys)


def make_keys(folder: Path) -> tuple[ServerKeys, ClientKeys]:
    """The keys in `folder`, which are made, with the folder, where there are none yet. Raises KeysRefused."""
    if not _any_key(folder):
        _place(folder, *_new_pairs())
    server, client = read_server_keys(folder), read_client_keys(folder)
    if (server.public, server.client_public) != (client.server_public, client.public):
        raise KeysRefused(
            f"{folder / SERVER_FILE} and {folder / CLIENT_FILE} are not of one making: expected each to name the "
            f"other's public key; {_remake(folder)}"
        )
    return server, client


def read_server_keys(folder: Path) -> ServerKeys:
    """Raises KeysRefused."""
    return _read(folder / SERVER_FILE, ServerKeys)


def read_client_keys(folder: Path) -> ClientKeys:
    """Raises KeysRefused."""
    return read_client_file(folder / CLIENT_FILE)


def read_client_file(path: Path) -> ClientKeys:
    """A run's client keys under any name: the one file is all that a client elsewhere needs. Raises KeysRefused."""
    return _read(path, ClientKeys)


def _any_key(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (SERVER_FILE, CLIENT_FILE))


def _new_pairs() -> tuple[ServerKeys, ClientKeys]:
    (server_public, server_secret), (client_public, client_secret) = (
        [key.decode("ascii") for key in zmq.curve_keypair()] for _ in range(2)
    )
    return (
        ServerKeys(server_public, server_secret, client_public),
        ClientKeys(client_public, client_secret, server_public),
    )


def _place(folder: Path, server: ServerKeys, client: ClientKeys) -> None:
    """Both files and their folder appear in one step; if another process was first, its keys stay."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))  # mode 0700
    try:
        _write(draft / SERVER_FILE, server)
        _write(draft / CLIENT_FILE, client)
        # Takes the place of nothing or of an empty folder, never of one with files in it.
        draft.rename(folder)
    except OSError as error:
        if not _any_key(folder):
            raise KeysRefused(
                f"no keys can be made at {folder} ({error.strerror}): expected a folder that is new or empty, in a "
                "place that can be written to; give the keys a folder of their own"
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(path: Path, keys: ServerKeys | ClientKeys) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(keys)))
        file.flush()
        os.fsync(descriptor)


def _read(path: Path, kind: type[_K]) -> _K:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise KeysRefused(
            f"{path} cannot be read ({error.strerror}): expected a key file of this run, which its launcher makes; "
            f"check the run's folder and the user; {_remake(path.parent)}"
        ) from error
    try:
        _check_access(path, os.fstat(descriptor))
        text = os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)
    try:
        keys = msgspec.json.decode(text, type=kind)
        if zmq.curve_public(keys.secret.encode("ascii")).decode("ascii") != keys.public:
            raise ValueError("its public key is not that of its secret key")
    except (ValueError, zmq.ZMQError) as error:  # msgspec's errors are ValueErrors, and show no values
        raise KeysRefused(f"{path} holds no whole {kind.__name__}: {error}; {_remake(path.parent)}") from None
    return keys


def _check_access(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeysRefused(
            f"{path} is no regular file ({stat.filemode(status.st_mode)}); {_remake(path.parent)}"
        )
    if status.st_uid != os.geteuid():
        raise KeysRefused(
            f"{path} belongs to user {status.st_uid}, expected {os.geteuid()}, who runs this process: all parts of a "
            f"run belong to the user who started it; if that is you, {_remake(path.parent)}"
        )
    if status.st_mode & 0o077:
        raise KeysRefused(
            f"{path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}, expected 0600): if nobody can have "
            f"read it, `chmod 600 {path}`; otherwise {_remake(path.parent)}"
        )


def _remake(folder: Path) -> str:
    return f"to get new keys, stop the run, remove {SERVER_FILE} and {CLIENT_FILE} with {folder}, and start it again"


def secure_server(socket: zmq.Socket[Any], keys: ServerKeys) -> None:
    """Call before `bind`. Admits nobody unless the socket's context has an `Authenticator`."""
    socket.curve_server = True
    socket.curve_publickey = keys.public.encode("ascii")
    socket.curve_secretkey = keys.secret.encode("ascii")
    socket.zap_domain = _DOMAIN.encode("ascii")
    # Without this, libzmq admits every CURVE client when no authenticator runs.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def secure_client(socket: zmq.Socket[Any], keys: ClientKeys) -> None:
    """Call before `connect`. With keys of another run the socket gets no error and no answer: libzmq reports a refusal
    to monitors only. A server that is not up yet, or has no authenticator yet, is tried again on and on."""
    socket.curve_publickey = keys.public.encode("ascii")
    socket.curve_secretkey = keys.secret.encode("ascii")
    socket.curve_serverkey = keys.server_public.encode("ascii")


class _Admission:
    """Asked by pyzmq, in its thread, about the client key of each new connection."""

    def __init__(self, client_public: str) -> None:
        self._client_public = client_public.encode("ascii")

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._client_public


class Authenticator:
    """Admits the holders of the run's client key to the secured servers of one context, in a thread of its own.

    Start it before the servers bind and close it after them; there can be one per context.
    """

    def __init__(self, context: zmq.Context[Any], keys: ServerKeys) -> None:
        self._zap = ThreadAuthenticator(context)
        self._zap.configure_curve_callback(_DOMAIN, _Admission(keys.client_public))
        self._zap.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the thread; connections that were admitted stay. Twice is harmless."""
        # Not the library's own stop(): it sends to, and joins, its thread without a deadline, and sending waits for
        # ever once that thread has ended.
        thread, pipe = self._zap.thread, self._zap.pipe
        if pipe is not None:
            with contextlib.suppress(zmq.Again):  # it has ended already
                pipe.send(b"TERMINATE", zmq.NOBLOCK)
            thread.join(_CLOSE_S)
            if thread.is_alive():
                raise BufferFault(
                    f"the authenticator's thread did not end within {_CLOSE_S:.0f} s; end the process, it cannot be "
                    "used again in this one"
                )
            pipe.close()
            self._zap.pipe = None  # type: ignore[assignment]
        self._zap.stop()
