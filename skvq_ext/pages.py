"""Host-side bookkeeping of one layer's pages: who owns which page of 64 packed tokens.

A packed page never changes, so sequences share pages: reordering beams or repeating a prompt copies
rows of the page table and counts owners, never bytes. A tile that is packed again after a rollback
goes to a fresh page, because its old page was let go by `truncate` and may still have other owners.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from skvq_ext.format import TILE_TOKENS

NO_PAGE = -1
_SMALLEST_STEP = 8


class PageChange(NamedTuple):
    """One entry of the page table that changed: table[row, tile] = page (or NO_PAGE)."""

    row: int
    tile: int
    page: int


def packed_tiles(kv_len: int, sinks: int, window: int) -> int:
    """Tiles that are packed once a sequence holds kv_len tokens (csrc/core/window.h)."""
    return max(0, kv_len - sinks - window) // TILE_TOKENS


def grown(present: int, needed: int) -> int:
    """The next size of something that holds `present` and must hold `needed`.

    Steps of 1/64 keep what is allocated within 2 % of what is used; small ones grow by 8.
    """
    if needed <= present:
        return present
    return max(needed, present + max(_SMALLEST_STEP, present // 64))


class PagePool:
    """Pages of one layer. Page ids are rows of the layer's `pages` tensor, tiles count from the
    first packed token of a sequence. The pool holds numbers only; it moves no bytes."""

    def __init__(self, batch_size: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(batch_size)]
        self._owners: list[int] = []
        self._free: list[int] = []

    @property
    def capacity(self) -> int:
        """Pages that exist."""
        return len(self._owners)

    @property
    def used(self) -> int:
        """Pages that have at least one owner."""
        return len(self._owners) - len(self._free)

    @property
    def rows(self) -> Sequence[Sequence[int]]:
        """Page of each tile of each sequence, NO_PAGE where it was let go."""
        return self._rows

    @property
    def tiles(self) -> list[int]:
        """Tiles of each sequence, those that were let go included."""
        return list(map(len, self._rows))

    def needed(self, tiles: Sequence[int]) -> int:
        """Capacity at which every sequence b can hold tiles[b] tiles."""
        new = sum(max(0, n - len(row)) for n, row in zip(tiles, self._rows, strict=True))
        return self.capacity + max(0, new - len(self._free))

    def grow(self, capacity: int) -> None:
        """Adds pages up to `capacity`; the lowest new id is handed out first."""
        added = range(len(self._owners), capacity)
        self._owners.extend(0 for _ in added)
        self._free[:0] = reversed(added)

    def extend(self, tiles: Sequence[int]) -> list[PageChange]:
        """Gives every sequence b a page for each tile below tiles[b] that never had one.

        Raises: RuntimeError when `grow` was not called before with what `needed` says.
        """
        if self.needed(tiles) > self.capacity:
            raise RuntimeError(
                f"{self.needed(tiles)} pages are needed and {self.capacity} exist; grow the pool."
            )
        changes = []
        for row, (count, pages) in enumerate(zip(tiles, self._rows, strict=True)):
            for tile in range(len(pages), count):
                page = self._free.pop()
                self._owners[page] = 1
                pages.append(page)
                changes.append(PageChange(row, tile, page))
        return changes

    def truncate(self, tiles: Sequence[int]) -> list[PageChange]:
        """Lets go of every tile of sequence b from tiles[b] on."""
        changes = []
        for row, (count, pages) in enumerate(zip(tiles, self._rows, strict=True)):
            for tile in range(count, len(pages)):
                self._let_go(pages[tile])
                changes.append(PageChange(row, tile, NO_PAGE))
            del pages[count:]
        return changes

    def recycle(self, tiles: Sequence[int]) -> list[PageChange]:
        """Lets go of every tile of sequence b below tiles[b], which no later query sees."""
        changes = []
        for row, (count, pages) in enumerate(zip(tiles, self._rows, strict=True)):
            tile = min(count, len(pages)) - 1
            while tile >= 0 and pages[tile] != NO_PAGE:  # what lies below is gone already
                self._let_go(pages[tile])
                pages[tile] = NO_PAGE
                changes.append(PageChange(row, tile, NO_PAGE))
                tile -= 1
        return changes

    def take(self, rows: Iterable[int]) -> None:
        """Makes sequence i a copy of the former sequence rows[i]; pages are shared."""
        self._rows = [list(self._rows[row]) for row in rows]
        owners = Counter(page for pages in self._rows for page in pages if page != NO_PAGE)
        self._owners = [owners[page] for page in range(self.capacity)]
        self._free = [page for page in reversed(range(self.capacity)) if not owners[page]]

    def _let_go(self, page: int) -> None:
        if page == NO_PAGE:
            return
        self._owners[page] -= 1
        if not self._owners[page]:
            self._free.append(page)
