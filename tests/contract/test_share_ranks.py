"""2 and 4 learner ranks, each with its share of a version or with its rows for rank 0, and an engine in a process of its own: the
bytes are the full tensors', and whichever rank cannot begin or write, all raise and the next version goes through."""

from __future__ import annotations

import textwrap
from pathlib import Path

import msgspec
import pytest
from batches import write_folder
from rank_processes import run_ranks

RANK = textwrap.dedent(
    """
    import atexit, os, subprocess, sys, time
    from pathlib import Path
    import msgspec, torch
    from asyncrl.learner.config import LearnerConfig
    from asyncrl.learner.step import Learner
    from asyncrl.runtime.sending import Sender
    from asyncrl.weight_sync.config import WeightSyncConfig
    from asyncrl.weight_sync.hosts import this_host
    from asyncrl.weight_sync.pieces import whole
    from asyncrl.weight_sync.publisher import Publisher
    from asyncrl.weight_sync.share import ShareWriter
    from asyncrl.weight_sync.shm import slot_path

    folder, out, rank, ranks, address = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    senders, engine_script = sys.argv[6], sys.argv[7]
    config = LearnerConfig(device="cpu", ranks=ranks, start_timeout_s=60, step_timeout_s=40)
    learner = Learner(config, folder, 0.9, rank, ranks, address)
    plan = learner.plan(20_000, "bfloat16", senders)
    run_id = f"test-share-{address.rpartition(':')[2]}"
    writer = engine = None
    if rank == 0:
        writer = Publisher(WeightSyncConfig(timeout_s=30.0), run_id, plan, ranks=learner.ranks)
        engine = subprocess.Popen([sys.executable, engine_script, writer.endpoint, "engine"], stdout=subprocess.DEVNULL)
        atexit.register(engine.kill)  # where an assertion fails
        atexit.register(writer.close)
        writer.wait_for_engines({"engine"}, 60)
    elif senders == "all":
        writer = ShareWriter(plan, learner.ranks, this_host())
    sender = Sender(learner, plan, writer, 30.0)
    told = []

    def masters():
        return {n.removeprefix("lm."): p.detach().full_tensor() for n, p in learner._policy.named_parameters()}

    def send(version):
        with torch.no_grad():
            for parameter in learner._policy.parameters():
                parameter.to_local().add_(0.125 * version)
        began = time.monotonic()
        try:
            report = sender.send(version, None)
            told.append(["sent"])
        except Exception as error:
            told.append([type(error).__name__, str(error)])
        took = time.monotonic() - began
        assert took < 20, took  # nobody waited for the process group's timeout
        want = masters()
        if rank == 0 and told[-1] == ["sent"]:
            assert report.engines["engine"].outcome == "applied", report
            data = torch.from_file(str(slot_path(run_id, sent.pop() if sent else 0)), size=plan.total_bytes, dtype=torch.uint8)
            for spec in plan.tensors:
                assert torch.equal(whole(data, spec), want[spec.name].to(torch.bfloat16)), spec.name

    sent = []
    def failing(method, bucket=None):
        plain = getattr(writer, method)
        def fail(*arguments):
            if bucket is None or arguments[0].index == bucket:
                setattr(writer, method, plain)
                raise OSError(f"disk on fire in {method} of rank {rank}")
            plain(*arguments)
        setattr(writer, method, fail)

    for version in range(4):  # both files, twice
        sent = [version % 2]
        send(version)
    if rank == 0:
        failing("write", plan.of(0)[1].index)
    send(4)
    if rank == ranks - 1 and writer is not None:
        failing("write", plan.of(rank)[0].index)
        sent = [0]
    elif rank == 0:
        sent = [0]  # where one rank sends, nothing fails this time
    send(5)
    # Rank 0 cannot begin.
    sent = []
    if rank == 0:
        failing("_begin")
    send(6)
    sent = [(4 + (senders == "one")) % 2]
    if rank == 0:
        writer._slots.oldest.retire()  # the file is another one, of the same name
    send(7)
    (out / f"told-{rank}").write_bytes(msgspec.json.encode(told))
    if writer is not None:
        writer.close()
    if engine is not None:
        engine.kill()
        engine.wait(timeout=10)
    learner.close()
    os._exit(0)  # past a thread of torch's that can abort the process on the way out of the interpreter
    """
)
ENGINE = Path(__file__).parents[1] / "unit" / "weight_sync" / "engine_process.py"


@pytest.mark.parametrize(("ranks", "senders"), [(2, "all"), (4, "all"), (2, "one")])
def test_ranks_send_together_and_fail_together(tmp_path: Path, ranks: int, senders: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder)
    run_ranks(RANK, folder, tmp_path / "out", ranks, senders, str(ENGINE), groups=1)
    told = [msgspec.json.decode((tmp_path / "out" / f"told-{rank}").read_bytes()) for rank in range(ranks)]
    last = ranks - 1
    for rank, mine in enumerate(told):
        assert mine[:4] == [["sent"]] * 4 and mine[7] == ["sent"]
        for version, culprit, method in ((4, 0, "write"), (5, last, "write"), (6, 0, "_begin")):
            if senders == "one" and culprit == last:
                assert mine[version] == ["sent"]  # it has nothing to write
                continue
            kind, text = mine[version]
            assert kind == ("OSError" if rank == culprit else "WeightSyncError")
            assert f"disk on fire in {method} of rank {culprit}" in text
            assert rank == culprit or f"rank {culprit}: OSError" in text or "could not begin" in text
