"""What holds for every test: one thread a process, and no chance that differs from run to run."""

import os

# The suite runs its processes side by side, and small tensors gain from no more threads than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", max_examples=50, derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded():
    """A model that a test builds starts at the same weights each time."""
    torch.manual_seed(0)
