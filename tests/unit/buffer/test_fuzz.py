"""Frames that no client of ours would send: the service answers or is silent, lives, and its accounts stay as they are."""

import asyncio
import contextlib
import logging
import random
import socket
import string
import time

import msgspec
import numpy as np
import pytest
import zmq

from asyncrl.buffer import BufferClient, wire
from asyncrl.buffer.arena import Arena, Region
from asyncrl.buffer.keys import ClientKeys
from tests.buffer_world import RawClient, accounts, check_rows, goes_round, logprobs_of, part, tokens_of
from tests.buffers import admit_all, buffer_service

FRAMES = 100_000
SEED = 20_260
AT_ONCE = 400
"""Frames between two looks at whether the service lives."""
STATUS_ID = b"STATUS??"


class State:
    """What is held while the fuzzing goes on: nothing is queued, nothing can be admitted, one batch is handed over."""

    def __init__(self):
        self.lengths = {}
        """(rollout_id, lease_id) -> tokens that it has."""
        self.complete = set()

    async def prepare(self, client):
        await admit_all(client, 100)
        leases = await client.lease("holder", 100, 2.0)
        assert len(leases) == 8
        done, held = leases[:4], leases[4:]
        for lease in done:
            whole = part(lease.rollout_id, lease.lease_id, 0, 4, finish_reason="stop")
            assert await client.append("holder", [whole]) == []
            assert (
                await client.score([wire.Scored(lease.rollout_id, lease.lease_id, lease.rollout_id % 3)])
                == []
            )
        for index, lease in enumerate(held):
            count = (4, 2, 1, 0)[index]
            reason = "stop" if index == 0 else ""
            segment = part(lease.rollout_id, lease.lease_id, 0, count, finish_reason=reason)
            assert await client.append("holder", [segment]) == []
            self.lengths[lease.rollout_id, lease.lease_id] = count
        self.complete = {(held[0].rollout_id, held[0].lease_id)}
        batch = await client.ask(0, wire.ReadBatch(after=0, timeout_s=1.0, from_files=True))
        assert batch.selection.batch_ids == (1,)

    def valid_requests(self):
        """One or more of each kind that are right by the wire and, but for what is changed in them, by the ledger too."""
        (r, lease), *_ = [pair for pair, count in self.lengths.items() if count == 2]
        (done, done_lease), *_ = self.complete
        count = 5
        body = tokens_of(r, count, 2).tobytes() + logprobs_of(r, count, 2).tobytes()
        append = wire.Append(
            engine_id="holder",
            rollout_ids=[r, done],
            lease_ids=[lease, done_lease],
            starts=[2, 4],
            versions=[0, 0],
            lengths=[count, 0],
            finish_reasons=["", "stop"],
        )
        location = self.arena.location
        tokens = np.arange(6, dtype=np.int32).tobytes()
        admission = wire.Admit(
            positions=[4, 5], prompt_ids=["a", "b"], payloads=["{}", ""], lengths=[4, 2], timeout_s=0.0
        )
        known = msgspec.structs.replace(admission, positions=[0, 1])
        pair = (r, lease)
        return [
            (wire.Attach(location=location), None),
            (wire.Capacity(timeout_s=0.0), None),
            (admission, tokens),
            (known, tokens),
            (wire.Lease(engine_id="holder", limit=3, after=2, timeout_s=0.0), None),
            (wire.Lease(engine_id="other", limit=3, after=0, timeout_s=0.01, kv_free_tokens=3), None),
            (append, body),
            (msgspec.structs.replace(append, region=Region(64, 40), body_hash=3), None),
            (wire.Score(rollouts=[wire.Scored(done, done_lease, 1.0)]), None),
            (wire.Fail(rollout_id=r, lease_id=lease, reason="no"), None),
            (wire.Release(leases=[pair, (done, done_lease)]), None),
            (wire.Heartbeat(engine_id="holder"), None),
            (wire.EngineLost(engine_id="holder"), None),
            (wire.ReadBatch(after=0, timeout_s=0.0, from_files=True), None),
            (wire.ReadBatch(after=0, timeout_s=0.0, from_files=False), None),
            (wire.Commit(batch_id=1, version=1), None),
            (wire.Publish(version=0), None),
            (wire.Freeze(seconds=0.0), None),
            (wire.Snapshot(step=1, keep=[1]), None),
            (wire.Restore(step=1), None),
            (wire.Status(), None),
            (wire.Stop(), None),
        ]

    def would_change(self, frames):
        """Whether a frame has stayed, or become, a request that rightly changes the accounts (or costs seconds)."""
        if not 2 <= len(frames) <= 3 or len(frames[0]) != 8:
            return False
        try:
            request = wire.decode_request(frames[1])
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return False
        body = frames[2] if len(frames) == 3 else b""
        match request:
            case wire.Stop():
                return True
            case wire.Freeze(seconds=seconds):
                return seconds > 0
            case wire.Capacity() | wire.Admit() | wire.Lease() | wire.ReadBatch():
                return request.timeout_s > 0.02
            case wire.Snapshot() | wire.Restore():  # right ones are slow, and fuzzed by a test of their own
                return True
            case wire.EngineLost(engine_id=engine_id):
                return engine_id == "holder"
            case wire.Commit(batch_id=batch_id, version=version):
                return (batch_id, version) == (1, 1)
            case wire.Score(rollouts=scored):
                return any((s.rollout_id, s.lease_id) in self.lengths for s in scored)
            case wire.Fail():
                return (request.rollout_id, request.lease_id) in self.lengths
            case wire.Release(leases=leases):
                return any(tuple(lease) in self.lengths for lease in leases)
            case wire.Append():
                return self._appends(request, body)
        return False

    def _appends(self, request, body):
        rows = list(
            zip(request.rollout_ids, request.lease_ids, request.starts, request.versions, strict=False)
        )
        columns = (
            request.lease_ids,
            request.starts,
            request.versions,
            request.lengths,
            request.finish_reasons,
        )
        return (
            request.region is None
            and all(len(column) == len(request.rollout_ids) for column in columns)
            and len(body) == 8 * sum(request.lengths)
            and any(self.lengths.get((r, x)) == start and version <= 1 for r, x, start, version in rows)
        )


WEIRD = [
    None,
    True,
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -(2**63),
    1.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "0",
    "x" * 3000,
    "\0",
    b"",
    b"\xff" * 9,
    [],
    [[]],
    [None],
    [-1],
    [2**64 - 1],
    ["a"] * 300,
    [0] * 300,
    {},
    {"": {}},
    [[[[[[[[]]]]]]]],
]


class Fuzzer:
    """Makes frames out of valid requests; seeded."""

    def __init__(self, seed, requests):
        self.random = random.Random(seed)
        self.requests = requests
        self.headers = [wire.encode(request) for request, _ in requests]

    def frames(self):
        rng = self.random
        index = rng.randrange(len(self.requests))
        header, body = self.headers[index], self.requests[index][1]
        request_id = rng.randbytes(8)
        how = rng.randrange(10)
        if how < 3:
            header = self._bytes(header)
        elif how < 6:
            header = self._fields(header)
        elif how == 6:
            body = self._body(body)
        elif how == 7:
            return self._structure(request_id, header, body)
        elif how == 8:
            header = self._nested(header)
        else:
            header, body = rng.randbytes(rng.randrange(60)), rng.choice([None, body])
        if rng.random() < 0.1:
            body = self._body(body)
        return [request_id, header, *([] if body is None else [body])]

    def _bytes(self, data):
        rng, data = self.random, bytearray(data)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            at = rng.randrange(len(data)) if data else 0
            match rng.randrange(6):
                case 0 if data:
                    data[at] ^= 1 << rng.randrange(8)
                case 1 if data:
                    data[at] = rng.randrange(256)
                case 2:
                    del data[at:]
                case 3:
                    data += bytes(data)
                case 4:
                    data[at:at] = rng.randbytes(rng.randrange(1, 9))
                case 5:
                    del data[at : at + rng.randrange(1, 5)]
        return bytes(data)

    def _fields(self, header):
        rng = self.random
        fields = msgspec.msgpack.decode(header)
        for _ in range(rng.choice([1, 1, 2, 3])):
            name = rng.choice([*fields, "unknown", ""])
            match rng.randrange(5):
                case 0:
                    fields.pop(name, None)
                case 1 if isinstance(fields.get(name), list):
                    # Lists that differ in length, or hold what they should not.
                    items = fields[name]
                    change = rng.choice([items[:-1], items * 2, items[::-1], [*items, rng.choice(WEIRD)]])
                    fields[name] = change
                case 2 if isinstance(fields.get(name), dict):
                    inner = rng.choice([*fields[name], "unknown"])
                    fields[name] = {**fields[name], inner: rng.choice(WEIRD)}
                case 3 if isinstance(fields.get(name), int):
                    change = fields[name] + rng.choice([-1, 1, 2, 1000])
                    fields[name] = min(2**64 - 1, max(-(2**63), change))
                case _:
                    fields[name] = rng.choice(WEIRD)
        items = list(fields.items())
        rng.shuffle(items)
        return msgspec.msgpack.encode(dict(items))

    def _nested(self, header):
        """Deep lists and maps, where a value is looked for and where it is passed over (the tag comes behind it)."""
        rng = self.random
        depth = rng.choice([10, 200, 900, 3000])
        deep = rng.choice([b"\x91", b"\x81\xa1x", b"\xdc\x00\x01"]) * depth + b"\xc0"
        match rng.randrange(3):
            case 0:
                return deep
            case 1:
                return b"\x82\xa1x" + deep + b"\xa2op\xa6status"
            case _:
                name = rng.choice(["reason", "engine_id", "rollouts", "location", "leases"]).encode()
                return b"\x82\xa2op\xa4fail" + bytes([0xA0 + len(name)]) + name + deep

    def _body(self, body):
        rng = self.random
        if not body or rng.random() < 0.3:
            return rng.randbytes(rng.choice([0, 1, 7, 8, 24, 40, 41, 400]))
        if len(body) > 8 and rng.random() < 0.3:
            columns = bytearray(body)
            columns[-4:] = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff"])  # NaN, Inf, -Inf
            columns[4] ^= 1
            return bytes(columns)
        return self._bytes(body)

    def _structure(self, request_id, header, body):
        rng = self.random
        whole = [request_id, header, *([] if body is None else [body])]
        match rng.randrange(6):
            case 0:
                return whole[: rng.randrange(1, len(whole) + 1)]
            case 1:
                return [*whole, *[rng.randbytes(3) for _ in range(rng.randrange(1, 40))]]
            case 2:
                return [rng.randbytes(rng.choice([0, 1, 7, 9, 255, 1000])), *whole[1:]]
            case 3:
                return whole[::-1]
            case 4:
                return [b"", *whole]
            case _:
                return [b""] * rng.randrange(1, 6)


@pytest.fixture
def world(tmp_path):
    # Each frame that is no request is logged; 100,000 lines would be most of the test's time.
    logger = logging.getLogger("asyncrl.buffer.service")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with buffer_service(tmp_path) as (buffer, reader):
        reader.publish(0)
        yield buffer, reader
    logger.setLevel(before)


def _alive(client, sent):
    """Waits for the answer to a status that comes behind all frames; returns the answers to those before it."""
    client.send(STATUS_ID, wire.encode(wire.Status()))
    answers = []
    while True:
        frames = client.receive(10.0)
        assert frames is not None, f"no answer any more; one of these ended the service: {sent!r}"
        reply = wire.decode_reply(frames[1])
        if frames[0] == STATUS_ID:
            return reply, answers
        answers.append(reply)


def test_no_frame_of_a_client_of_the_run_ends_the_service_or_changes_its_accounts(world):
    buffer, reader = world
    state = State()
    state.arena = Arena(2**20)

    async def prepare():
        async with BufferClient(buffer.address) as client:
            await state.prepare(client)

    asyncio.run(prepare())
    before, begun = accounts(reader.status()), time.monotonic()
    fuzzer = Fuzzer(SEED, state.valid_requests())
    problems = others = 0
    with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
        assert client.ask(wire.Attach(location=state.arena.location)).refused == ""
        for _ in range(FRAMES // AT_ONCE):
            sent = []
            while len(sent) < AT_ONCE:
                frames = fuzzer.frames()
                if not state.would_change(frames):
                    sent.append(frames)
            for frames in sent:
                client.send(*frames)
            report, answers = _alive(client, sent)
            refused = sum(isinstance(answer, wire.Problem) for answer in answers)
            problems, others = problems + refused, others + len(answers) - refused
            assert accounts(report) == before, sent
    print(f"{FRAMES} frames in {time.monotonic() - begun:.1f} s: {problems} refused, {others} answered")
    # Most are refused by name, some are harmless requests, and the rest (no identity, frame counts) meet silence.
    assert problems > 0.6 * FRAMES and others > 0.02 * FRAMES
    assert problems + others < FRAMES
    state.arena.close()
    asyncio.run(_finish(buffer, state))
    selection, rows = reader.read_batch(2.0)
    assert selection.batch_ids == (1,) and rows.num_rows == 4
    check_rows(rows, 4)
    assert reader.commit((1,), 1).trained == 4
    selection, rows = reader.read_batch(2.0)
    assert {(r, lease) for r, lease in state.lengths} >= {(r, lease) for r, lease in state.complete}
    assert set(rows["rollout_id"].to_pylist()) == {r for r, _ in state.lengths}
    check_rows(rows, 4)
    assert reader.commit(selection.batch_ids, 2).trained == 8
    buffer.again()  # what the log took in is whole
    assert reader.status().counts.trained == 8 and reader.status().recovery.cut_bytes == 0
    goes_round(buffer)


async def _finish(buffer, state):
    """Everything goes on under the leases of before."""
    async with BufferClient(buffer.address) as client:
        for (rollout_id, lease_id), count in state.lengths.items():
            if (rollout_id, lease_id) not in state.complete:
                rest = part(rollout_id, lease_id, count, 4 - count, finish_reason="stop")
                assert await client.append("holder", [rest]) == []
            assert await client.score([wire.Scored(rollout_id, lease_id, rollout_id % 3)]) == []


def test_snapshots_and_restores_with_odd_steps_are_refused_or_harmless(world):
    """They were left out above, where right ones would take the time."""
    buffer, reader = world
    rng = random.Random(SEED)
    steps = [0, 1, 2**31, 2**63 - 1]
    with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
        for step in (*steps, 1):
            answer = client.ask(wire.Snapshot(step=step, keep=steps))
            assert isinstance(answer, wire.Snapshotted), answer
        before = accounts(reader.status())
        made = set(steps)
        fuzzer = Fuzzer(SEED, [(wire.Snapshot(step=5, keep=steps), None), (wire.Restore(step=7), None)])
        for _ in range(300):
            frames = fuzzer.frames()
            with_step = frames[1] if len(frames) > 1 else b""
            try:
                request = wire.decode_request(with_step)
            except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
                request = None
            if isinstance(request, wire.Restore) and request.step in made:
                continue
            if isinstance(request, wire.Snapshot):
                made.add(request.step)
            client.send(*frames)
            if rng.random() < 0.05:
                assert accounts(_alive(client, frames)[0]) == before
        assert accounts(_alive(client, [])[0]) == before
        assert client.ask(wire.Snapshot(step=2**63 - 1, keep=[])).step == 2**63 - 1
        assert client.ask(wire.Restore(step=2**63 - 1)).step == 2**63 - 1
    reader.publish(0)
    goes_round(buffer)


KILLED = {
    "a value nested deeper than the stack, before the tag": [
        b"\x82\xa1x" + b"\x91" * 3000 + b"\xc0\xa2op\xa6status"
    ],
    "a string that is not UTF-8": [b"\x82\xa2op\xa9heartbeat\xa9engine_id\xa3a\xdcb"],
    "a key that is not UTF-8": [b"\x82\xa2op\xa6status\xa2\xff\xfe\xc0"],
    "maps, the same": [b"\x82\xa1x" + b"\x81\xa1x" * 3000 + b"\xc0\xa2op\xa6status"],
}


@pytest.mark.parametrize("name", KILLED)
def test_frames_that_once_ended_the_service(world, name):
    buffer, _ = world
    with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
        client.send(b"12345678", *KILLED[name])
        answer = wire.decode_reply(client.receive()[1])
        assert isinstance(answer, wire.Problem) and answer.kind == "BadRequest"
    goes_round(buffer)


# ---- those who are not of the run -----------------------------------------------------------------------------------------------


def _another_pair():
    public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
    return public, secret


def test_who_has_not_the_runs_keys_meets_silence(world):
    buffer, reader = world
    before = accounts(reader.status())
    right = buffer.client_keys
    public, secret = _another_pair()
    strangers = {
        "no keys": {"keys": None, "secure": None},
        "keys of its own": {"keys": ClientKeys(public, secret, right.server_public)},
        "another server's key": {"keys": ClientKeys(right.public, right.secret, public)},
        "the server's public key for its own": {
            "keys": ClientKeys(right.server_public, secret, right.server_public)
        },
    }
    clients = {
        name: RawClient(buffer.address.endpoints[0], **settings) for name, settings in strangers.items()
    }
    fuzzer = Fuzzer(SEED, [(wire.Status(), None), (wire.Stop(), None), (wire.Publish(version=0), None)])
    for _ in range(200):
        for client in clients.values():
            with contextlib.suppress(zmq.Again):  # nowhere to send it: it was turned away already
                client.send(b"12345678", wire.encode(wire.Stop()))
                client.send(*fuzzer.frames())
    for name, client in clients.items():
        assert client.receive(0.5) is None, name
        client.close()
    assert accounts(reader.status()) == before
    goes_round(buffer)


GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + b"\0" * 32
"""ZMTP 3.0's, as a client of ours begins."""


def _raw_bytes(rng):
    null = GREETING.replace(b"CURVE", b"NULL\0")
    hello = b"\x04\xc8\x05HELLO\x01\x00" + rng.randbytes(192)
    return [
        b"",
        b"\0",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        rng.randbytes(10),
        rng.randbytes(5000),
        b"\xff" * 3000,
        GREETING[: rng.randrange(1, 64)],
        GREETING + rng.randbytes(300),
        GREETING + hello,
        GREETING + hello[: rng.randrange(1, 190)],
        GREETING + b"\x06\xff\xff\xff\xff\xff\xff\xff\xff" + rng.randbytes(30),
        null + b"\x04\x19\x05READY" + rng.randbytes(60),
        null + b"\x01\x08" + rng.randbytes(8),
        string.printable.encode() * 50,
    ]


def test_raw_bytes_on_the_port_meet_silence_whatever_they_are(world):
    buffer, reader = world
    before = accounts(reader.status())
    host, port = buffer.address.endpoints[0].removeprefix("tcp://").split(":")
    rng, left_open = random.Random(SEED), []
    for turn in range(20):
        for data in _raw_bytes(rng):
            connection = socket.create_connection((host, int(port)), timeout=5)
            with contextlib.suppress(OSError):  # hung up on in the midst of it
                connection.sendall(data)
            if turn % 4 == 0:
                left_open.append(connection)
            else:
                connection.close()
    assert accounts(reader.status()) == before
    said = b""
    for connection in left_open:
        connection.settimeout(0.01)
        with contextlib.suppress(OSError):  # silence, or hung up on
            said += connection.recv(65536)
        connection.close()
    # A greeting and errors of the handshake; nothing that the service itself said.
    assert b"reply" not in said and b"version" not in said
    goes_round(buffer)


def test_many_connections_that_say_nothing_leave_room_for_those_that_do(world):
    buffer, _ = world
    host, port = buffer.address.endpoints[0].removeprefix("tcp://").split(":")
    silent = [socket.create_connection((host, int(port)), timeout=5) for _ in range(300)]
    goes_round(buffer)
    for connection in silent:
        connection.close()
    goes_round(buffer)
