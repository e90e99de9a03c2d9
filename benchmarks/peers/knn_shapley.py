"""`knn_values` beside pyDVL's KNNShapleyValuation: the same numbers, and CPU seconds of both in one run.

python -m venv pydvl && pydvl/bin/pip install pydvl==0.10.0
python benchmarks/peers/knn_shapley.py --pydvl-python pydvl/bin/python
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Flags:
    """Side by side with pyDVL, one thread each."""

    pydvl_python: Path
    """The interpreter of the environment that pyDVL is installed in."""
    n: int = 10_000
    """Training examples, of random features and ten labels."""
    t: int = 1_000
    """Targets."""
    d: int = 64
    """Features."""
    k: int = 5
    """Neighbours that vote."""


def main(flags: Flags) -> None:
    """Time both on the same arrays and compare the values."""
    from attribution_core import knn_values

    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(flags.n, flags.d)), "y": rng.integers(0, 10, flags.n),
        "target_x": rng.normal(size=(flags.t, flags.d)), "target_y": rng.integers(0, 10, flags.t),
    }  # fmt: skip
    start = time.process_time()
    ours = knn_values(**arrays, k=flags.k).scores.mean(1)
    seconds = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data.npz", Path(folder) / "out.npz"
        np.savez(data, **arrays)
        command = [flags.pydvl_python, HERE / "run_pydvl.py", data, out, str(flags.k)]
        subprocess.run(
            [str(word) for word in command], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        theirs = np.load(out)
        values, other = theirs["values"], float(theirs["seconds"])
    print(
        f"n={flags.n}, t={flags.t}, d={flags.d}, k={flags.k}: ours {seconds:.2f} CPU s, pyDVL {other:.2f} CPU s, "
        f"ratio {seconds / other:.3f}; largest difference {np.abs(ours - values).max():.1e}"
    )


if __name__ == "__main__":
    main(tyro.cli(Flags))
