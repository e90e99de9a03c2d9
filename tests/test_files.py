"""attribution_core.disk.files: what is written is whole or as it was, whoever else writes there."""

import os

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from attribution_core.disk.files import write_array, write_arrays, write_parquet


def test_an_array_may_replace_the_file_that_it_is_a_map_of(tmp_path):
    path = tmp_path / "x.npy"
    write_array(path, np.arange(5))
    write_array(path, np.load(path, mmap_mode="r")[1:3])
    assert np.load(path).tolist() == [1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    class Unreadable:
        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("no array")

    path = tmp_path / "x.npz"
    write_arrays(path, a=np.arange(3))
    with pytest.raises(RuntimeError, match="no array"):
        write_arrays(path, a=np.arange(4), b=Unreadable())
    with np.load(path) as held:
        assert held["a"].tolist() == [0, 1, 2]
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_write_one_table_beside_each_other(tmp_path, monkeypatch):
    path, table, write = tmp_path / "x.parquet", pyarrow.table({"a": [1, 2]}), parquet.write_table

    def writing(made, part):
        write(made, part)
        if os.getpid() != 1:  # another process writes the same, before this one is through
            with monkeypatch.context() as other:
                other.setattr(os, "getpid", lambda: 1)
                write_parquet(path, table)

    monkeypatch.setattr(parquet, "write_table", writing)
    write_parquet(path, table)
    assert parquet.read_table(path).equals(table)
    assert list(tmp_path.iterdir()) == [path]
