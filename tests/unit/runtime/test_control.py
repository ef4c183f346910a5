"""The control socket: commands and their answers, who is heard, what a deadline does, frames that are no request."""

import asyncio
import contextlib
import os
import random
import socket as sockets
import string
import threading
import time

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.buffer.keys import ClientKeys, make_keys, secure_client
from asyncrl.runtime import control_client, control_server
from asyncrl.runtime import control_wire as wire
from asyncrl.runtime.control import CommandRefused, WrongCommand, check_scale, pools_meant
from asyncrl.runtime.control_client import (
    ControlClient,
    ControlFault,
    KeyNotAdmitted,
    NobodyThere,
    next_line,
)
from asyncrl.runtime.control_place import read_place
from asyncrl.runtime.control_server import CannotListen, ControlServer
from tests.control_world import ObedientRun, Serving, run_folder

SEED = 20_261
POOLS = ["big", "small"]


@pytest.fixture
def folder(tmp_path):
    return run_folder(tmp_path / "sums")


@pytest.fixture
def serving(folder):
    with Serving(folder, ObedientRun()) as serving:
        yield serving


@pytest.fixture
def client(serving):
    with ControlClient(serving.endpoint, serving.keys) as client:
        yield client


def waited_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


# ---- what is meant ---------------------------------------------------------------------------------------------------


def test_a_scale_is_of_all_pools_or_of_one():
    assert check_scale(POOLS, None, 8, None) == POOLS
    assert check_scale(POOLS, "small", "auto", 3) == ["small"]
    assert check_scale(["big"], None, None, 3) == ["big"]
    assert pools_meant(POOLS, None) == POOLS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("smal", 8, None), "no pool 'smal'; did you mean small?"),
        (("gpu", 8, None), "no pool 'gpu'; it has: big, small"),
        ((None, None, None), "scale what? give --concurrency N"),
        ((None, 8, 3), "--engines 3 of which pool? the run has 2: give --pool with one of big, small"),
    ],
)
def test_a_scale_that_does_not_fit_the_run(arguments, words):
    with pytest.raises(WrongCommand, match=words.replace("?", r"\?")):
        check_scale(POOLS, *arguments)


# ---- commands and answers --------------------------------------------------------------------------------------------


def test_every_command_reaches_the_run_and_its_answer_comes_back(serving, client):
    assert client.told(wire.Scale(pool="big", concurrency=4)) == "big: 4 slots per engine, None engines"
    assert client.told(wire.Scale(concurrency="auto")) == "big, small: auto slots per engine, None engines"
    assert client.told(wire.Scale(pool="small", engines=3)) == "small: None slots per engine, 3 engines"
    assert client.told(wire.Pause()).startswith("engines hand back")
    assert client.status().snapshot.state == "paused"
    assert client.told(wire.GoOn()) == "engines take rollouts again"
    assert client.told(wire.Drain(pool="big")) == "big finishes what it has"
    assert client.told(wire.Drain()) == "the run finishes what it has"
    assert client.told(wire.Stop()) == "the run ends in order"
    assert serving.run.done == [
        ("scale", "big", 4, None),
        ("scale", None, "auto", None),
        ("scale", "small", None, 3),
        ("pause",),
        ("continue",),
        ("drain", "big"),
        ("drain", None),
        ("stop",),
    ]
    status = client.status()
    assert status == asyncio.run(serving.run.status())
    assert [p.engines_wanted for p in status.snapshot.pools] == [1, 3] and len(status.snapshot.engines) == 4


def test_a_refusal_is_told_with_its_reason_and_the_run_goes_on(serving, client):
    with pytest.raises(WrongCommand, match="no pool 'smal'; did you mean small"):
        client.ask(wire.Scale(pool="smal", concurrency=4))
    with pytest.raises(CommandRefused, match="not paused") as caught:
        client.ask(wire.GoOn())
    assert not isinstance(caught.value, WrongCommand)
    serving.run.raises["status"] = CommandRefused("the run is starting: there is no status yet")
    with pytest.raises(CommandRefused, match="starting"):
        client.status()
    assert client.told(wire.Pause())


def test_two_clients_at_once_each_get_their_own_answers(serving):
    serving.run.delays_s["scale"] = 0.002
    told = {}

    def ask(pool):
        with ControlClient(serving.endpoint, serving.keys) as client:
            told[pool] = [client.told(wire.Scale(pool=pool, concurrency=n)) for n in range(1, 101)]

    threads = [threading.Thread(target=ask, args=(pool,)) for pool in POOLS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for pool in POOLS:
        assert told[pool] == [f"{pool}: {n} slots per engine, None engines" for n in range(1, 101)]
    assert len(serving.run.done) == 200


@pytest.mark.alone
def test_changes_come_one_after_the_other_while_status_and_stop_do_not_wait(serving, client):
    serving.run.delays_s["drain"] = 1.0
    with (
        ControlClient(serving.endpoint, serving.keys) as first,
        ControlClient(serving.endpoint, serving.keys) as second,
    ):
        threads = [threading.Thread(target=first.ask, args=(wire.Drain(),))]
        threads[0].start()
        assert waited_for(lambda: serving.run.began == [("drain", None)])
        threads.append(threading.Thread(target=second.ask, args=(wire.Pause(),)))
        threads[1].start()
        began = time.monotonic()
        assert client.status().snapshot.state == "running"
        assert client.told(wire.Stop())
        assert time.monotonic() - began < 0.8
        assert serving.run.done == [("stop",)]
        for thread in threads:
            thread.join(10)
    changes = [entry for entry in serving.run.began if entry[0] != "status"]
    assert changes == [("drain", None), ("stop",), ("pause",)]
    assert serving.run.done == [("stop",), ("drain", None), ("pause",)]


# ---- deadlines and ends ----------------------------------------------------------------------------------------------


def test_a_command_without_an_end_is_cancelled_and_the_next_one_has_its_turn(serving, client, monkeypatch):
    monkeypatch.setattr(control_server, "COMMAND_S", 0.3)
    serving.run.delays_s["pause"] = 60.0
    with pytest.raises(CommandRefused, match=r"did not answer pause within 0 s; look at its status"):
        client.ask(wire.Pause())
    assert client.told(wire.Drain()) and serving.run.done == [("drain", None)]


def test_a_client_gives_up_by_name_when_its_deadline_is_over(serving, client):
    serving.run.delays_s["pause"] = 1.0
    with pytest.raises(ControlFault, match=r"took pause and did not say within 0 s .* look at its status"):
        client.ask(wire.Pause(), result_s=0.3)
    assert (
        client.told(wire.Drain(pool="big")) == "big finishes what it has"
    )  # not the late answer to the pause


def test_a_loop_that_does_not_turn_is_told_from_a_run_that_is_gone(serving, client):
    serving._loop.call_soon_threadsafe(time.sleep, 1.5)
    with pytest.raises(ControlFault, match=r"busy or stuck.*may still be carried out") as caught:
        client.ask(wire.Pause(), answer_s=0.5)
    assert not isinstance(caught.value, NobodyThere)
    assert client.told(wire.Drain())


def test_a_timeout_within_a_command_is_no_deadline_of_ours(serving, client):
    serving.run.raises["pause"] = TimeoutError("engine small-0 did not answer")
    with pytest.raises(CommandRefused, match=r"broke on pause: TimeoutError: engine small-0"):
        client.ask(wire.Pause())


def test_what_is_no_refusal_ends_the_run_and_is_told_before(serving, client):
    serving.run.raises["scale"] = RuntimeError("the fleet is inconsistent")
    with pytest.raises(
        CommandRefused, match="the run broke on scale: RuntimeError: the fleet is inconsistent"
    ):
        client.ask(wire.Scale(concurrency=3))
    assert waited_for(lambda: serving.error is not None)
    assert str(serving.error) == "the fleet is inconsistent" and not serving.folder.control.exists()


def test_an_end_in_order_tells_those_who_wait_and_takes_the_place_away(serving):
    serving.run.delays_s |= {"drain": 30.0, "stop": 30.0}
    place = read_place(serving.folder.control)
    assert place.endpoint == serving.endpoint and place.pid == os.getpid()
    assert place.host == sockets.gethostname()
    told = {}

    def ask(name, request):
        with ControlClient(serving.endpoint, serving.keys) as client:
            try:
                told[name] = client.told(request)
            except CommandRefused as refusal:
                told[name] = str(refusal)

    threads = [
        threading.Thread(target=ask, args=("drain", wire.Drain())),
        threading.Thread(target=ask, args=("stop", wire.Stop())),
    ]
    for thread in threads:
        thread.start()
    assert waited_for(lambda: len(serving.run.began) == 2)
    serving.end()
    for thread in threads:
        thread.join(10)
    assert told == {"drain": "the run ended while it had drain under way", "stop": "the run is ending"}
    assert read_place(serving.folder.control) is None and serving.error is None


def test_a_server_that_never_ran_closes_and_leaves_no_place(folder):
    server_keys, _ = make_keys(folder.keys)
    server = ControlServer(ObedientRun(), server_keys, folder.control)
    server.close()
    server.close()
    assert not folder.control.exists()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "203.0.113.7"])
def test_an_address_that_is_not_this_machines(folder, host):
    server_keys, _ = make_keys(folder.keys)
    with pytest.raises(CannotListen, match=f"run.control_host = '{host}'.*expected an IP address"):
        ControlServer(ObedientRun(), server_keys, folder.control, host=host)


def test_every_network_of_the_machine_is_reached_by_its_own_clients_on_loopback(folder):
    with (
        Serving(folder, ObedientRun(), host="0.0.0.0") as serving,
        ControlClient(serving.endpoint, serving.keys) as client,
    ):
        assert serving.endpoint.startswith("tcp://127.0.0.1:") and client.status().name == "sums"


def test_a_port_that_is_given_is_taken(folder):
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        Serving(folder, ObedientRun(), port=port) as serving,
        ControlClient(f"tcp://127.0.0.1:{port}", serving.keys) as client,
    ):
        assert serving.endpoint == client.endpoint and client.status()


# ---- who is heard ----------------------------------------------------------------------------------------------------


def other_keys(tmp_path):
    return make_keys(tmp_path / "other" / "keys")[1]


def test_the_keys_of_another_run_are_told_as_such(serving, tmp_path):
    began = time.monotonic()
    with (
        ControlClient(serving.endpoint, other_keys(tmp_path)) as stranger,
        pytest.raises(KeyNotAdmitted, match="key is another run's"),
    ):
        stranger.status()
    assert time.monotonic() - began < 5 and serving.run.began == []


def test_a_client_key_that_the_run_did_not_give_out_is_not_admitted(serving, tmp_path):
    forged = msgspec.structs.replace(other_keys(tmp_path), server_public=serving.keys.server_public)
    with (
        ControlClient(serving.endpoint, forged) as stranger,
        pytest.raises(KeyNotAdmitted, match="the key is not this run's"),
    ):
        stranger.told(wire.Stop())
    assert serving.run.began == []


def test_without_a_key_nobody_is_heard(serving, client):
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.linger = 0
    stranger.connect(serving.endpoint)
    stranger.send_multipart([bytes(8), wire.encode(wire.Stop())])
    assert not stranger.poll(700)
    context.destroy(linger=0)
    assert client.status() and serving.run.done == []


def test_nobody_at_the_address(serving, client):
    assert client.status()
    serving.end()
    began = time.monotonic()
    with pytest.raises(NobodyThere, match="nothing listens there"):
        client.status()
    with ControlClient(serving.endpoint, serving.keys) as late, pytest.raises(NobodyThere):
        late.told(wire.Pause())
    assert time.monotonic() - began < 6


def test_something_else_listens_there(folder):
    _, keys = make_keys(folder.keys)
    with sockets.create_server(("127.0.0.1", 0)) as mute:
        endpoint = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with (
            ControlClient(endpoint, keys) as client,
            pytest.raises(ControlFault, match="something listens there and says nothing"),
        ):
            client.ask(wire.Pause(), answer_s=0.8)
    context = zmq.Context()
    plain = context.socket(zmq.ROUTER)
    port = plain.bind_to_random_port("tcp://127.0.0.1")
    with (
        ControlClient(f"tcp://127.0.0.1:{port}", keys) as client,
        pytest.raises(KeyNotAdmitted, match="no run's control socket"),
    ):
        client.status()
    context.destroy(linger=0)


def test_an_endpoint_that_is_none(folder):
    _, keys = make_keys(folder.keys)
    with pytest.raises(ControlFault, match="no address that can be connected to"):
        ControlClient("tcp://", keys)


def test_a_connection_that_breaks_is_made_again(folder):
    """The run's port is served by another process for a while, as when a supervisor goes on in its folder."""
    with Serving(folder, ObedientRun()) as serving:
        port = int(serving.endpoint.rpartition(":")[2])
        with ControlClient(serving.endpoint, serving.keys) as client:
            assert client.status()
            serving.end()
            with Serving(folder, ObedientRun(), port=port):
                assert client.told(wire.Pause())


EVENTS = {
    "up": zmq.EVENT_CONNECTED,
    "secured": zmq.EVENT_HANDSHAKE_SUCCEEDED,
    "auth": zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    "no detail": zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    "protocol": zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    "down": zmq.EVENT_DISCONNECTED,
    "closed": zmq.EVENT_CLOSED,
    "again": zmq.EVENT_CONNECT_RETRIED,
    "delayed": zmq.EVENT_CONNECT_DELAYED,
}


@pytest.mark.parametrize(
    ("events", "line"),
    [
        ("", "trying"),
        ("delayed", "trying"),
        ("delayed up secured", "secured"),
        ("delayed up auth down", "key refused"),
        ("delayed up no_detail down again delayed up", "foreign"),
        ("delayed up protocol down", "foreign"),
        ("delayed closed again delayed closed", "nobody"),
        ("again again", "nobody"),
        ("delayed up down", "connected"),
        ("delayed up secured down", "lost"),
        ("delayed up secured down again", "lost"),
        ("delayed up secured down again delayed closed", "nobody"),
        ("delayed closed again delayed up secured", "secured"),
    ],
)
def test_how_the_connection_stands(events, line):
    """The sequences are those that libzmq 4.3.5 gives."""
    found = "trying"
    for name in events.split():
        found = next_line(found, EVENTS[name.replace("_", " ")])
    assert found == line


@given(st.lists(st.sampled_from([*EVENTS.values(), 1 << 20])))
def test_a_secured_connection_is_never_taken_for_none(events):
    line = "trying"
    for event in [*events, zmq.EVENT_CONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED]:
        line = next_line(line, event)
    assert line == "secured"


# ---- frames that are no request --------------------------------------------------------------------------------------


class Raw:
    """Sends any frames, with the run's keys."""

    def __init__(self, serving):
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.sndhwm = 0
        self.socket.rcvhwm = 0
        secure_client(self.socket, serving.keys)
        self.socket.connect(serving.endpoint)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.destroy(linger=0)

    def answers(self, wait_s=2.0):
        """Of each id what came, until nothing more comes for a while."""
        found = {}
        while self.socket.poll(int(1000 * wait_s)):
            request_id, header = self.socket.recv_multipart()
            found.setdefault(request_id, []).append(wire.decode_answer(header))
            wait_s = 0.4
        return found


def test_a_request_that_is_sent_again_while_it_is_under_way_is_done_once(serving):
    serving.run.delays_s["scale"] = 0.2
    with Raw(serving) as raw:
        for _ in range(5):
            raw.socket.send_multipart([bytes(8), wire.encode(wire.Scale(concurrency=3))])
        (answers,) = raw.answers().values()
    assert [type(a).__name__ for a in answers] == ["Taken"] * 5 + ["Done"]
    assert serving.run.done == [("scale", None, 3, None)]


def test_too_many_requests_of_one_are_refused_by_name_and_nobody_else_is(serving):
    serving.run.delays_s["pause"] = 1.0
    with Raw(serving) as raw:
        for i in range(80):
            raw.socket.send_multipart([i.to_bytes(8, "little"), wire.encode(wire.Pause())])
        answers = raw.answers(0.8)
        busy = [a for a in answers.values() if isinstance(a[0], wire.Problem) and a[0].kind == "busy"]
        assert len(answers) == 80 and len(busy) == 64
        with ControlClient(serving.endpoint, serving.keys) as another:
            assert another.told(wire.Stop())
    serving.end()


@pytest.mark.alone
def test_a_flood_leaves_the_loop_its_turns(serving, client):
    """40,000 requests for status from one client; another one asks meanwhile."""
    with Raw(serving) as raw:
        serving.gap_s = 0.0
        for i in range(40_000):
            raw.socket.send_multipart([i.to_bytes(8, "little"), wire.encode(wire.AskStatus())])
        assert client.told(wire.Pause())
        assert client.status().snapshot.state == "paused"
    assert serving.gap_s < 0.4


def mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        match rng.randrange(3):
            case 0 if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
            case 1 if data:
                del data[rng.randrange(len(data))]
            case _:
                data.insert(rng.randrange(len(data) + 1), rng.randrange(256))
    return bytes(data)


def bad_header(rng):
    """Bytes that are no request, most of them nearly one."""
    near = {"op": "scale", "pool": "big", "concurrency": 3, "engines": None}
    wrong = rng.choice(
        [-1, 0, 2**63, 1e300, float("nan"), "", "x" * 300, [], {}, None, True, b"\xff", ["auto"]]
    )
    match rng.randrange(7):
        case 0:
            return rng.randbytes(rng.randrange(0, 200))
        case 1:
            return b"\x91" * rng.choice([10, 2000]) + b"\x01"
        case 2:
            return msgspec.msgpack.encode(near | {rng.choice(["op", "engines", "concurrency"]): -7})
        case 3:
            return msgspec.msgpack.encode(near | {"".join(rng.choices(string.printable, k=5)): wrong})
        case 4:
            return b"\xdf\xff\xff\xff\xff" + rng.randbytes(8)
        case 5:
            return b"\x82\xa2op\xa5scale\xa4pool\xa2\xff\xfe"
        case _:
            return msgspec.msgpack.encode(wrong)


def test_frames_of_one_with_a_key_that_are_no_request(serving, client):
    """6,000 of them: each gets an error or silence, none is carried out, and the run answers as before."""
    rng = random.Random(SEED)
    asked = set()
    with Raw(serving) as raw:
        for i in range(6000):
            request_id, header = i.to_bytes(8, "little"), bad_header(rng)
            shape = rng.randrange(10)
            if shape < 7:
                asked.add(request_id)
                frames = [request_id, header]
            else:
                frames = [
                    [header],
                    [request_id],
                    [request_id, header, b""],
                    [rng.randbytes(7), header],
                    [b"", b""],
                ][rng.randrange(5)]
            raw.socket.send_multipart(frames)
            if i % 500 == 499:
                assert client.status().name == "sums"
        answers = raw.answers()
    assert set(answers) == asked
    kinds = {(type(a), a.kind) for came in answers.values() for a in came}
    assert kinds == {(wire.Problem, "malformed")}
    assert serving.run.done == [] and client.told(wire.Pause())


def test_requests_with_a_few_bytes_changed(serving, client):
    """3,000 of them: what is still a request is one of ours, with arguments within their bounds."""
    rng = random.Random(SEED + 1)
    valid = [
        wire.Scale(pool="big", concurrency=3, engines=2),
        wire.Scale(concurrency="auto"),
        wire.Drain(pool="small"),
        wire.Pause(),
        wire.AskStatus(),
    ]
    with Raw(serving) as raw:
        for i in range(3000):
            raw.socket.send_multipart([i.to_bytes(8, "little"), mutated(rng, wire.encode(rng.choice(valid)))])
        answers = raw.answers()
    assert len(answers) == 3000
    problems = [a for came in answers.values() for a in came if isinstance(a, wire.Problem)]
    assert {p.kind for p in problems} <= {"malformed", "wrong", "refused", "busy"}
    assert len(problems) > 1000
    for command, *arguments in serving.run.done:
        if command == "scale":
            pool, concurrency, engines = arguments
            assert pool in (None, *POOLS)
            assert concurrency in (None, "auto") or 1 <= concurrency <= 65536
            assert engines is None or 0 <= engines <= 65536
    assert client.status()


def test_bytes_of_one_without_a_key(serving, client):
    """300 connections that send noise, beginnings of ZMTP with noise after them, and nothing at all."""
    rng = random.Random(SEED + 2)
    host, port = serving.endpoint.removeprefix("tcp://").split(":")
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE" + bytes(15) + b"\x00" + bytes(31)
    kept = []
    for i in range(300):
        peer = sockets.create_connection((host, int(port)), timeout=5)
        noise = rng.randbytes(rng.randrange(0, 3000))
        hello = b"\x04\xc8\x05HELLO" + rng.randbytes(194)
        head = rng.choice(
            [b"", greeting, greeting + hello, mutated(rng, greeting), greeting[: rng.randrange(64)]]
        )
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it was shown the door already
            peer.sendall(head + noise)
        if i % 3:
            peer.close()
        else:
            kept.append(peer)
    assert client.status().name == "sums"
    for peer in kept:
        peer.close()
    assert serving.run.done == [] and client.told(wire.Pause())


def test_a_frame_past_the_bound_closes_its_connection_alone(serving, client):
    with Raw(serving) as raw:
        raw.socket.send_multipart([bytes(8), bytes(wire.MOST_REQUEST_BYTES + 1)])
        assert raw.answers(0.7) == {}
    assert client.status() and serving.run.done == []


@given(st.binary(max_size=200))
def test_decoding_raises_value_errors_alone(header):
    for decode in (wire.decode_request, wire.decode_answer):
        with contextlib.suppress(ValueError):
            decode(header)


def test_an_answer_of_another_version_is_told_as_such(folder):
    """A service with the run's keys that speaks another language."""
    from asyncrl.buffer.keys import Authenticator, secure_server

    server_keys, keys = make_keys(folder.keys)
    context = zmq.Context()
    with Authenticator(context, server_keys):
        socket = context.socket(zmq.ROUTER)
        socket.linger = 0
        secure_server(socket, server_keys)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        replies = iter([b"\xc0", wire.encode(wire.Done(text="hello")), msgspec.msgpack.encode({"op": "new"})])

        def answer():
            for reply in replies:
                if socket.poll(5000):
                    address, request_id, _ = socket.recv_multipart()
                    socket.send_multipart([address, request_id, reply])

        thread = threading.Thread(target=answer)
        thread.start()
        with ControlClient(f"tcp://127.0.0.1:{port}", keys) as client:
            for _ in range(3):
                with pytest.raises(ControlFault, match="of another version of asyncrl"):
                    client.status()
        thread.join(10)
        socket.close()
    context.term()


def test_secrets_are_in_no_repr(serving):
    assert isinstance(serving.keys, ClientKeys) and serving.keys.secret not in repr(serving.keys)
    assert control_client.ANSWER_S < control_client.RESULT_S
