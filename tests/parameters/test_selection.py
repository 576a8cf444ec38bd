"""Selections obey the algebra of masks, count exactly and survive their file."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selectune.errors import UserError
from selectune.parameters.selection import Part, Selection

SHAPE = (4, 6)
PARTS = st.one_of(
    st.just(Part(SHAPE)),
    st.sets(st.integers(0, 3), min_size=1).map(lambda i: Part(SHAPE, "rows", tuple(i))),
    st.sets(st.integers(0, 5), min_size=1).map(lambda i: Part(SHAPE, "columns", tuple(i))),
    st.sets(st.integers(0, 5), min_size=1).map(lambda i: Part(SHAPE, "blocks", tuple(i), 2)),
    st.sets(st.integers(0, 23), min_size=1).map(lambda i: Part(SHAPE, "elements", tuple(i))),
)
SELECTIONS = st.dictionaries(st.sampled_from(["a", "b", "c"]), PARTS).map(Selection)


def mask(selection, name):
    return selection.mask(name) if selection.covers(name) else torch.zeros(SHAPE, dtype=torch.bool)


@settings(max_examples=60, deadline=None)
@given(SELECTIONS, SELECTIONS)
def test_algebra(left, right):
    for name in "abc":
        assert torch.equal(mask(left | right, name), mask(left, name) | mask(right, name))
        assert torch.equal(mask(left & right, name), mask(left, name) & mask(right, name))
        assert torch.equal(mask(left - right, name), mask(left, name) & ~mask(right, name))
    assert (left | right) == (right | left)
    assert (left - left).count() == 0


@settings(max_examples=60, deadline=None)
@given(SELECTIONS)
def test_counts_are_those_of_the_masks_and_files_are_exact(tmp_path_factory, selection):
    assert selection.count() == sum(int(mask(selection, name).sum()) for name in "abc")
    file = tmp_path_factory.mktemp("selection") / "selection.safetensors"
    selection.save(file)
    loaded = Selection.load(file)
    assert loaded == selection and loaded.parts == dict(sorted(selection.parts.items()))


def test_selections_of_two_models_are_refused():
    one, two = (Selection({"weight": Part((side, 4), "rows", [0, 1])}) for side in (4, 8))
    for rule in (lambda: one | two, lambda: one & two, lambda: one - two):
        with pytest.raises(UserError, match="selections of one model"):
            rule()
