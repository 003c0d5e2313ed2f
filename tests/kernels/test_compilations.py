"""A new resolution, length or top-k runs the kernels that are compiled already."""

import compilations
import pytest
import torch
from wan_kernels import run_block

FIRST = 32760, 0.1  # tokens and top-k
LATER = [(75600, 0.1), (32760, 0.15), (1001, 0.05), (131072, 1.0)]
LONGEST = 147600  # of 161 frames at 1280 x 720
# Granularity and low bits, and the gradients of attention.
VARIANTS = [("rows", True), ("blocks", True), ("rows", False), ("training",)]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids="sm_{0[0]}{0[1]}".format)
def test_a_new_length_or_topk_compiles_nothing(capability):
    sizes = [FIRST, *LATER]
    runs = [(*size, *variant) for variant in VARIANTS for size in sizes]
    new = compilations.specializations(capability, runs)
    for start in range(0, len(runs), len(sizes)):
        first, *later = new[start : start + len(sizes)]
        assert first
        assert later == [[]] * len(LATER)


def test_one_kernel_more_selects_from_over_2048_key_blocks():
    runs = [(*FIRST, "rows"), (LONGEST, 0.1, "rows")]
    assert compilations.specializations((9, 0), runs)[1] == ["select_blocks_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["rows", "blocks"])
def test_a_gpu_compiles_nothing_for_a_new_length_or_topk(granularity):
    run_block(1560, 0.1, granularity, "cuda")
    with compilations.counted() as again:
        for length, topk in [(3600, 0.1), (1560, 0.5), (1001, 0.1)]:
            run_block(length, topk, granularity, "cuda")
    torch.cuda.synchronize()
    assert again == []


@pytest.mark.gpu
def test_a_gpu_compilation_is_counted():
    import triton

    @triton.jit
    def fresh_kernel(x):
        pass

    with compilations.counted() as names:
        fresh_kernel[(1,)](torch.zeros(1, device="cuda"))
    assert names == ["fresh_kernel"]
