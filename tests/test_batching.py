"""Cutting a run into batches: consecutive, not too large, and of one length of prompt each."""

from hypothesis import given
from hypothesis import strategies as st

from ldm.batching import batches


def test_by_hand():
    assert batches([1] * 5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert batches([1, 1, 2, 2, 1], 16) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert batches([], 3) == []


@given(st.lists(st.integers(1, 3), max_size=20), st.integers(1, 6))
def test_every_image_once_in_order_and_in_the_fewest_batches(lengths, size):
    found = batches(lengths, size)
    assert [i for batch in found for i in range(batch.start, batch.stop)] == list(range(len(lengths)))
    for batch in found:
        assert 0 < batch.stop - batch.start <= size and len(set(lengths[batch])) == 1
    for first, second in zip(found, found[1:], strict=False):  # two neighbours could not be one
        assert first.stop - first.start == size or lengths[first.start] != lengths[second.start]
