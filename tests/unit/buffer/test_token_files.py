"""Where tokens lie: in the log's files, of which so many bytes are held as live rollouts need."""

from pathlib import Path

import numpy as np
import pytest

from asyncrl.buffer.token_files import Piece, TokenFiles

MAPS = Path("/proc/self/maps")


class Written:
    """Messages of `count` tokens and as many logprobs, each put into a file of its generation."""

    def __init__(self, folder, budget=2**20):
        self.folder = folder
        self.files = TokenFiles(budget, lambda generation: folder / str(generation))

    def message(self, first, count, generation=1):
        """Its one piece. The tokens count from `first`."""
        tokens = np.arange(first, first + count, dtype=np.int32)
        path = self.folder / str(generation)
        start = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(b"head" + tokens.tobytes() + (-tokens.astype(np.float32) / 4).tobytes())
        piece = Piece(generation, start + 4, start + 4 + 4 * count, count, 0)
        self.files.hold(piece)
        return piece

    def reads(self, piece, first):
        expected = np.arange(first, first + piece.length, dtype=np.int32)
        tokens, logprobs = self.files.tokens(piece), self.files.logprobs(piece)
        assert tokens.dtype == np.int32 and logprobs.dtype == np.float32
        assert tokens.tolist() == expected.tolist() and (logprobs == -expected / 4).all()


def test_a_piece_is_read_from_its_place(tmp_path):
    written = Written(tmp_path)
    pieces = [written.message(100 * n, 10) for n in range(3)]
    for n in (1, 0, 2):
        written.reads(pieces[n], 100 * n)


def test_a_part_of_a_message_is_a_piece_too(tmp_path):
    written = Written(tmp_path)
    whole = written.message(50, 10)
    part = whole._replace(tokens_at=whole.tokens_at + 12, logprobs_at=whole.logprobs_at + 12, length=4)
    written.reads(part, 53)


def test_what_live_rollouts_have_is_counted_and_full_at_the_budget(tmp_path):
    written = Written(tmp_path, budget=200)
    one, two = written.message(0, 10), written.message(0, 14)
    assert written.files.held_bytes == 192 and not written.files.is_full
    three = written.message(0, 1)
    assert written.files.held_bytes == 200 and written.files.is_full
    written.files.release(two)
    assert written.files.held_bytes == 88 and not written.files.is_full
    written.files.release(one)
    written.files.release(three)
    assert written.files.held_bytes == 0


def test_a_file_that_grew_is_mapped_anew(tmp_path):
    written = Written(tmp_path)
    first = written.message(0, 10)
    written.reads(first, 0)
    held = written.files.tokens(first)
    second = written.message(70, 2000)
    written.reads(second, 70)
    written.reads(first, 0)
    assert held.tolist() == list(range(10))  # views outlive the map that they came from


def test_each_generation_has_its_file(tmp_path):
    written = Written(tmp_path)
    pieces = [written.message(10 * n, 3, generation=n) for n in (1, 2)]
    for n, piece in zip((1, 2), pieces, strict=True):
        written.reads(piece, 10 * n)


def test_pages_that_were_given_back_are_read_again(tmp_path):
    written = Written(tmp_path)
    piece = written.message(3, 10)
    written.reads(piece, 3)
    held = written.files.tokens(piece)
    written.files.give_back()
    assert held.tolist() == list(range(3, 13))
    written.reads(piece, 3)


def test_a_file_that_is_forgotten_is_not_mapped_any_more(tmp_path):
    """While it is, its room on the disk is not given back."""
    written = Written(tmp_path)
    one, two = written.message(3, 10), written.message(5, 10, generation=2)
    written.reads(one, 3)
    written.reads(two, 5)
    (tmp_path / "1").unlink()
    mapped = (tmp_path / "1").as_posix()
    assert mapped in MAPS.read_text()
    written.files.forget_file(1)
    assert mapped not in MAPS.read_text()
    written.files.forget_file(7)  # never was
    written.reads(two, 5)


def test_a_file_that_is_too_short_is_no_answer(tmp_path):
    written = Written(tmp_path)
    piece = written.message(0, 10)
    (tmp_path / "1").write_bytes(b"head")
    with pytest.raises(ValueError, match="buffer"):
        written.files.tokens(piece)
