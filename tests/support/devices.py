"""Where kernel tests run: compiled on a GPU if there is one, else in Triton's interpreter."""

import pack  # noqa: F401
import pytest
import torch
from turbodiffusion_pack.kernels import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CARD = dispatch.capability(torch.device(DEVICE, 0))  # (0, 0) without a GPU

# The interpreter is wrong in bf16.
TRITON_DTYPES = (
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
)
LENGTHS = (1, 63, 64, 65, 127, 129, 672, 1000)
BATCHES = (1, 3)
