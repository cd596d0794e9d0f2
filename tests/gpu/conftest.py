"""The card that the tests of this folder run on."""

import os
import sys

import pytest

from dejavu_utils import store

PRETENDED = "DEJAVU_PRETENDED_GPU"  # set: try the tests themselves, on tests/pretended_gpu.py

if os.environ.get(PRETENDED):
    sys.path.insert(0, str(store.PACKAGE.parent / "tests"))
    import pretended_gpu

    pretended_gpu.start()


@pytest.fixture
def device():
    """Return "cuda"; without a GPU the test is skipped."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return "cuda"
