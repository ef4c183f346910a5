"""Random schedules of joins, farewells, deaths, commits and welcomes over real sockets and shared memory.

Engines here are puppets: they say what receivers say, over the sockets of receivers, and do in the middle of a sync what a
script asks for. Held: who stays in service runs the newest version with its bytes after each commit and each welcome; who
did not do its part is named, told to end, and out; nothing that an engine does keeps a version from being committed.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid

import pytest
import torch
from engine_puppets import Puppet
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from asyncrl.weight_sync import exchange
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.publisher import Publisher

PLAN = make_plan([("w", "float32", (50,)), ("b", "float32", (5,))], 200)
TIMEOUT_S = 1.5
SPEAKS_S = 20.0

DEEDS = ["obey"] * 8 + ["die", "fail", "leave", "anew", "hang"]
"""What a puppet does at one command. anew: it joins once more and does nothing, as after a broken connection."""
NAMED = {"die": "lost", "fail": "failed", "hang": "late"}


class Schedules(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        config = WeightSyncConfig(timeout_s=TIMEOUT_S)
        self.publisher = Publisher(config, f"test-{uuid.uuid4().hex[:12]}", PLAN)
        self.present: dict[str, Puppet] = {}
        """The one that the publisher should know under each name."""
        self.all: list[Puppet] = []
        self.version = -1

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout=SPEAKS_S)

    async def heard(self, event: asyncio.Event) -> None:
        async with asyncio.timeout(SPEAKS_S / 2):
            await event.wait()

    @rule(name=st.sampled_from("abcd"), stage=st.sampled_from(DEEDS), apply=st.sampled_from(DEEDS))
    def join(self, name, stage, apply):
        """Also over a connection of that name which lingers."""

        async def start() -> Puppet:
            puppet = Puppet(self.publisher.endpoint, name, len(self.all), stage, apply)
            puppet.task = asyncio.create_task(puppet.run())
            return puppet

        puppet = self.present[name] = self.do(start())
        self.all.append(puppet)
        deadline = time.monotonic() + SPEAKS_S
        while self.publisher.engines.get(name) != puppet.version and time.monotonic() < deadline:
            time.sleep(0.002)
        assert self.publisher.engines[name] == puppet.version

    @precondition(lambda self: any(puppet.alive for puppet in self.present.values()))
    @rule(data=st.data(), deed=st.sampled_from(["close", "leave"]))
    def go(self, data, deed):
        name = data.draw(st.sampled_from(sorted(name for name, p in self.present.items() if p.alive)))

        async def go() -> None:
            getattr(self.present[name], deed)()

        self.do(go())
        if deed == "leave":
            del self.present[name]
            deadline = time.monotonic() + SPEAKS_S
            while name in self.publisher.engines and time.monotonic() < deadline:
                time.sleep(0.002)

    @rule()
    def commit(self):
        self.version += 1
        self.publisher.begin(self.version)
        weights = {"w": torch.full((50,), float(self.version)), "b": torch.ones(5)}
        for bucket in PLAN.buckets:
            self.publisher.write(bucket, cut(PLAN, bucket, weights))
        expected = self.expected(self.present)
        report = self.publisher.commit()
        assert report.version == self.publisher.version == self.version
        self.check(report, expected)

    @rule()
    def welcome_who_waits(self):
        self.welcome()

    def welcome(self):
        before = self.publisher.version
        expected = self.expected(
            {name: puppet for name, puppet in self.present.items() if puppet.version != before}
        )
        report = self.publisher.welcome()
        assert self.publisher.version == before
        if before < 0 or not expected:
            assert report is None
            return
        self.check(report, expected)
        if any(puppet.version != before for puppet in self.present.values()):
            self.welcome()  # they came anew in the middle; each does that twice at most
        for name, puppet in self.present.items():
            assert puppet.version == before and puppet.value == float(before), name

    def expected(self, members: dict[str, Puppet]) -> dict[str, str]:
        """Outcome by name, from the scripts alone. An engine that goes down while it stages never gets to apply."""
        outcomes = {}
        for name, puppet in members.items():
            deeds = [deed for deed in (puppet.deeds["stage"], puppet.deeds["apply"]) if deed != "obey"]
            deed = "die" if not puppet.alive else deeds[0] if deeds else "obey"
            outcomes[name] = NAMED.get(deed, "left" if deed in ("leave", "anew") else "applied")
        return outcomes

    def check(self, report, expected: dict[str, str]) -> None:
        assert {name: member.outcome for name, member in report.engines.items()} == expected
        named = {name for name, outcome in expected.items() if outcome in ("failed", "late", "lost")}
        assert report.out_of_service.keys() == named
        for name in named:
            puppet = self.present.pop(name)
            if expected[name] != "lost":
                self.do(self.heard(puppet.dismissed))
        for name in [name for name, puppet in self.present.items() if not puppet.alive]:
            if expected.get(name) == "left":
                del self.present[name]
        in_service = {name: puppet for name, puppet in self.present.items() if name in expected}
        for name, puppet in in_service.items():
            if expected[name] == "applied":
                assert puppet.version == report.version and puppet.value == float(report.version)
        known = self.publisher.engines
        assert known == {name: puppet.version for name, puppet in self.present.items()}

    def teardown(self) -> None:
        async def end() -> None:
            for puppet in self.all:
                puppet.close()
                puppet.task.cancel()
            await asyncio.gather(*(puppet.task for puppet in self.all), return_exceptions=True)
            for puppet in self.all:
                puppet._context.term()

        self.do(end())
        self.publisher.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=10)
        self.loop.close()


Schedules.TestCase.settings = settings(
    max_examples=20, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class TestSchedules(Schedules.TestCase):
    @pytest.fixture(autouse=True)
    def _notice_deaths_soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exchange, "PING_S", 0.05)
