"""Where kernel tests run: compiled on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter is wrong in bf16.
TRITON_DTYPES = (
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
)
LENGTHS = (1, 63, 64, 65, 127, 129, 672, 1000)
BATCHES = (1, 3)
