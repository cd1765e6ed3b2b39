"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests.models import forget_captures

settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("default")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_torch() -> Iterator[None]:
    """No captures of earlier tests, whose number Dynamo limits, and the same random numbers every time."""
    forget_captures()
    torch.manual_seed(0)
    yield
    forget_captures()
