"""Host-side bookkeeping of pages: ownership, sharing, growth."""

from __future__ import annotations

import random

import pytest

from skvq_ext.pages import NO_PAGE, PagePool, grown, packed_tiles


def owners(pool: PagePool) -> dict[int, int]:
    """How often each page stands in the rows."""
    counts: dict[int, int] = {}
    for row in pool.rows:
        for page in row:
            if page != NO_PAGE:
                counts[page] = counts.get(page, 0) + 1
    return counts


def extend(pool: PagePool, tiles: list[int]) -> list[tuple[int, int, int]]:
    pool.grow(grown(pool.capacity, pool.needed(tiles)))
    return [tuple(change) for change in pool.extend(tiles)]


def test_growth_stays_within_two_percent_of_what_is_used() -> None:
    size = 0
    for used in range(1, 20_000):
        size = grown(size, used)
        assert size - used <= max(8, used / 50)
    assert grown(100, 100) == 100 and grown(100, 7) == 100
    assert grown(0, 5000) == 5000, "a prompt gets what it needs at once"


@pytest.mark.parametrize(
    ("kv_len", "tiles"), [(0, 0), (132, 0), (133, 0), (196, 0), (197, 1), (260, 1), (261, 2)]
)
def test_packed_tiles_is_a_function_of_the_length(kv_len: int, tiles: int) -> None:
    assert packed_tiles(kv_len, sinks=5, window=128) == tiles


def test_pages_are_handed_out_once_and_used_again() -> None:
    pool = PagePool(2)
    assert extend(pool, [2, 1]) == [(0, 0, 0), (0, 1, 1), (1, 0, 2)]
    assert extend(pool, [2, 1]) == [], "tiles that have a page keep it"
    assert [tuple(c) for c in pool.truncate([1, 1])] == [(0, 1, NO_PAGE)]
    assert pool.used == 2
    assert extend(pool, [2, 1]) == [(0, 1, 1)]
    with pytest.raises(RuntimeError, match="10 pages are needed and 8 exist"):
        pool.extend([9, 0])


def test_shared_pages_live_until_their_last_owner_lets_go() -> None:
    pool = PagePool(1)
    extend(pool, [2])
    pool.take([0, 0, 0])
    assert pool.used == 2 and pool.rows == [[0, 1]] * 3
    pool.truncate([1, 2, 2])
    assert pool.used == 2, "two sequences still own page 1"
    fresh = extend(pool, [2, 2, 2])
    assert fresh == [(0, 1, 2)], "packing a tile again must not touch what others read"
    pool.take([0])
    assert pool.used == 2 and pool.rows == [[0, 2]]


def test_a_sliding_layer_uses_pages_again() -> None:
    pool = PagePool(1)
    for tiles in range(1, 200):
        pool.recycle([tiles - 3])
        extend(pool, [tiles])
    assert pool.used <= 4 and pool.capacity == 8
    assert pool.rows[0][-3:].count(NO_PAGE) == 0 and set(pool.rows[0][:-4]) == {NO_PAGE}


def test_random_operations_keep_the_books_straight() -> None:
    rng = random.Random(0)
    pool = PagePool(3)
    for _ in range(2000):
        tiles = [len(row) for row in pool.rows]
        match rng.randrange(5):
            case 0 | 1:
                extend(pool, [n + rng.randrange(3) for n in tiles])
            case 2:
                pool.truncate([max(0, n - rng.randrange(4)) for n in tiles])
            case 3:
                pool.recycle([rng.randrange(n + 1) for n in tiles])
            case 4:
                size = rng.randint(1, 4)
                pool.take([rng.randrange(len(tiles)) for _ in range(size)])
        counts = owners(pool)
        assert pool.used == len(counts) and pool._owners == [
            counts.get(page, 0) for page in range(pool.capacity)
        ]
        assert sorted([*pool._free, *counts]) == list(range(pool.capacity))
