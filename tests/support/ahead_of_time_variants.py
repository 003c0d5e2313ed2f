"""The kernel specialisations that ship: what tests/kernels/test_ahead_of_time.py compiles.

One function per op, listed in OPS at the end. Launch configurations come from the ops themselves.
"""

import functools

import torch
from ahead_of_time import CARDS, Variant, variants_of
from turbodiffusion_pack.kernels.block_map import triton as block_map
from turbodiffusion_pack.kernels.int8_linear import triton as int8_linear
from turbodiffusion_pack.kernels.int8_quant import triton as int8_quant
from turbodiffusion_pack.kernels.linear_attention import triton as linear_attention
from turbodiffusion_pack.kernels.norm import triton as norm
from turbodiffusion_pack.kernels.rope import triton as rope
from turbodiffusion_pack.kernels.sparse_attention import triton as sparse_attention

FP8_CARDS = tuple(card for card in CARDS if card >= (8, 9))
TILES = ((128, 128, 64), (64, 128, 64), (128, 64, 64), (128, 64, 128))  # head dim, block_q, block_k
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


def block_map_variants() -> list[Variant]:
    means = {"x": "*bf16:16", **_pointers("fp32", "center", "means"), **_strides("stride")}
    scores = {**_pointers("fp32", "q_means", "k_means", "scores"), **_sizes("n_queries", "n_keys")}
    select = {"scores": "*fp32:16", "block_map": "*i32:16", **_sizes("n_keys", "count")}
    block = {"BLOCK": 128, "HEAD_DIM": 128, "CENTERED": True}
    launches = (
        (block_map.block_means_kernel, means | _sizes("heads", "length"), block),
        (block_map.scores_kernel, scores, {"TILE": block_map.TILE, "HEAD_DIM": 128}),
        (block_map.select_blocks_kernel, select, {"CHUNK": block_map.CHUNK}),
    )
    return [v for launch in launches for v in variants_of(*launch, lambda _: block_map.LAUNCH)]


def linear_attention_variants() -> list[Variant]:
    state = {**_pointers("bf16", "k", "v"), **_pointers("fp32", "state", "normalizer")}
    state |= _strides("k", "v") | _sizes("heads", "length", "rows")
    branch = {**_pointers("bf16", "q", "out", "mix"), **_pointers("fp32", "normalizer", "bias")}
    branch |= _strides("q") | _sizes("heads", "length")
    flags = {"HEAD_DIM": 128, "FEATURE_MAP": "softmax"}
    launches = (
        (linear_attention.key_value_state_kernel, state, {"TILE": linear_attention.TILE}),
        (linear_attention.apply_state_kernel, branch, {"ROWS": linear_attention.ROWS}),
    )
    return [
        variant
        for kernel, signature, tile in launches
        for variant in variants_of(
            kernel, signature, flags | tile, lambda _: linear_attention.LAUNCH
        )
    ]


def sparse_attention_variants() -> list[Variant]:
    signature = _pointers("bf16", "q", "k", "v", "out", "mix") | {"block_map": "*i32:16"}
    signature |= _pointers("fp32", "normalizer", "bias") | {"scale": "fp32"}
    signature |= _strides("q", "k", "v") | _sizes("heads", "length", "count")
    kernel, config = sparse_attention.sparse_attention_kernel, sparse_attention.float_config
    return [v for tile in TILES for v in _tile_variants(kernel, signature, {}, config, tile)]


def sage_attention_variants() -> list[Variant]:
    kernel, config = sparse_attention.sage_attention_kernel, sparse_attention.low_bit_config
    variants = []
    for pv, shift in (("fp16", 0), ("fp8e4nv", 8)):
        signature = _pointers("bf16", "q", "out", "mix") | {"v": f"*{pv}:16"}
        signature |= _pointers("i8", "q_int", "k_int") | {"block_map": "*i32:16"}
        signature |= _pointers("fp32", "q_scale", "k_scale", "v_scale", "normalizer", "bias")
        signature |= _strides("q") | _sizes("heads", "length", "count")
        for tile in TILES:
            variants += _tile_variants(kernel, signature, {"SHIFT": shift}, config, tile, pv)
    return variants


def attention_operand_variants() -> list[Variant]:
    values = {"v": "*bf16:16", **_strides("stride"), **_sizes("heads", "length")}
    blocks = {"x": "*bf16:16", "integers": "*i8:16", **_pointers("fp32", "center", "scales")}
    blocks |= {"factor": "fp32", **_strides("stride"), **_sizes("heads", "length")}
    quantized = values | {"factors": "*fp32:16", "limit": "fp32"}
    block = {"BLOCK": 64, "HEAD_DIM": 128}
    centered = {"BLOCK": 128, "HEAD_DIM": 128, "CENTERED": True}
    rows = {"ROWS": 64, "HEAD_DIM": 128}
    op = sparse_attention
    launches = (
        (op.quantize_heads_kernel, blocks, centered, "", CARDS),
        (op.channel_max_kernel, values | {"amax": "*fp32:16"}, rows, "", CARDS),
        (op.quantize_values_kernel, quantized | {"values": "*fp16:16"}, block, "fp16", CARDS),
        (op.quantize_values_kernel, quantized | {"values": "*fp8e4nv:16"}, block, "fp8", FP8_CARDS),
    )
    return [
        variant
        for kernel, signature, flags, label, cards in launches
        for variant in variants_of(kernel, signature, flags, lambda _: op.LAUNCH, label, cards)
    ]


def _tile_variants(kernel, signature, flags, config, tile, pv="bf16") -> list[Variant]:
    """One tile with its linear branch; all but the default tile only where memory is tightest."""
    dim, block_q, block_k = tile
    flags = flags | {"HEAD_DIM": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    flags |= {"LINEAR": True, "FEATURE_MAP": "softmax"}
    cards = FP8_CARDS if pv == "fp8e4nv" else CARDS
    return variants_of(
        kernel,
        signature,
        flags,
        functools.partial(config, block_q=block_q, block_k=block_k),
        f"{pv}-{dim}-{block_q}x{block_k}",
        cards if tile == TILES[0] else ((12, 0),),
    )


def _pointers(dtype: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{dtype}:16")


def _strides(*names: str) -> dict[str, str]:
    return {f"{name}_{axis}": "i32:16" for name in names for axis in "blh"}


def _sizes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


OPS = (
    int8_quant_variants,
    int8_linear_variants,
    norm_variants,
    rope_variants,
    block_map_variants,
    linear_attention_variants,
    sparse_attention_variants,
    sage_attention_variants,
    attention_operand_variants,
)
