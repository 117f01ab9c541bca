"""Truncation of pairs."""

import hypothesis
from hypothesis import strategies as st

from zoo.data.truncation import longest_first


@hypothesis.given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 40))
def test_longest_first_equals_popping_one_by_one(first, second, budget):
    a, b = first, second
    while a + b > budget:
        if a > b:
            a -= 1
        else:
            b -= 1
    assert longest_first(first, second, budget) == (a, b)
