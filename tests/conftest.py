"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def precision_as_it_was():
    """A command may choose another precision of matrix products for its process: the next test starts anew."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)
