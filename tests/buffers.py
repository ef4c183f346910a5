"""A real buffer service in a thread, for tests that talk to it."""

import contextlib
import threading

import numpy as np

from asyncrl.buffer import BlockingBufferClient, BufferConfig, BufferService, StalenessConfig
from asyncrl.generators.outbox import Segment, rows


@contextlib.contextmanager
def buffer_service(
    folder, *, prompts_per_step=2, rollouts_per_prompt=2, bound=1, over_stale="mask", **config
):
    """Yields (service, blocking client). Stops the service at the end if the test did not."""
    service = BufferService(
        config=BufferConfig(**config),
        staleness=StalenessConfig(max_staleness_versions=bound, over_stale=over_stale),
        prompts_per_step=prompts_per_step,
        rollouts_per_prompt=rollouts_per_prompt,
        log_folder=folder,
    )
    thread = threading.Thread(target=service.run, name="buffer")
    thread.start()
    client = BlockingBufferClient(service.endpoint)
    try:
        yield service, client
    finally:
        if thread.is_alive():
            client.stop()
        client.close()
        thread.join(10)
        assert not thread.is_alive()


def segment_rows(rollout_id, lease_id, start, tokens, version=0, finish_reason="", logprob=-0.5):
    """One segment as `schema.SEGMENTS` rows."""
    segment = Segment(
        rollout_id=rollout_id,
        lease_id=lease_id,
        start=start,
        version=version,
        tokens=list(tokens),
        logprobs=np.full(len(tokens), logprob, np.float32).tolist(),
        finish_reason=finish_reason,
    )
    return rows([segment])
