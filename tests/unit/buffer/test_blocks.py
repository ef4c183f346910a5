"""Where tokens lie: in memory up to a budget, else in the file, and they read the same."""

import numpy as np
import pytest

from asyncrl.buffer.blocks import Blocks, Piece
from asyncrl.buffer.log import Sealed


class Files:
    """Messages of `count` tokens and as many logprobs, each put into a file and into blocks."""

    def __init__(self, folder, budget):
        self.folder, self.sizes = folder, {}
        self.blocks = Blocks(budget, lambda generation: folder / str(generation))

    def message(self, first, count, generation=1):
        """(block, its one piece). The tokens count from `first`."""
        tokens = np.arange(first, first + count, dtype=np.int32)
        logprobs = -tokens.astype(np.float32) / 4
        data = b"head" + tokens.tobytes() + logprobs.tobytes()
        path = self.folder / str(generation)
        start = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(data)
        sealed = Sealed(start + 4, start + 4 + 4 * count, tokens, logprobs)
        block = self.blocks.add(generation, sealed)
        block.pieces += 1
        return block, Piece(block, sealed.tokens_at, sealed.logprobs_at, count, 0)

    def reads(self, piece, first):
        expected = np.arange(first, first + piece.length, dtype=np.int32)
        tokens, logprobs = self.blocks.tokens(piece), self.blocks.logprobs(piece)
        assert tokens.dtype == np.int32 and logprobs.dtype == np.float32
        assert tokens.tolist() == expected.tolist() and (logprobs == -expected / 4).all()


def sizes(blocks):
    return blocks.bytes_in_memory, blocks.bytes_spilled


def test_a_block_stays_in_memory_within_the_budget(tmp_path):
    files = Files(tmp_path, 1000)
    block, piece = files.message(5, 10)
    assert sizes(files.blocks) == (80, 0) and not files.blocks.is_full
    files.blocks.written()
    assert block.memory is not None and sizes(files.blocks) == (80, 0)
    files.reads(piece, 5)


def test_past_the_budget_the_newest_blocks_are_read_from_the_file(tmp_path):
    files = Files(tmp_path, 100)
    (one, first), (two, second), (three, third) = (files.message(100 * n, 10) for n in range(3))
    assert sizes(files.blocks) == (240, 0)  # not written yet: nobody can read them from the file
    files.blocks.written()
    assert [b.memory is None for b in (one, two, three)] == [False, True, True]
    assert sizes(files.blocks) == (80, 160) and files.blocks.is_full
    for n, piece in enumerate((first, second, third)):
        files.reads(piece, 100 * n)


def test_what_was_written_before_is_not_spilled_for_what_comes(tmp_path):
    files = Files(tmp_path, 100)
    one, _ = files.message(0, 10)
    files.blocks.written()
    two, piece = files.message(50, 10)
    files.blocks.written()
    assert one.memory is not None and two.memory is None
    files.reads(piece, 50)


def test_no_more_is_spilled_than_needed(tmp_path):
    files = Files(tmp_path, 170)
    blocks = [files.message(0, 10)[0] for _ in range(3)]
    files.blocks.written()
    assert [b.memory is None for b in blocks] == [False, False, True]


def test_a_released_block_counts_no_more(tmp_path):
    files = Files(tmp_path, 100)
    (_, kept), (_, spilled), (two_pieces, piece) = (files.message(0, 10) for _ in range(3))
    two_pieces.pieces += 1
    files.blocks.written()
    files.blocks.release(spilled)
    assert sizes(files.blocks) == (80, 80)
    files.blocks.release(piece)
    assert sizes(files.blocks) == (80, 80)  # a piece of it lives
    files.blocks.release(piece)
    files.blocks.release(kept)
    assert sizes(files.blocks) == (0, 0) and not files.blocks.is_full


def test_a_block_that_was_released_before_it_was_written_is_not_spilled(tmp_path):
    files = Files(tmp_path, 1)
    block, piece = files.message(0, 10)
    files.blocks.release(piece)
    files.blocks.written()
    assert sizes(files.blocks) == (0, 0) and block.memory is None


def test_a_block_on_disk_grows_by_its_pieces(tmp_path):
    files = Files(tmp_path, 100)
    block = files.blocks.on_disk(1, 0)
    files.blocks.grow(block, 80)
    files.blocks.grow(block, 40)
    assert (block.nbytes, sizes(files.blocks)) == (120, (0, 120)) and files.blocks.is_full


def test_a_file_that_grew_is_mapped_anew(tmp_path):
    files = Files(tmp_path, 1)
    _, first = files.message(0, 10)
    files.blocks.written()
    files.reads(first, 0)
    held = files.blocks.tokens(first)
    _, second = files.message(70, 2000)
    files.blocks.written()
    files.reads(second, 70)
    files.reads(first, 0)
    assert held.tolist() == list(range(10))  # views outlive the map that they came from


def test_each_generation_has_its_file(tmp_path):
    files = Files(tmp_path, 1)
    pieces = [files.message(10 * n, 3, generation=n)[1] for n in (1, 2)]
    files.blocks.written()
    for n, piece in zip((1, 2), pieces, strict=True):
        files.reads(piece, 10 * n)


def test_pages_that_were_given_back_and_maps_that_were_forgotten_are_read_again(tmp_path):
    files = Files(tmp_path, 1)
    _, piece = files.message(3, 10)
    files.blocks.written()
    for forget in (files.blocks.give_back, files.blocks.forget_files):
        files.reads(piece, 3)
        held = files.blocks.tokens(piece)
        forget()
        assert held.tolist() == list(range(3, 13))
        files.reads(piece, 3)


def test_a_file_that_is_too_short_is_no_answer(tmp_path):
    files = Files(tmp_path, 1)
    _, piece = files.message(0, 10)
    files.blocks.written()
    (tmp_path / "1").write_bytes(b"head")
    with pytest.raises(ValueError, match="buffer"):
        files.blocks.tokens(piece)
