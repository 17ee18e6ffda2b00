"""Covering arrays, against all whole rows that there are."""

from __future__ import annotations

from itertools import combinations, product

from covering import covering
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, list[int]], set[frozenset]]:
    """Up to five factors of up to four values, and items that exclude one another."""
    factors = {name: list(range(draw(st.integers(1, 4)))) for name in "abcde"[: draw(st.integers(2, 5))]}
    items = [(name, value) for name, values in factors.items() for value in values]
    pairs = [frozenset(pair) for pair in combinations(items, 2) if pair[0][0] != pair[1][0]]
    return factors, draw(st.sets(st.sampled_from(pairs), max_size=8)) if pairs else set()


@given(problems(), st.integers(2, 3))
def test_rows_have_exactly_what_whole_rows_can_have(problem, strength: int) -> None:
    factors, excluded = problem
    every = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]
    possible = [row for row in every if not any(frozenset(pair) in excluded for pair in combinations(row.items(), 2))]

    def tuples(rows: list[dict]) -> set[frozenset]:
        return {frozenset(some) for row in rows for some in combinations(row.items(), strength)}

    rows = covering(factors, lambda a, b: frozenset((a, b)) in excluded, strength)
    assert all(row in possible for row in rows)
    assert tuples(rows) == tuples(possible)


def test_there_are_few() -> None:
    factors = {name: list(range(4)) for name in "abcdefgh"}
    assert len(covering(factors, lambda a, b: False)) < 50  # of 65536; 16 is the least that any could be
