"""Every Triton kernel that is launched compiles for every card, fits it and spills nothing."""

import ast

import ahead_of_time
import pytest
import triton
from ahead_of_time import ADA, CARDS, HOPPER, SHARED_LIMIT, Compiled
from turbodiffusion_pack.kernels.dispatch import BY_MMA_SYNC

# Bytes: products and sums of a block fill 256 registers at 4 warps. At 8 warps nothing spills, and
# an H100 takes 1.1 to 1.4 times as long.
LINEAR_SPILLS = 128
# Two sums of 64 x 128 and two products of 64 x 64 leave a thread 63 registers at 4 warps.
KEY_GRADIENTS_SPILLS = 16
# All of this holds for the ptxas of Triton 3.8. The one of 3.6 spills 8 or 16 bytes more in kernels
# for sm_90, sm_100 and sm_120, cards that were new to it.
OLDER_COMPILERS_SPILLS = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else 64
# Around keys in int8, which only CUDA C++ takes.
BESIDE_CUDA = {"mean_of_some_kernel", "sampled_bound_kernel", "mend_values_kernel"}
TO_FP8 = "cvt.rn.satfinite.e4m3x2.f32"
INT8_PRODUCTS = ".s8.s8", "kind::i8"


@pytest.mark.parametrize("card", CARDS, ids="sm_{0[0]}{0[1]}".format)
def test_what_is_launched_fits_the_card(card):
    compiled = ahead_of_time.compile_for(card)
    in_cuda = card == HOPPER or card[0] in BY_MMA_SYNC
    assert {c.kernel for c in compiled} == _written() - (set() if in_cuda else BESIDE_CUDA)
    assert [c for c in compiled if c.shared > SHARED_LIMIT[card]] == []
    assert [c for c in compiled if c.spilled > _spills_measured(c, card)] == []
    # What is decorated so is launched with its arguments packed once.
    packed = _written("launched")
    assert [c for c in compiled if c.kernel in packed and c.by_triton] == []
    assert [c for c in compiled if c.kernel == "linear_kernel" and not _multiplies_int8(c)] == []
    # Rounded once: from float32, not by way of float16.
    conversions = {name for c in compiled for name in c.to_fp8}
    assert conversions == ({TO_FP8} if card >= ADA else set())


def _written(decorator: str = "triton.jit") -> set[str]:
    """Names of all functions called `*_kernel` that have this decorator: that Triton compiles."""
    files = (ahead_of_time.ROOT / "kernels").rglob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8")))]
    return {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any(ast.unparse(d).startswith(decorator) for d in node.decorator_list)
    }


def _spills_measured(compiled: Compiled, card) -> int:
    if card != HOPPER:
        return OLDER_COMPILERS_SPILLS
    by_kernel = {"key_gradients_kernel": KEY_GRADIENTS_SPILLS}
    if compiled.run == "blocks":
        by_kernel["linear_kernel"] = LINEAR_SPILLS
    return OLDER_COMPILERS_SPILLS + by_kernel.get(compiled.kernel, 0)


def _multiplies_int8(compiled: Compiled) -> bool:
    return any(kind in product for kind in INT8_PRODUCTS for product in compiled.matrix)
