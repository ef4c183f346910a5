"""Real buffer services in threads, for tests that talk to them."""

import contextlib
import threading
from pathlib import Path

import numpy as np

from asyncrl.buffer import (
    BlockingBufferClient,
    BufferAddress,
    BufferClient,
    BufferConfig,
    BufferService,
    PromptRow,
    Segment,
    StalenessConfig,
    ledger_settings,
)
from asyncrl.buffer.keys import make_keys


class Buffer:
    """A buffer of so many shards, each a service in a thread of this process."""

    def __init__(
        self,
        folder,
        *,
        prompts_per_step=2,
        rollouts_per_prompt=2,
        bound=1,
        over_stale="mask",
        greedy_baseline=False,
        **config,
    ):
        self.folder = Path(folder)
        self.config = BufferConfig(**config)
        self.staleness = StalenessConfig(max_staleness_versions=bound, over_stale=over_stale)
        self.sizes = (prompts_per_step, rollouts_per_prompt)
        self.greedy_baseline = greedy_baseline
        self.server_keys, self.client_keys = make_keys(self.folder / "keys")
        self.services, self.threads, self.ports = [], [], [0] * self.config.shards
        self.start()
        self.client = BlockingBufferClient(self.address)

    @property
    def address(self):
        endpoints = tuple(service.endpoint for service in self.services)
        return BufferAddress(endpoints=endpoints, keys=self.client_keys)

    def log(self, shard=0):
        return self.folder / "rollouts" / str(shard)

    def settings(self, shard=0):
        return ledger_settings(
            self.config, self.staleness, *self.sizes, shard, greedy_baseline=self.greedy_baseline
        )

    def start(self):
        for shard in range(self.config.shards):
            service = BufferService(
                settings=self.settings(shard),
                config=self.config,
                folder=self.log(shard),
                keys=self.server_keys,
                port=self.ports[shard],
            )
            self.ports[shard] = int(service.endpoint.rpartition(":")[2])
            self.services.append(service)
            thread = threading.Thread(target=service.run, name=f"buffer-{shard}")
            thread.start()
            self.threads.append(thread)

    def stop(self):
        if any(thread.is_alive() for thread in self.threads):
            self.client.stop()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.services, self.threads = [], []

    def again(self):
        """Stops the services and starts them on the same ports and folders, as after a crash."""
        self.stop()
        self.start()

    def close(self):
        self.stop()
        self.client.close()


@contextlib.contextmanager
def buffer_service(folder, **settings):
    """Yields (buffer, blocking client). Stops the services at the end if the test did not."""
    buffer = Buffer(folder, **settings)
    try:
        yield buffer, buffer.client
    finally:
        buffer.close()


def prompts(count, first=0):
    return [
        PromptRow(prompt_id=f"p{i}", tokens=[1, 2, 3 + i], payload='{"answer": "x"}', position=i)
        for i in range(first, first + count)
    ]


async def admit_all(client: BufferClient, count: int) -> int:
    """Admits up to `count` prompts, as many as there is room for, in order and dealt out over the shards."""
    first = (await client.status()).frontier
    admitted = 0
    while admitted < count:
        room = await client.capacity(0.0)
        if not any(room):
            break
        for shard, most in enumerate(room):
            fair = -(-(count - admitted) // (len(room) - shard))
            some = prompts(min(most, fair), first + admitted)
            if some:
                admitted += (await client.admit(shard, some)).admitted
    return admitted


async def admit(address, count):
    async with BufferClient(address) as client:
        return await admit_all(client, count)


def segment(rollout_id, lease_id, start, tokens, version=0, finish_reason="", logprob=-0.5):
    return Segment(
        rollout_id=rollout_id,
        lease_id=lease_id,
        start=start,
        version=version,
        tokens=list(tokens),
        logprobs=np.full(len(tokens), logprob, np.float32).tolist(),
        finish_reason=finish_reason,
    )
