"""attribution_core.processes: two processes compute what one does, each its own share."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from attribution_core.processes import (
    collect,
    from_first,
    my_rows,
    sum_all,
    sum_over_processes,
    wait,
    world,
)
from tests import menagerie, two_processes


@pytest.mark.filterwarnings("ignore::attribution_core.MetagradientWarning")
def test_two_processes_are_one(tmp_path):
    """By torchrun and gloo, on everything in tests/two_processes.py."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    launched = subprocess.run(
        [*launch, "tests/two_processes.py", str(tmp_path / "two")],
        cwd=menagerie.ROOT,
        env={**os.environ, "PYTHONPATH": str(menagerie.ROOT), "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    one = two_processes.everything(tmp_path / "one")
    ranks = [dict(np.load(tmp_path / "two" / f"{rank}.npz")) for rank in (0, 1)]
    # a store begun by two and finished by one: sums of two round otherwise, it is the same run
    store = tmp_path / "two" / "store-hessian"
    np.lib.format.open_memmap(store / "done.npy", mode="r+")[2:4] = 0
    shutil.copytree(store, tmp_path / "both" / "store-hessian")
    both = two_processes.everything(tmp_path / "both")["store hessian"]
    np.testing.assert_array_equal(both, ranks[0]["store hessian"])
    for name, expected in one.items():
        if name.startswith("own: "):  # shares that make the whole, none done twice
            shares = [held[name] for held in ranks]
            np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.sort(expected))
            assert min(len(share) for share in shares) > 0
            continue
        # scores in a store are kept in float32: rounding of 6e-8
        tolerance = 1e-6 if name.startswith("store") else 1e-10
        for held in ranks:
            np.testing.assert_allclose(
                held[name], expected, rtol=tolerance, atol=1e-10, err_msg=name
            )


@pytest.mark.parametrize("value", [3, "text", np.arange(3)])
def test_one_process_is_all_there_is(value):
    assert world() == (0, 1)
    assert from_first(value) is value
    rows, tensor = np.arange(5), torch.ones(5, 2)
    np.testing.assert_array_equal(my_rows(rows), rows)
    assert sum_over_processes(tensor) is tensor
    assert sum_all([tensor])[0] is tensor
    assert collect(tensor) is tensor
    wait()
