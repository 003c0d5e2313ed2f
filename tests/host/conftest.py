"""What the tests inside ComfyUI share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def inference_mode():
    """ComfyUI's executor runs every node inside torch.inference_mode()."""
    with torch.inference_mode():
        yield
