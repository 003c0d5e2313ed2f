"""What the tests inside ComfyUI share."""

import goldens
import pytest
import torch


@pytest.fixture(scope="module", autouse=True)  # what runs after it is no longer in it
def inference_mode():
    """ComfyUI's executor runs every node inside torch.inference_mode()."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def paths(tmp_path_factory):
    """The golden checkpoints as files: INT8, then float."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return [str(goldens.unpack_checkpoint(name, folder)) for name in ("t2v-quant.pth", "t2v.pth")]
