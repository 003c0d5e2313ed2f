"""The kernel specialisations that ship: what tests/kernels/test_ahead_of_time.py compiles.

One function per op, listed in OPS at the end. Launch configurations come from the ops themselves.
"""

import functools

import torch
from ahead_of_time import Variant, variants_of
from turbodiffusion_pack.kernels.int8_linear import triton as int8_linear
from turbodiffusion_pack.kernels.int8_quant import triton as int8_quant
from turbodiffusion_pack.kernels.norm import triton as norm
from turbodiffusion_pack.kernels.rope import triton as rope

OUT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def int8_quant_variants() -> list[Variant]:
    signature = {
        "x_ptr": "*bf16:16",
        "q_ptr": "*i8:16",
        "scale_ptr": "*fp32:16",
        "rows": "i32",
        "columns": "i32:16",
        "stride_b": "i32:16",
        "stride_r": "i32:16",
    }
    launches = (
        (int8_quant.quantize_blocks_kernel, int8_quant.BLOCKS_LAUNCH),
        (int8_quant.quantize_rows_kernel, int8_quant.ROWS_LAUNCH),
    )
    return [
        variant
        for kernel, launch in launches
        for variant in variants_of(kernel, signature, {"stride_c": 1}, lambda _, to=launch: to)
    ]


def int8_linear_variants() -> list[Variant]:
    variants = []
    for name, dtype in OUT_DTYPES.items():
        signature = _int8_linear_signature(name)
        variants += [
            *variants_of(
                int8_linear.linear_blocks_kernel, signature, {}, int8_linear.blocks_config, name
            ),
            *variants_of(
                int8_linear.linear_rows_kernel,
                signature,
                {},
                functools.partial(int8_linear.rows_config, out_dtype=dtype),
                name,
            ),
        ]
    return variants


def _int8_linear_signature(out: str) -> dict[str, str]:
    return {
        "x_ptr": "*i8:16",
        "x_scale_ptr": "*fp32:16",
        "w_ptr": "*i8:16",
        "w_scale_ptr": "*fp32:16",
        "bias_ptr": "*bf16:16",
        "y_ptr": f"*{out}:16",
        "length": "i32",
        "n": "i32:16",
        "k": "i32:16",
        "stride_xb": "i32:16",
        "stride_xl": "i32:16",
        "stride_wn": "i32:16",
    }


def norm_variants() -> list[Variant]:
    rms = {
        "x_ptr": "*bf16:16",
        "weight_ptr": "*fp32:16",
        "y_ptr": "*bf16:16",
        "channels": "i32:16",
        "eps": "fp32",
        "stride_r": "i32:16",
    }
    layer = {
        "x_ptr": "*bf16:16",
        "weight_ptr": "*fp32:16",
        "bias_ptr": "*fp32:16",
        "scale_ptr": "*fp32:16",
        "shift_ptr": "*fp32:16",
        "y_ptr": "*bf16:16",
        "length": "i32",
        "channels": "i32:16",
        "eps": "fp32",
        **dict.fromkeys(("stride_xb", "stride_xl"), "i32:16"),
        **dict.fromkeys(("stride_scale_b", "stride_scale_l"), "i32:16"),
        **dict.fromkeys(("stride_shift_b", "stride_shift_l"), "i32:16"),
    }
    contiguous = dict.fromkeys(("stride_xc", "stride_scale_c", "stride_shift_c"), 1)
    return [
        *variants_of(norm.rms_norm_kernel, rms, {"stride_c": 1}, lambda _: norm.LAUNCH),
        *variants_of(norm.layer_norm_kernel, layer, contiguous, lambda _: norm.LAUNCH),
    ]


def rope_variants() -> list[Variant]:
    signature = {
        "x_ptr": "*bf16:16",
        "cos_ptr": "*fp32:16",
        "sin_ptr": "*fp32:16",
        "y_ptr": "*bf16:16",
        "length": "i32",
        "heads": "i32",
        **dict.fromkeys(("stride_xb", "stride_xl", "stride_xh"), "i32:16"),
        **dict.fromkeys(("stride_cos_b", "stride_cos_l"), "i32:16"),
        **dict.fromkeys(("stride_sin_b", "stride_sin_l"), "i32:16"),
    }
    contiguous = dict.fromkeys(("stride_xd", "stride_cos_d", "stride_sin_d"), 1)
    return [
        variant
        for head_dim in (64, 128)
        for variant in variants_of(
            rope.rope_kernel,
            signature,
            {**contiguous, "HEAD_DIM": head_dim},
            lambda _: rope.LAUNCH,
            f"d{head_dim}",
        )
    ]


OPS = (int8_quant_variants, int8_linear_variants, norm_variants, rope_variants)
