"""How many pieces are on their way to an engine, and which questions wait."""

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.weight_sync import chunks
from asyncrl.weight_sync.chunks import Get
from asyncrl.weight_sync.credit import HELD, PIECES, Credit


class Piece:
    done = False


def get(number):
    return Get(question=number, version=0, digest="d", start=0, size=1)


def answered(credit):
    """(engine, question) that are answered now, each with a piece."""
    found = []
    for engine, question in credit.granted():
        found.append((engine, question.question, piece := Piece()))
        credit.sent(engine, piece)
    return found


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_who_keeps_to_the_window_is_answered_in_order_and_never_refused_however_late_pieces_are_done(data):
    """Answers come at once; the word that a piece has left comes whenever it likes."""
    credit = Credit()
    asked, open_questions, late, got = 0, [], [], []
    for _ in range(data.draw(st.integers(1, 25))):
        while len(open_questions) < chunks.WINDOW:
            open_questions.append(asked)
            assert credit.ask(b"e", get(asked)) is None
            asked += 1
        if data.draw(st.booleans(), label="a new connection"):
            for number in open_questions:
                assert credit.ask(b"e", get(number)) is None, "asked again, it is held once"
        for _, number, piece in answered(credit):
            got.append(number)
            late.append(piece)
            open_questions.remove(number)
        for piece in late:
            piece.done = piece.done or data.draw(st.booleans())
        late = [piece for piece in late if not piece.done]
        assert len(late) <= PIECES
    for piece in late:
        piece.done = True
    got += [number for _, number, _ in answered(credit)]
    assert got == list(range(asked)) and not credit.holding


@given(st.lists(st.tuples(st.sampled_from((b"greedy", b"other")), st.integers(0, 200)), max_size=300))
def test_what_is_over_the_bound_is_refused_the_oldest_first_and_others_do_not_wait_for_it(asked):
    credit = Credit()
    given_out = {b"greedy": [], b"other": []}
    for engine, number in asked:
        held = list(credit._held.get(engine, {}))
        refused = credit.ask(engine, get(number))
        assert (refused is not None) == (len(held) == HELD and number not in held)
        assert refused is None or refused.question == held[0]
        for name, question, _ in answered(credit):
            given_out[name].append(question)
    for engine, numbers in given_out.items():
        wanted = [number for name, number in asked if name == engine]
        assert numbers == wanted[:PIECES], "none of it is done, so that is all"


def test_an_engine_that_is_gone_keeps_nothing():
    credit = Credit()
    for number in range(PIECES + 3):
        credit.ask(b"e", get(number))
        answered(credit)
    assert credit.holding
    credit.gone(b"e")
    assert not credit.holding
    credit.ask(b"e", get(99))
    assert [number for _, number, _ in answered(credit)] == [99]


def test_an_engine_that_turns_out_to_be_gone_is_asked_for_no_more():
    """Its connection broke while several of its questions waited: the first answer finds that out."""
    credit = Credit()
    for number in range(3):
        credit.ask(b"e", get(number))
    granted = credit.granted()
    next(granted)
    credit.gone(b"e")
    assert list(granted) == [] and not credit.holding
