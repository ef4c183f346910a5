"""The search: what fits, what a plan promises, and what more memory, faster GPUs and more of them do."""

import math

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asyncrl.learner.sharding_config import ShardingConfig
from asyncrl.recipes.gpus import GPUS, ClusterEntry, GPUConfig
from asyncrl.recipes.plan import PlanError, ask, make_plan
from asyncrl.recipes.plan_facts import Efficiency, Misfit, Workload
from asyncrl.recipes.plan_lengths import Lengths
from asyncrl.recipes.plan_memory import EngineFit, LearnerFit, fit_engine, fit_learner, most_slots
from asyncrl.recipes.plan_model import ModelShape
from asyncrl.recipes.plan_pacing import CHUNKS, WAITING, WORTH, share_out, solve, straggling
from asyncrl.recipes.plan_search import search
from asyncrl.recipes.plan_speed import EngineSpeed, learner_time

SETTINGS = settings(max_examples=25, deadline=None)
EFF = Efficiency()


def decoder(hidden=2048, layers=24, heads=16, kv_heads=4, vocabulary=100_000, experts=0):
    """A decoder like Qwen3, its parameters counted by hand; with `experts`, eight of them at work."""
    size, wide = hidden // heads, 4 * hidden
    attention = 2 * hidden * hidden + 2 * hidden * kv_heads * size
    feed = 3 * hidden * wide
    layer = attention + (experts * feed // 8 if experts else feed) + 2 * hidden
    table = vocabulary * hidden
    return ModelShape(
        name="decoder",
        parameters=layers * layer + 2 * table + hidden,
        expert_parameters=layers * experts * feed // 8 if experts else 0,
        embedding_parameters=table,
        head_parameters=table,
        tied=False,
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        vocabulary=vocabulary,
        intermediate_size=wide,
        experts=experts,
        experts_per_token=8 if experts else 0,
        largest_layer_parameters=layer,
    )


def work(mean=800.0, longest=4096, prompts=32, group=8, **more):
    return Workload(
        prompts_per_step=prompts,
        rollouts_per_prompt=group,
        prompt_tokens=200.0,
        mean_tokens=mean,
        max_tokens=longest,
        max_context_tokens=longest + 512,
        **more,
    )


def fleet(*parts):
    return [
        ClusterEntry(gpu_type=name, gpus_per_node=per_node, nodes=nodes) for name, per_node, nodes in parts
    ]


def question(cluster, model=None, load=None, staleness=4, rows=None, eff=EFF):
    return ask(model or decoder(), cluster, rows or {}, load or work(), eff, staleness)


def best_s(*arguments, **options):
    found = search(question(*arguments, **options))
    return found.outcomes[0].step_s if found.outcomes else math.inf


names = st.sampled_from(["H100", "A100-40G", "A100-80G", "L40S", "A10G", "T4", "H20"])
entries = st.builds(
    ClusterEntry, gpu_type=names, gpus_per_node=st.sampled_from([1, 2, 4, 8]), nodes=st.integers(1, 3)
)
models = st.builds(
    decoder,
    hidden=st.sampled_from([512, 1024, 2048, 4096]),
    layers=st.integers(4, 32),
    kv_heads=st.sampled_from([2, 4, 8, 16]),
    experts=st.sampled_from([0, 0, 32]),
)
loads = st.builds(
    work,
    mean=st.floats(50, 1900),
    longest=st.sampled_from([2000, 4096, 8192]),
    prompts=st.sampled_from([8, 64]),
    group=st.sampled_from([2, 8, 16]),
    minibatches_per_step=st.sampled_from([1, 2]),
)


# ---- memory ------------------------------------------------------------------------------------------------------------


@SETTINGS
@given(models, names, st.sampled_from([1, 2, 4, 8]), loads, st.floats(1, 4))
def test_more_memory_never_turns_a_shape_down(model, name, gpus, load, times):
    gpu = GPUS[name]
    larger = msgspec.structs.replace(gpu, memory_bytes=gpu.memory_bytes * times)
    engine, roomier = (fit_engine(model, name, g, gpus, load, EFF) for g in (gpu, larger))
    if isinstance(engine, EngineFit):
        assert isinstance(roomier, EngineFit)
        assert roomier.kv_tokens >= engine.kv_tokens and roomier.most_slots >= engine.most_slots
    learner, ampler = (fit_learner(model, name, g, gpus, load, EFF) for g in (gpu, larger))
    if isinstance(learner, LearnerFit):
        assert isinstance(ampler, LearnerFit)
        assert ampler.tokens_per_microbatch >= learner.tokens_per_microbatch


@SETTINGS
@given(models, names, loads, st.sampled_from([1, 2, 4]))
def test_a_misfit_lacks_what_it_says(model, name, load, gpus):
    """With so much more memory a GPU it fits, with a little less it does not."""
    for fit, kind, share in (
        (fit_engine, EngineFit, load.memory_fraction),
        (fit_learner, LearnerFit, EFF.learner_memory),
    ):
        found = fit(model, name, GPUS[name], gpus, load, EFF)
        if isinstance(found, kind) or found.lacking_bytes is None:
            continue
        block = 16 * model.kv_bytes_per_token("bfloat16")
        for more, fits in ((found.lacking_bytes + block, True), (found.lacking_bytes - block, False)):
            memory = GPUS[name].memory_bytes + more / share
            assert (
                isinstance(
                    fit(
                        model, name, msgspec.structs.replace(GPUS[name], memory_bytes=memory), gpus, load, EFF
                    ),
                    kind,
                )
                == fits
            )


def test_the_slots_of_an_engine_hold_their_rollouts():
    load = work()
    lengths, tokens = load.lengths, 400_000
    slots = most_slots(tokens, load)
    each = load.prompt_tokens + lengths.held_mean + 8
    room = tokens - slots * each - 2 * lengths.held_deviation * math.sqrt(slots)
    assert 0 <= room <= 2 * each


def test_numbers_are_named_where_a_shape_does_not_fit():
    big = decoder(hidden=8192, layers=80, heads=64, kv_heads=8)
    engine = fit_engine(big, "L4", GPUS["L4"], 1, work(), EFF)
    assert isinstance(engine, Misfit)
    assert f"weights {2 * big.parameters / 1e9:,.1f} GB" in engine.reason
    assert "> 0.85 x 24.0 GB = 20.4 GB" in engine.reason
    learner = fit_learner(big, "H100", GPUS["H100"], 8, work(), EFF)
    assert isinstance(learner, Misfit)
    assert f"state {2 * big.parameters / 1e9:,.1f} GB (16 bytes x" in learner.reason
    heads = fit_engine(decoder(heads=16), "H100", GPUS["H100"], 3, work(), EFF)
    assert isinstance(heads, Misfit) and "cannot share 16 attention heads" in heads.reason


def learner_with(ranks=8, load=None, **sharding):
    load = load or work(sharding=ShardingConfig(**sharding))
    model = decoder(hidden=4096, layers=32, heads=32, kv_heads=8)
    huge = msgspec.structs.replace(GPUS["H100"], memory_bytes=1e15)
    return fit_learner(model, "H100", huge, ranks, load, EFF)


def test_sharding_shows_in_the_memory():
    plain, two = learner_with(), learner_with(replicas=2)
    assert two.state_bytes == 2 * plain.state_bytes == learner_with(ranks=4).state_bytes
    assert learner_with(replicas=8).gathered_bytes == learner_with(ranks=1).gathered_bytes
    assert learner_with(reshard_after_forward=False).gathered_bytes > plain.gathered_bytes
    assert learner_with(activation_checkpointing="full").activation_bytes < plain.activation_bytes / 5
    assert learner_with(cpu_offload=True).state_bytes == 0
    assert learner_with(reduce_dtype="bfloat16").gathered_bytes < plain.gathered_bytes
    misfit = learner_with(replicas=3)
    assert (
        isinstance(misfit, Misfit)
        and misfit.reason == "learner.sharding.replicas = 3 does not divide 8 ranks"
    )


def test_computing_again_takes_a_third_more_and_replicas_spare_the_slow_link():
    model, entry = decoder(hidden=4096, layers=32, heads=32, kv_heads=8), fleet(("H100", 8, 2))[0]

    def time(**sharding):
        load = work(sharding=ShardingConfig(**sharding))
        fit = learner_with(16, load)
        return learner_time(
            model, entry, GPUS["H100"], 16, fit, load, EFF, wire_dtype="bfloat16", across_nodes=False
        )

    plain = time()
    assert 1.3 < time(activation_checkpointing="full").compute_s / plain.compute_s < 4 / 3
    assert time(replicas=2).traffic_s < plain.traffic_s / 2
    assert time(reshard_after_forward=False).traffic_s < plain.traffic_s


# ---- lengths -----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.floats(0.01, 0.97), st.integers(100, 40_000))
def test_lengths_have_the_mean_that_was_asked_for(share, longest):
    lengths = Lengths(share * longest, longest)
    assert lengths.mean == pytest.approx(share * longest, rel=0.01)
    assert lengths.mean / 2 <= lengths.held_mean * (1 + 1e-6)
    assert lengths.mean <= lengths.mean_of_longest(2) <= lengths.mean_of_longest(8) <= longest * (1 + 1e-9)
    met = float((lengths.residual_survival() * lengths.widths).sum())
    assert met == pytest.approx(lengths.held_mean)


def test_of_uniform_lengths_everything_is_known():
    lengths = Lengths(500, 1000)
    assert lengths.held_mean == pytest.approx(1000 / 3, rel=1e-3)
    assert lengths.mean_of_longest(9) == pytest.approx(900, rel=1e-3)
    with pytest.raises(ValueError, match=r"within 0\.\.10"):
        Lengths(11, 10)


# ---- speed -------------------------------------------------------------------------------------------------------------


def speed(model=None, gpu=GPUS["H100"], tensor_parallel=1, load=None, eff=EFF):
    model, load = model or decoder(), load or work()
    fit = fit_engine(model, "H100", gpu, tensor_parallel, load, eff)
    assert isinstance(fit, EngineFit)
    return EngineSpeed(model=model, gpu=gpu, tensor_parallel=tensor_parallel, fit=fit, work=load, eff=eff)


def test_one_rollout_decodes_at_the_speed_of_memory():
    """Weights once a token, by hand."""
    ideal = Efficiency(decode_bandwidth=1, decode_step_s=0, sequence_s=0)
    one = speed(eff=ideal)
    model = one.model
    read = 2 * (model.parameters - model.embedding_parameters) + 1000 * model.kv_bytes_per_token("bfloat16")
    assert one.decode_s(1, 1000) == pytest.approx(read / 3.35e12)


@SETTINGS
@given(models, loads, st.floats(1, 500), st.floats(1.01, 3))
def test_more_rollouts_take_longer_and_finish_sooner_together(model, load, rollouts, times):
    engine = EngineSpeed(
        model=model,
        gpu=GPUS["H20"],
        tensor_parallel=2,
        fit=EngineFit(
            dtype="bfloat16", weights_bytes=0, activation_bytes=0, kv_bytes=0, kv_tokens=0, most_slots=2000
        ),
        work=load,
        eff=EFF,
    )
    assert engine.step_s(rollouts * times) >= engine.step_s(rollouts)
    assert engine.rollouts_per_s(rollouts * times) >= engine.rollouts_per_s(rollouts) * (1 - 1e-9)


@SETTINGS
@given(loads, st.floats(4, 3000), st.integers(8, 512))
def test_a_batch_takes_at_least_its_share_of_the_steady_state(load, rollouts, slots):
    engine = speed(load=load)
    batch = engine.batch_s(rollouts, slots)
    assert batch > 0
    if rollouts > 4 * slots:
        steady = rollouts / engine.rollouts_per_s(slots)
        assert steady * 0.8 <= batch


# ---- sharing out -------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_sharing_out_is_exact(seed, pools):
    rng = np.random.default_rng(seed)
    curves = [np.concatenate([[0], np.cumsum(rng.random(CHUNKS))]) for _ in range(pools)]
    total, given_parts = share_out(curves)
    for j in (0, 1, 17, CHUNKS):
        assert sum(parts[j] for parts in given_parts) == j
        assert sum(c[parts[j]] for c, parts in zip(curves, given_parts, strict=True)) == pytest.approx(
            total[j]
        )
    if pools == 2:
        j = CHUNKS // 2
        assert total[j] == pytest.approx(max(curves[0][i] + curves[1][j - i] for i in range(j + 1)))


# ---- the search --------------------------------------------------------------------------------------------------------


@SETTINGS
@given(models, loads, st.lists(entries, min_size=1, max_size=2), st.integers(0, 5))
def test_a_plan_keeps_its_promises(model, load, cluster, staleness):
    q = question(cluster, model, load, staleness)
    for outcome in search(q).outcomes:
        split, used = outcome.split, [0] * len(cluster)
        used[split.entry] += split.ranks
        for pool, under_way in zip(split.pools, outcome.under_way, strict=True):
            used[pool.entry] += pool.gpus
            assert 0 <= under_way <= pool.slots
        assert all(n <= entry.gpus for n, entry in zip(used, cluster, strict=True))
        assert outcome.staleness <= staleness
        if outcome.staleness:
            assert outcome.step_s == pytest.approx(max(outcome.generate_s, split.time.total_s))
            held = sum(outcome.under_way) * straggling(load) / load.rollouts
            assert held + WAITING + split.time.total_s / outcome.step_s <= outcome.staleness + 1 + 1e-6
        else:
            assert outcome.step_s == outcome.synchronous_s
        assert outcome.step_s <= outcome.synchronous_s * (1 + WORTH)


@SETTINGS
@given(models, loads, st.lists(entries, min_size=1, max_size=2), entries)
def test_more_gpus_never_make_the_step_longer(model, load, cluster, more):
    grown = [msgspec.structs.replace(cluster[0], nodes=cluster[0].nodes + 1), *cluster[1:]]
    before = best_s(cluster, model, load)
    assume(math.isfinite(before))
    assert best_s(grown, model, load) <= before * (1 + WORTH)
    assert best_s([*cluster, more], model, load) <= before * (1 + WORTH)


@SETTINGS
@given(
    models,
    loads,
    entries,
    st.sampled_from(
        [
            "flops_per_s",
            "float32_flops_per_s",
            "memory_bytes",
            "memory_bytes_per_s",
            "node_link_bytes_per_s",
            "cluster_link_bytes_per_s",
        ]
    ),
)
def test_a_better_gpu_never_makes_the_step_longer(model, load, entry, field):
    better = {entry.gpu_type: GPUConfig(**{field: 1.5 * getattr(GPUS[entry.gpu_type], field)})}
    before = best_s([entry], model, load)
    assume(math.isfinite(before))
    assert best_s([entry], model, load, rows=better) <= before * (1 + WORTH)


@SETTINGS
@given(models, loads, entries, st.integers(0, 4))
def test_a_looser_bound_never_makes_the_step_longer(model, load, entry, staleness):
    """But for the parts that rollouts are shared out in, which are of another size then."""
    before = best_s([entry], model, load, staleness)
    assume(math.isfinite(before))
    assert best_s([entry], model, load, staleness + 1) <= before * (1 + WORTH) * 1.03


def test_no_engine_is_kept_that_a_slow_learner_leaves_idle():
    q = question(fleet(("H100", 8, 4)), load=work(mean=100, longest=512))
    for outcome in search(q).outcomes:
        if outcome.generate_s > outcome.split.time.total_s:
            continue
        for k, pool in enumerate(outcome.split.pools):
            if pool.engines == 1:
                continue
            fewer = list(outcome.split.pools)
            fewer[k] = msgspec.structs.replace(pool, engines=pool.engines - 1)
            again = solve(q, msgspec.structs.replace(outcome.split, pools=tuple(fewer)))
            assert again.step_s > outcome.step_s or again.staleness > outcome.staleness


def test_staleness_is_what_it_takes_and_no_more():
    plan = make_plan(question(fleet(("H100", 8, 2)), staleness=8))
    assert 1 <= plan.best.max_staleness_versions <= 8
    turns = make_plan(question(fleet(("H100", 8, 2)), staleness=0))
    assert turns.best.max_staleness_versions == 0
    assert turns.best.step_s == pytest.approx(turns.best.generate_s + turns.best.train_s)
    assert plan.best.step_s < turns.best.step_s


def test_mixed_pools_share_the_work():
    plan = make_plan(question(fleet(("H100", 8, 1), ("L40S", 4, 2)), decoder(layers=28), work(mean=2000)))
    assert {pool.gpu_type for pool in plan.best.pools} == {"H100", "L40S"}
    alone = make_plan(question(fleet(("H100", 8, 1)), decoder(layers=28), work(mean=2000)))
    assert plan.best.step_s < alone.best.step_s


def test_engines_stay_on_the_learners_node_where_the_network_is_slow():
    """A second node behind a thin link is worth nothing when sending a version to it takes longer than it saves."""
    model, load = decoder(layers=12), work(mean=20, longest=128, prompts=8)
    one, two = (make_plan(question(fleet(("A10G", 8, n)), model, load)).best for n in (1, 2))
    link = GPUS["A10G"].node_link_bytes_per_s * EFF.link
    shards = 4 * model.parameters * (one.learner.ranks - 1) / one.learner.ranks
    assert one.learner.publish_s == pytest.approx((shards + model.weight_bytes("bfloat16")) / link)
    assert two == one


def test_pools_are_not_mixed_where_that_doubles_the_bytes_of_a_version():
    """T4 has no bfloat16; with it beside others versions travel as float32."""
    model, load = decoder(layers=12), work(mean=100, longest=512)
    thin = {name: GPUConfig(cluster_link_bytes_per_s=0.5e9) for name in ("A10G", "T4")}
    cluster = fleet(("A10G", 2, 8))
    alone = make_plan(question(cluster, model, load, rows=thin)).best
    beside = make_plan(question([*cluster, *fleet(("T4", 8, 2))], model, load, rows=thin)).best
    assert len({pool.dtype for pool in beside.pools}) == 1
    assert beside.step_s <= alone.step_s


def test_a_gpu_without_bfloat16_generates_in_float16_and_trains_in_float32():
    plan = make_plan(
        question(fleet(("V100-32G", 8, 1)), decoder(hidden=512, layers=4), work(longest=1024, mean=300))
    )
    assert plan.best.learner.dtype == "float32"
    assert plan.best.pools[0].dtype == "float16"


def test_the_nearest_miss_is_named():
    big = decoder(hidden=8192, layers=80, heads=64, kv_heads=8)
    with pytest.raises(PlanError, match=r"Nearest miss: learner on 8 x H100 lacks [\d.]+ GB a GPU: state "):
        make_plan(question(fleet(("H100", 8, 1)), big))
    with pytest.raises(PlanError, match="A learner fits and an engine fits, but not both"):
        make_plan(question(fleet(("H100", 1, 1)), decoder(hidden=512, layers=4)))
    with pytest.raises(PlanError, match=r"describe it in \[gpus\.H900\]"):
        question(fleet(("H900", 8, 1)))
    with pytest.raises(PlanError, match="which GPUs are there"):
        question([])
