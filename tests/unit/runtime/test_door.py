"""The learner's sockets under the run's keys: who has no key, or another run's, neither joins nor gets a byte."""

from functools import partial

import pytest
import torch
import zmq

from asyncrl.buffer.keys import make_keys, secure_client
from asyncrl.runtime.door import Door
from asyncrl.weight_sync import wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import EnginesMissing
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.publisher import Publisher
from tests.engine_threads import Engines

PLAN = make_plan([("a", "float32", (300,)), ("b", "bfloat16", (20, 30))], 4096)


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_who_has_the_run_s_key_takes_versions_and_nobody_else_joins(tmp_path, transport):
    server, client = make_keys(tmp_path / "run")
    _, another = make_keys(tmp_path / "another")
    door = Door(server)
    config = WeightSyncConfig(transport=transport, timeout_s=20.0)
    publisher = Publisher(config, f"test-door-{transport}", PLAN, secure=door.secure)
    members = Engines(publisher.endpoint, partial(secure_client, keys=client), member=[])
    strangers = Engines(publisher.endpoint, partial(secure_client, keys=another), stranger=[])
    bare = Engines(publisher.endpoint, None, bare=[])
    try:
        publisher.wait_for_engines({"member"}, timeout_s=10)
        with pytest.raises(EnginesMissing):
            publisher.wait_for_engines({"stranger", "bare"}, timeout_s=1)
        for version in (0, 1):
            weights = {"a": torch.randn(300), "b": torch.randn(20, 30)}
            publisher.begin(version)
            for bucket in PLAN.buckets:
                publisher.write(bucket, cut(PLAN, bucket, weights))
            report = publisher.commit()
            assert report.engines.keys() == {"member"} and report.engines["member"].outcome == "applied"
    finally:
        for engines in (members, strangers, bare):
            engines.close()
        publisher.close()
        door.close()
        door.close()


def test_a_message_without_a_key_is_never_read(tmp_path):
    server, _ = make_keys(tmp_path)
    door = Door(server)
    with Publisher(WeightSyncConfig(), "test-door-bare", PLAN, secure=door.secure) as publisher:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, b"stranger")
        socket.connect(publisher.endpoint)
        socket.send(wire.encode(wire.Join(version=-1)))
        assert not socket.poll(500)
        assert publisher.engines == {}
        context.destroy(linger=0)
    door.close()
