"""kNN-Shapley by pyDVL, in an environment of its own: reads an npz of arrays, writes values and CPU seconds.

run_pydvl.py DATA.npz OUT.npz K
"""

import sys
import time

import numpy as np
from pydvl.valuation import Dataset, KNNShapleyValuation
from sklearn.neighbors import KNeighborsClassifier

held = np.load(sys.argv[1])
train, test = Dataset(held["x"], held["y"]), Dataset(held["target_x"], held["target_y"])
model = KNeighborsClassifier(n_neighbors=int(sys.argv[3]))
valuation = KNNShapleyValuation(model, test, progress=False)
start = time.process_time()
valuation.fit(train)
seconds = time.process_time() - start
result = valuation.result
np.savez(
    sys.argv[2],
    values=np.asarray(result.values, dtype=float)[np.argsort(result.indices)],
    seconds=seconds,
)
