"""One thread a process: the suite runs its processes side by side, and small tensors gain from no more."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
