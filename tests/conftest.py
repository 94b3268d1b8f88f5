"""What every test shares: one torch thread, one seed, fixed hypothesis examples, GPU tests only where a GPU is.

Statistical tests fix their seed and take as tolerance SE times the standard error that the test derives: a true
law fails by chance once in 150,000 comparisons, a wrong one fails always.
"""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the tensors are tiny, and other work runs beside the tests
settings.register_profile("course", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("course")


@pytest.fixture(autouse=True)
def _seeded():
    """A test that draws from torch's global generator does not depend on the tests before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
