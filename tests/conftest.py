"""What holds for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def process_as_it_was():
    """A command may choose threads and another precision of matrix products for its process: the next test starts anew."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)
