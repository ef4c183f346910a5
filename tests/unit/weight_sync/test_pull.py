"""Which bytes an engine asks for: all of them, each until it came, within its credit."""

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weight_sync import chunks
from asyncrl.weight_sync.chunks import Find, Found, Get
from asyncrl.weight_sync.opened import item_bytes
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.pull import Pull
from tests.chunk_worlds import small_plan


@given(data=st.data(), senders=st.integers(1, 3), based=st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_byte_is_asked_for_until_it_came(data, senders, based):
    plan = small_plan(tensors=4, elements=data.draw(st.integers(1, 3000)), bucket_bytes=2048, senders=senders)
    pull = Pull(plan, [0] * len(plan.buckets), 3, (2, "before") if based else None)
    open_questions, answered, settled, came = [], [], {}, bytearray(plan.total_bytes)
    largest = max(bucket.size for bucket in plan.buckets)
    for _ in range(10_000):
        if pull.done:
            break
        open_questions += list(pull.questions())
        assert len(open_questions) <= chunks.WINDOW
        assert sorted(each.question for each in pull.again()) == sorted(e.question for e in open_questions)
        question = open_questions.pop(data.draw(st.integers(0, len(open_questions) - 1)))
        if isinstance(question, Find):
            size = plan.buckets[question.bucket].size
            length = data.draw(st.sampled_from((0, 1, size // 2, size + 1)))
            pull.found(Found(question=question.question, delta_bytes=length))
            continue
        assert pull.arrived(question.question, question.size + 1) is None
        arrival = pull.arrived(question.question, question.size)
        assert pull.arrived(question.question, question.size) is None, "what came must not count twice"
        answered.append(question)
        assert (arrival.start, arrival.delta) == (question.start, question.delta >= 0)
        under_way = sum(
            plan.buckets[index].size for index in {q.delta for q in answered if q.delta >= 0} - settled.keys()
        )
        assert under_way <= 2 * largest
        if not arrival.delta:
            came[arrival.start : arrival.start + arrival.size] = b"\1" * arrival.size
        if arrival.complete:
            if arrival.delta and data.draw(st.booleans(), label="the delta does not fit"):
                pull.in_full(arrival.bucket)
            else:
                settled[arrival.bucket] = arrival.delta
                pull.settled(arrival.bucket)
    assert pull.done and not list(pull.questions()) and not pull.again()
    assert sorted(settled) == [bucket.index for bucket in plan.buckets if bucket.size]
    for bucket in plan.buckets:
        whole = all(set(came[run.offset : run.offset + run.size]) <= {1} for run in bucket.runs)
        assert settled.get(bucket.index) or whole
    assert len({(q.delta, q.start) for q in answered}) == len(answered), "no range is asked for twice"


def test_a_large_bucket_comes_in_chunks_and_a_small_one_after_it_is_not_held_up():
    big = 4 * chunks.CHUNK_BYTES
    plan = make_plan([("big", "float32", (chunks.CHUNK_BYTES,)), ("small", "float32", (16,))], big)
    pull = Pull(plan, [0] * len(plan.buckets), 0, None)
    asked = list(pull.questions())
    assert all(isinstance(question, Get) for question in asked)
    assert [(question.start, question.size) for question in asked] == [
        *((start, chunks.CHUNK_BYTES) for start in range(0, big, chunks.CHUNK_BYTES)),
        (big, 64),
    ]


def test_tensors_of_no_elements_need_no_question():
    plan = make_plan([("none", "float32", (0,))], 4096)
    pull = Pull(plan, [0] * len(plan.buckets), 0, None)
    assert not list(pull.questions()) and pull.done


def test_a_delta_looks_at_the_narrowest_items_of_its_bucket():
    plan = make_plan([("a", "float32", (8,)), ("b", "bfloat16", (7,))], 4096)
    assert item_bytes(plan, plan.buckets[0]) == 2
    assert all(run.size % 2 == 0 for run in plan.buckets[0].runs)
