"""Rows of an array that stays in its file are those that numpy finds."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_arrays import arrays, write

from robust_accel.data.array_files import stored_array

ROWS = st.one_of(
    st.lists(st.integers(0, 29), max_size=40),  # in any order, some of them twice
    st.builds(lambda a, b: [*range(a, b)], st.integers(0, 29), st.integers(0, 30)),
)


@settings(max_examples=100, deadline=None)
@given(numbers=ROWS, kind=st.sampled_from(["u1", ">i2", "<f8", "?"]))
def test_rows_are_those_that_numpy_finds(numbers: list[int], kind: str) -> None:
    whole, asked = np.arange(30 * 5).reshape(30, 5).astype(kind), np.array(numbers, np.int64)
    with tempfile.TemporaryDirectory() as folder:
        array = stored_array(str(write(Path(folder), x=whole)), "x").open()
        array.soon(asked)
        found = array.rows(asked)
        assert found.dtype == whole.dtype
        assert np.array_equal(found, whole[asked])
        assert np.array_equal(array.whole(), whole)
        array.file.close()


@pytest.mark.parametrize("numbers", [[-1], [8], [0, 2**40]])
def test_there_are_no_rows_outside_of_an_array(tmp_path: Path, numbers: list[int]) -> None:
    """The file has more bytes, before and after it."""
    array = stored_array(str(write(tmp_path, **arrays(8))), "image").open()
    with pytest.raises(IndexError, match="has the rows 0 to 7"):
        array.rows(np.array(numbers))
