"""Random schedules of joins, farewells, deaths and versions with rolling updates, over real sockets and shared memory.

Engines are puppets: they answer as receivers do, and in the middle of an update do what a script asks for. Held: nothing that they
do keeps the learner from its next version; nobody in service is further behind than the bound when one begins; once all is
settled, whoever is in service runs the newest version with its bytes; who is not was named once, and never one that did its part.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections import deque

import pytest
import torch
from engine_puppets import Puppet
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from asyncrl.weight_sync import exchange, wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.rolling_publisher import RollingPublisher

PLAN = make_plan([("w", "float32", (50,)), ("b", "float32", (5,))], 200)
TIMEOUT_S = 0.8
SPEAKS_S = 20.0
DEEDS = ["obey"] * 8 + ["slow"] * 3 + ["die", "fail", "leave", "anew", "hang"]


class Life:
    """From a join to the next one under that name."""

    def __init__(self, puppet: Puppet) -> None:
        self.puppet = puppet
        self.named = 0


class Schedules(RuleBasedStateMachine):
    @initialize(max_lag=st.integers(1, 3))
    def begin(self, max_lag):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.max_lag = max_lag
        config = WeightSyncConfig(timeout_s=TIMEOUT_S)
        run_id = f"test-{uuid.uuid4().hex[:12]}"
        self.publisher = RollingPublisher(config, run_id, PLAN, max_lag_versions=max_lag)
        self.present: dict[str, Puppet] = {}
        """The one that the publisher should know under each name."""
        self.faultless: set[Puppet] = set()
        self.all: list[Puppet] = []
        self.lives: dict[str, Life] = {}
        """Of whoever the publisher last heard to join, by name."""
        self.settled: deque[Life] = deque()
        """Whose updates ended, as the publisher's reports that are still to come tell it."""
        self.version = -1
        self.listen()

    def listen(self) -> None:
        """Reports are read late, and name nobody but the name: note whose it was when they were made."""
        members, exchange = self.publisher._members, self.publisher._exchange
        hear, ended = members.hear, exchange._ended

        def heard(name, message) -> None:
            if isinstance(message, wire.Join):
                # Below 0 a version is one puppet's own. Who has a real one joins anew over the connection that it has.
                index = -1 - message.version
                self.lives[name] = Life(self.all[index] if index >= 0 else self.lives[name].puppet)
            hear(name, message)

        def noted(fact) -> None:
            self.settled.append(self.lives[fact.settled.member])
            ended(fact)

        members.hear, exchange._ended = heard, noted

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=SPEAKS_S)

    @rule(name=st.sampled_from("abcd"), stage=st.sampled_from(DEEDS), apply=st.sampled_from(DEEDS))
    def join(self, name, stage, apply):
        """Also over a connection of that name which lingers."""

        async def start() -> Puppet:
            puppet = Puppet(self.publisher.endpoint, name, len(self.all), stage, apply)
            puppet.task = asyncio.create_task(puppet.run())
            return puppet

        self.look()
        puppet = self.present[name] = self.do(start())
        self.all.append(puppet)
        if (stage, apply) == ("obey", "obey"):
            self.faultless.add(puppet)
        deadline = time.monotonic() + SPEAKS_S
        while not self.is_known(puppet) and time.monotonic() < deadline:
            self.publisher.engines  # noqa: B018  takes in what has come
            time.sleep(0.002)
        assert self.is_known(puppet)

    def is_known(self, puppet: Puppet) -> bool:
        return puppet.name in self.lives and self.lives[puppet.name].puppet is puppet

    @rule(name=st.sampled_from("abcd"), deed=st.sampled_from(["close", "leave"]))
    def go(self, name, deed):
        """Drawn without a look at who is there: that depends on time."""
        if name not in self.present or not self.present[name].alive:
            return

        async def go() -> None:
            getattr(self.present[name], deed)()

        self.do(go())
        self.faultless.discard(self.present[name])

    @rule()
    def publish(self):
        self.version += 1
        started = time.monotonic()
        self.publisher.begin(self.version)
        assert time.monotonic() - started < TIMEOUT_S + 0.5
        running = self.publisher._rolling.versions.values()
        assert all(v < 0 or v >= min(self.version - self.max_lag, self.version - 1) for v in running)
        weights = {"w": torch.full((50,), float(self.version)), "b": torch.ones(5)}
        for bucket in PLAN.buckets:
            self.publisher.write(bucket, cut(PLAN, bucket, weights))
        report = self.publisher.commit()
        assert report.version == self.publisher.version == self.version

    @rule()
    def look(self):
        """The welcomer has its turn, and is called off after a moment."""
        deadline = time.monotonic() + 0.02
        while (report := self.publisher.welcome(lambda: time.monotonic() > deadline)) is not None:
            self.note(report)

    @rule()
    def settle(self):
        deadline = time.monotonic() + SPEAKS_S
        while self.version >= 0 and set(self.publisher.engines.values()) - {self.version}:
            assert time.monotonic() < deadline
            while (report := self.publisher.welcome()) is not None:
                self.note(report)
        while (report := self.publisher.welcome()) is not None:
            self.note(report)
        known = self.publisher.engines
        for name, puppet in list(self.present.items()):
            if puppet.alive and name in known and self.version >= 0:
                assert puppet.version == self.version and puppet.value == float(self.version)
                assert puppet.ran == sorted(set(puppet.ran)) and not self.lives[name].named
            elif self.version >= 0 and puppet in self.faultless:
                raise AssertionError(f"{name} did its part and is not in service")
            elif not puppet.alive and name not in known:
                del self.present[name]

    def note(self, report) -> None:
        life = self.settled.popleft()
        for name in report.out_of_service:
            assert name == life.puppet.name
            life.named += 1
            assert life.named == 1
            assert life.puppet not in self.faultless, report.out_of_service

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return

        async def end() -> None:
            for puppet in self.all:
                puppet.close()
                puppet.task.cancel()
            ended = await asyncio.gather(*(puppet.task for puppet in self.all), return_exceptions=True)
            for puppet in self.all:
                puppet._context.term()
            assert not [error for error in ended if isinstance(error, WeightSyncError)], (
                "bytes changed under them"
            )

        with contextlib.ExitStack() as ending:
            ending.callback(self.loop.close)
            ending.callback(self.thread.join, timeout=10)
            ending.callback(self.loop.call_soon_threadsafe, self.loop.stop)
            ending.callback(self.publisher.close)
            ending.callback(lambda: self.do(end()))
            self.settle()


Schedules.TestCase.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class TestSchedules(Schedules.TestCase):
    @pytest.fixture(autouse=True)
    def _notice_deaths_soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exchange, "PING_S", 0.05)
