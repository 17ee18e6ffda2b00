"""Covering arrays: few rows that have every pair (or three) of values of different factors, as tests need them.

Greedy, as AETG is (Cohen et al. 1997, doi 10.1109/32.605761): a row begins with values that no row before has together,
and takes from each further factor the value that adds most. Libraries for this look at pairs that exclude one another
only while a row is filled, and may leave out pairs that are allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import combinations, product

Item = tuple[str, Hashable]  # a factor, and one of its values
Row = dict[str, Hashable]


def covering(
    factors: Mapping[str, Sequence[Hashable]], refused: Callable[[Item, Item], bool], strength: int = 2
) -> list[Row]:
    """Rows with a value of each factor, none with two items that refuse one another.

    Args:
        factors: the values of each.
        refused: whether two items cannot be in one row; symmetric.
        strength: how many items the rows have together, in all ways that some whole row can have them.
    """
    names = sorted(factors, key=lambda name: -len(factors[name]))
    items: list[Item] = [(name, value) for name in names for value in factors[name]]
    clashes: dict[Item, set[Item]] = {item: set() for item in items}
    for a, b in combinations(items, 2):
        if a[0] != b[0] and refused(a, b):
            clashes[a].add(b)
            clashes[b].add(a)

    def completed(row: Row) -> Row | None:
        """A whole row with these items, which go together; None if there is none."""
        name = next((name for name in names if name not in row), None)
        if name is None:
            return row
        fitting = (v for v in factors[name] if clashes[name, v].isdisjoint(row.items()))
        return next((whole for value in fitting if (whole := completed({**row, name: value}))), None)

    def is_allowed(row: Row) -> bool:
        return all(clashes[item].isdisjoint(row.items()) for item in row.items()) and completed(row) is not None

    def added(row: Row, item: Item) -> int:
        """How many new tuples a row has with one more item."""
        return sum(frozenset((item, *rest)) in left for rest in combinations(row.items(), strength - 1))

    together = (tuple_ for some in combinations(names, strength) for tuple_ in product(*(_items(factors, some))))
    left = dict.fromkeys(frozenset(tuple_) for tuple_ in together if is_allowed(dict(tuple_)))
    rows = []
    while left:
        row: Row = dict(next(iter(left)))
        for name in (name for name in names if name not in row):
            allowed = [value for value in factors[name] if is_allowed({**row, name: value})]
            row[name] = max(allowed, key=lambda value: added(row, (name, value)))
        rows.append({name: row[name] for name in factors})
        for tuple_ in combinations(row.items(), strength):
            left.pop(frozenset(tuple_), None)
    return rows


def _items(factors: Mapping[str, Sequence[Hashable]], names: Sequence[str]) -> list[list[Item]]:
    return [[(name, value) for value in factors[name]] for name in names]
