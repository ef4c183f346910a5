"""Writes a log of rollouts row by row, one message each, for tests that read it. Its own layout: a change must show."""

import pyarrow as pa


def _layout(**columns):
    kinds = {"seq": pa.int64(), "unix_s": pa.float64(), **columns}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


def _list(kind):
    return pa.list_(pa.field("item", kind, nullable=False))


LAYOUTS = {
    "prompts": _layout(
        group_id=pa.int64(),
        rollout_ids=_list(pa.int64()),
        greedy_id=pa.int64(),
        position=pa.int64(),
        prompt_id=pa.string(),
        tokens=_list(pa.int32()),
        payload=pa.string(),
    ),
    "segments": _layout(
        rollout_id=pa.int64(),
        lease_id=pa.int64(),
        start=pa.int32(),
        version=pa.int32(),
        finish_reason=pa.string(),
        tokens=_list(pa.int32()),
        logprobs=_list(pa.float32()),
    ),
    "states": _layout(
        rollout_id=pa.int64(),
        group_id=pa.int64(),
        state=pa.string(),
        version=pa.int32(),
        lease_id=pa.int64(),
        attempts=pa.int32(),
        batch_id=pa.int64(),
        engine_id=pa.string(),
        reason=pa.string(),
        reward=pa.float32(),
        cost=pa.float32(),
    ),
}


class LogWriter:
    """One shard's log in `folder/SHARD`. Nothing is ever closed, as in a run that goes on. Row n has unix_s = 1000 + n."""

    def __init__(self, folder, shard=0):
        self.folder = folder / str(shard)
        self.folder.mkdir(parents=True)
        self.seq, self.generation = 0, 0
        self.rotate()

    def rotate(self, generation=None):
        self.generation = generation or self.generation + 1
        self.files = {name: self.path(name).open("xb", buffering=0) for name in LAYOUTS}
        for name, file in self.files.items():
            file.write(LAYOUTS[name].serialize())

    def path(self, name, generation=None):
        return self.folder / f"{name}-{generation or self.generation:06d}.arrows"

    def row(self, name, **columns):
        stamped = {"seq": self.seq, "unix_s": 1000.0 + self.seq, **columns}
        self.seq += 1
        batch = pa.RecordBatch.from_pylist([stamped], schema=LAYOUTS[name])
        self.files[name].write(batch.serialize())

    def admit(self, group_id, rollout_ids, *, greedy_id=0, tokens=(1, 2), question="1+1=", position=0):
        self.row(
            "prompts",
            group_id=group_id,
            rollout_ids=rollout_ids,
            greedy_id=greedy_id,
            position=position,
            prompt_id=f"sums#{group_id}",
            tokens=tokens,
            payload=f'{{"question": "{question}", "answer": "2"}}',
        )
        for rollout_id in rollout_ids:
            self.state(rollout_id, "QUEUED", group_id=group_id)

    def segment(self, rollout_id, start, tokens, *, version=0, finish="", lease_id=1, logprob=-0.5):
        self.row(
            "segments",
            rollout_id=rollout_id,
            lease_id=lease_id,
            start=start,
            version=version,
            finish_reason=finish,
            tokens=list(tokens),
            logprobs=[logprob] * len(tokens),
        )

    def state(self, rollout_id, state, *, group_id=1, **columns):
        usual = {
            "version": 0,
            "lease_id": 0,
            "attempts": 0,
            "batch_id": 0,
            "engine_id": "",
            "reason": "",
            "reward": 0.0,
            "cost": 0.0,
        }
        self.row("states", rollout_id=rollout_id, group_id=group_id, state=state, **(usual | columns))

    def live(self, rollout_id, tokens, reward, *, group_id=1, version=0, step=None, engine="a-0"):
        """A leased, complete and scored rollout; trained where a step is given."""
        about = {"group_id": group_id, "engine_id": engine, "version": version}
        self.state(rollout_id, "LEASED", lease_id=rollout_id, **about)
        self.segment(rollout_id, 0, tokens, version=version, finish="stop", lease_id=rollout_id)
        self.state(rollout_id, "COMPLETE", lease_id=rollout_id, reason="stop", **about)
        self.state(rollout_id, "SCORED", lease_id=rollout_id, reward=reward, **about)
        if step is not None:
            self.state(rollout_id, "BATCHED", batch_id=step, **(about | {"version": step - 1}))
            self.state(rollout_id, "TRAINED", batch_id=step, **(about | {"version": step}))
