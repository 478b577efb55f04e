"""The prefix index against a list of texts: what it finds is what was put in, and no block is lost."""

import gc

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.prefix.index import Match, PrefixIndex, descendants

BLOCK, SPACES = 4, 2
texts = st.lists(st.integers(0, 1), min_size=1, max_size=18)


class Shelf:
    """An index over block spaces whose blocks remember the tokens that were written into them."""

    def __init__(self, num_blocks: int = 64) -> None:
        self.allocators = [BlockAllocator() for _ in range(SPACES)]
        for allocator in self.allocators:
            allocator.ensure_free(num_blocks)
        self.index = PrefixIndex(self.allocators, BLOCK)
        self.written: list[dict[int, list[int]]] = [{} for _ in range(SPACES)]

    def write(self, text: list[int]) -> list[BlockTable]:
        """Lay a text into new blocks, held by one table a space."""
        tables = []
        for allocator, written in zip(self.allocators, self.written, strict=True):
            table = BlockTable(allocator, BLOCK)
            table.reserve(1, len(text))
            for idx, block in enumerate(table.rows[0]):
                written[block] = text[idx * BLOCK : (idx + 1) * BLOCK]
            tables.append(table)
        return tables

    def put(self, text: list[int], key: str = "") -> int:
        """Write and insert a text, and let go of it."""
        tables = self.write(text)
        return self.index.insert(key, text, [table.rows[0] for table in tables])

    def spelled(self, match: Match) -> list[list[int]]:
        """The tokens of a match as the blocks of each space hold them."""
        blocks = [[node.blocks[space] for node in match.nodes] for space in range(SPACES)]
        read = ([token for b in row for token in self.written[space][b]] for space, row in enumerate(blocks))
        return [tokens[: match.length] for tokens in read]

    def check(self) -> None:
        """Every block is free or held as often as counted."""
        gc.collect()
        for allocator in self.allocators:
            allocator.check_integrity()


def longest(known: list[list[int]], text: list[int]) -> int:
    """The longest prefix of `text` that begins one of `known`."""
    return max((n for n in range(len(text) + 1) for other in known if other[:n] == text[:n]), default=0)


def test_a_match_ends_inside_a_block_where_the_texts_part() -> None:
    shelf = Shelf()
    shelf.put([1, 2, 3, 4, 5, 6, 7, 8, 9])
    match = shelf.index.match("", [1, 2, 3, 4, 5, 6, 0, 0, 0])
    assert match.length == 6
    assert shelf.spelled(match) == [[1, 2, 3, 4, 5, 6]] * SPACES


def test_texts_under_another_key_are_not_found() -> None:
    shelf = Shelf()
    shelf.put([1, 2, 3, 4, 5], key="mine")
    assert shelf.index.match("yours", [1, 2, 3, 4, 5]).length == 0


def test_tokens_of_equal_hash_are_told_apart() -> None:
    assert hash(-1) == hash(-2)
    shelf = Shelf()
    shelf.put([-1, -1, -1, -1])
    assert shelf.index.match("", [-2, -2, -2, -2]).length == 0


def test_a_text_that_goes_on_takes_the_place_of_its_half_full_end() -> None:
    shelf = Shelf()
    shelf.put([1, 2, 3, 4, 5])
    assert shelf.put([1, 2, 3, 4, 5, 6, 7]) == 1
    assert shelf.index.num_nodes == 2
    assert shelf.put([1, 2, 3, 4, 5, 6]) == 0
    shelf.check()


def test_the_least_recently_used_leaf_goes_first_and_parents_after_children() -> None:
    shelf = Shelf()
    shelf.put([1] * 8)
    shelf.put([2] * 4)
    shelf.put([3] * 4)
    for row, allocator in zip(shelf.index.take(shelf.index.match("", [1] * 8)), shelf.allocators, strict=True):
        allocator.release(row)
    gone = []
    for _ in range(4):
        assert shelf.index.evict(1) == 1
        gone.append([shelf.index.match("", [token] * 8).length for token in (1, 2, 3)])
    assert gone == [[8, 0, 4], [8, 0, 0], [4, 0, 0], [0, 0, 0]]
    assert (shelf.index.num_evicted, shelf.index.num_nodes) == (4, 0)
    shelf.check()


def test_held_and_pinned_blocks_outlive_an_eviction() -> None:
    shelf = Shelf()
    held = shelf.write([1] * 8)
    shelf.index.insert("", [1] * 8, [table.rows[0] for table in held])
    shelf.put([2] * 8)
    shelf.put([3] * 8)
    pinned = shelf.index.match("", [2] * 4)
    shelf.index.pin(pinned, 1)
    assert shelf.index.evict(99) == 3
    assert [shelf.index.match("", [token] * 8).length for token in (1, 2, 3)] == [8, 4, 0]
    shelf.index.pin(pinned, -1)
    del held
    shelf.check()
    assert shelf.index.evict(99) == 3


def test_clear_gives_back_all_but_what_rows_hold() -> None:
    shelf = Shelf()
    shelf.put([1] * 9)
    rows = shelf.index.take(shelf.index.match("", [1] * 6))
    for allocator in shelf.allocators:
        allocator.reclaim()
    shelf.index.clear()
    assert shelf.index.match("", [1] * 9).length == 0
    for allocator, row in zip(shelf.allocators, rows, strict=True):
        assert allocator.num_blocks - allocator.num_free == len(row) == 2
        allocator.release(row)
    shelf.check()


def test_blocks_that_move_stay_found() -> None:
    shelf = Shelf()
    held = shelf.write([9] * 4)
    shelf.put([1, 2, 3, 4, 5])
    before = shelf.spelled(shelf.index.match("", [1, 2, 3, 4, 5]))
    del held
    for space, allocator in enumerate(shelf.allocators):
        contents = {tuple(node.tokens): node for node in shelf.index.nodes()}
        allocator.relayout(allocator.num_blocks + 7)
        shelf.written[space] = {node.blocks[space]: list(tokens) for tokens, node in contents.items()}
    assert shelf.spelled(shelf.index.match("", [1, 2, 3, 4, 5])) == before
    shelf.check()


class IndexMachine(RuleBasedStateMachine):
    """Random operations; `known` is every text that was put in and has not been evicted since."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(num_blocks=900)
        self.known: list[tuple[str, list[int]]] = []
        self.held: list[tuple[list[list[int]], list[int]]] = []
        self.pinned: list[tuple[str, list[int]]] = []
        self.evicted = False

    @rule(text=texts, key=st.sampled_from("ab"))
    def put(self, text: list[int], key: str) -> None:
        self.shelf.put(text, key)
        self.known.append((key, text))

    @rule(text=texts, key=st.sampled_from("ab"), keep=st.booleans())
    def find(self, text: list[int], key: str, keep: bool) -> None:
        match = self.shelf.index.match(key, text)
        expected = longest([known for owner, known in self.known if owner == key], text)
        assert match.length <= expected
        assert match.length == expected or self.evicted
        assert self.shelf.spelled(match) == [text[: match.length]] * SPACES
        if keep and match.length:
            self.held.append((self.shelf.index.take(match), text[: match.length]))

    @rule(text=texts, key=st.sampled_from("ab"))
    def pin(self, text: list[int], key: str) -> None:
        match = self.shelf.index.match(key, text)
        self.shelf.index.pin(match, 1)
        self.pinned.append((key, text[: match.length]))

    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        self.evicted = self.shelf.index.evict(count) > 0 or self.evicted

    @rule()
    def let_go(self) -> None:
        if self.held:
            rows, _ = self.held.pop()
            for allocator, row in zip(self.shelf.allocators, rows, strict=True):
                allocator.release(row)

    @invariant()
    def what_is_held_or_pinned_is_there(self) -> None:
        for rows, text in self.held:
            for space, row in enumerate(rows):
                spelled = [token for block in row for token in self.shelf.written[space][block]]
                assert spelled[: len(text)] == text
        for key, text in self.pinned:
            assert self.shelf.index.match(key, text).length == len(text)

    @invariant()
    def what_could_be_evicted_is_counted(self) -> None:
        index = self.shelf.index
        for allocator in self.shelf.allocators:
            allocator.reclaim()
        free = [
            node
            for node in index.nodes()
            if not any(below.pins or index.is_held(below) for below in (node, *descendants(node)))
        ]
        assert index.num_evictable == len(free)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        for space, allocator in enumerate(self.shelf.allocators):
            in_tree = [node.blocks[space] for node in self.shelf.index.nodes()]
            in_rows = [block for rows, _ in self.held for block in rows[space]]
            assert len(in_tree) == len(set(in_tree)) == self.shelf.index.num_nodes
            allocator.reclaim()
            counts = [in_tree.count(b) + in_rows.count(b) for b in range(allocator.num_blocks)]
            assert allocator.refcounts == counts


def test_no_operation_sequence_loses_a_block_or_finds_a_wrong_token() -> None:
    case = IndexMachine.TestCase
    case.settings = settings(
        max_examples=20, stateful_step_count=40, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    case().runTest()


@pytest.mark.parametrize("length", range(1, 10))
def test_every_length_is_found_again_whole(length: int) -> None:
    shelf = Shelf()
    text = list(range(length))
    shelf.put(text)
    assert shelf.index.match("", [*text, 99]).length == length
