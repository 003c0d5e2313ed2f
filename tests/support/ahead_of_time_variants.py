"""The kernel specialisations that ship: what tests/kernels/test_ahead_of_time.py compiles.

One function per op, listed in OPS at the end. Launch configurations come from the ops themselves.
"""

import functools
from typing import Any

from ahead_of_time import CARDS, Variant, variants_of
from turbodiffusion_pack.kernels.block_map import triton as block_map
from turbodiffusion_pack.kernels.int8_linear import triton as int8_linear
from turbodiffusion_pack.kernels.int8_quant import triton as int8_quant
from turbodiffusion_pack.kernels.linear_attention import triton as linear_attention
from turbodiffusion_pack.kernels.norm import triton as norm
from turbodiffusion_pack.kernels.norm_quant import triton as norm_quant
from turbodiffusion_pack.kernels.qk_prepare import triton as qk_prepare
from turbodiffusion_pack.kernels.requantize import triton as requantize
from turbodiffusion_pack.kernels.rope import triton as rope
from turbodiffusion_pack.kernels.sparse_attention import triton as sparse_attention
from turbodiffusion_pack.kernels.tuning import GELU_ROWS, LAYER_NORM_ROWS, of_width

FP8_CARDS = tuple(card for card in CARDS if card >= (8, 9))
TILES = ((128, 128, 64), (64, 128, 64), (128, 64, 64), (128, 64, 128))  # head dim, block_q, block_k
CHANNELS = (1536, 5120, 8960, 13824)  # widths of Wan's rows: both models', both MLPs'
LAYER_NORM_CONTIGUOUS = dict.fromkeys(("stride_xc", "stride_scale_c", "stride_shift_c"), 1)
OPERAND_POINTERS = "weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr"
# What Wan's norms have, and all there can be. Vectors of a sample stay in registers.
LAYER_NORM_OPERANDS = {
    "affine": ("weight_ptr", "bias_ptr"),
    "sample": ("scale_ptr", "shift_ptr"),
    "token": OPERAND_POINTERS,
}
TMA_CARDS = tuple(card for card in CARDS if card >= (9, 0))
# Output dtype of INT8 linear, and whether its gate has a row per token.
LINEAR_EPILOGUES = {"plain": ("bf16", False), "gate": ("bf16", False), "gates": ("fp32", True)}
# Bytes: products and sums of a block fill 256 registers at 4 warps. At 8 warps nothing spills, and
# an H100 takes 1.1 to 1.4 times as long.
LINEAR_SPILLS = 128


def int8_quant_variants() -> list[Variant]:
    signature = {
        "x_ptr": "*bf16:16",
        "q_ptr": "*i8:16",
        "scale_ptr": "*fp32:16",
        "rows": "i32",
        "stride_b": "i32:16",
        "stride_r": "i32:16",
    }
    blocks, rows = int8_quant.quantize_blocks_kernel, int8_quant.quantize_rows_kernel
    launches = [
        (f"{activation}", blocks, {"ACTIVATION": activation}, int8_quant.BLOCKS_LAUNCH)
        for activation in (None, "gelu_tanh")
    ]
    launches += [(f"{c}", rows, {}, norm.row_launch(c)) for c in CHANNELS]
    columns = {"columns": "i32:16"}
    variants = [
        variant
        for label, kernel, flags, launch in launches
        for variant in variants_of(
            kernel, signature | columns, {"stride_c": 1, **flags}, lambda _, to=launch: to, label
        )
    ]
    for c in CHANNELS:
        variants += variants_of(
            int8_quant.activate_rows_kernel,
            signature,
            {"stride_c": 1, "ACTIVATION": "gelu_tanh", **_row(c)},
            lambda _, width=c: of_width(GELU_ROWS, width).launch(),
            f"{c}",
        )
    return variants


def int8_linear_variants() -> list[Variant]:
    launches = [(by_blocks, False, card) for by_blocks in (True, False) for card in CARDS]
    launches += [(by_blocks, True, card) for by_blocks in (True, False) for card in TMA_CARDS]
    return [
        _int8_linear_variant(by_blocks, tma, card, width, epilogue)
        for by_blocks, tma, card in launches
        for width in ((1536, 5120) if tma and not by_blocks and card == (9, 0) else (5120,))
        for epilogue in LINEAR_EPILOGUES
    ]


def _int8_linear_variant(by_blocks, tma, card, width, epilogue) -> Variant:
    """`width` is both K and N, which decide the tile."""
    config = int8_linear.linear_config(card, by_blocks, tma, width, width)
    out, gate_rows = LINEAR_EPILOGUES[epilogue]
    signature = _pointers("fp32", "x_scale", "w_scale") | _sizes("length") | {"bias": "*bf16:16"}
    strides = ("xb", "xl", "wn", "gb", "gl", "rb", "rl", "ob", "ol")
    signature |= dict.fromkeys(("n", "k", *(f"stride_{s}" for s in strides)), "i32:16")
    matrices = dict(zip(("x", "w", "residual", "out"), ("i8", "i8", out, out), strict=True))
    blocks = int8_linear.tensor_map_blocks(config)
    for (name, dtype), block in zip(matrices.items(), blocks, strict=True):
        signature[name] = f"tensordesc<{dtype}{block}>" if tma else f"*{dtype}:16"
    flags = {"BY_BLOCKS": by_blocks, "TMA": tma, "GATE_ROWS": gate_rows, "stride_gn": 1}
    if epilogue == "plain":
        del signature["residual"]
        flags |= {"gate": None, "residual": None}
    else:
        signature["gate"] = "*fp32:16"
    label = f"{'blocks' if by_blocks else 'rows'}-{'tma' if tma else 'pointers'}-{width}-{epilogue}"
    kernel = int8_linear.linear_kernel
    (variant,) = variants_of(kernel, signature, flags, lambda _: config, label, (card,))
    return variant._replace(spills=LINEAR_SPILLS if by_blocks and tma and card == (9, 0) else 0)


def requantize_variants() -> list[Variant]:
    signature = _pointers("fp32", "scale_ptr", "row_scale_ptr")
    signature |= {"q_ptr": "*i8:16", "out_ptr": "*i8:16"}
    signature |= dict.fromkeys(("columns", "stride_r"), "i32:16")
    return [
        variant
        for columns in CHANNELS
        for variant in variants_of(
            requantize.requantize_rows_kernel,
            signature,
            {"stride_c": 1, "BLOCK": requantize.BLOCK},
            lambda _, columns=columns: requantize.config(columns),
            f"{columns}",
        )
    ]


def norm_variants() -> list[Variant]:
    rms = {
        "x_ptr": "*bf16:16",
        "weight_ptr": "*fp32:16",
        "y_ptr": "*bf16:16",
        "channels": "i32:16",
        "eps": "fp32",
        "stride_r": "i32:16",
    }
    layer = _layer_norm_signature() | {"y_ptr": "*bf16:16"}
    variants = []
    for c in CHANNELS:
        variants += variants_of(
            norm.rms_norm_kernel,
            rms,
            {"stride_c": 1},
            lambda _, width=c: norm.row_launch(width),
            f"{c}",
        )
        variants += variants_of(
            norm.layer_norm_kernel,
            layer,
            LAYER_NORM_CONTIGUOUS | _row(c),
            lambda _, width=c: norm.layer_norm_launch(width),
            f"{c}",
        )
    return variants


def _row(channels: int) -> dict[str, Any]:
    """Constants of the kernels that hold a row in pieces."""
    return {"CHANNELS": channels, "PIECES": norm.row_pieces(channels)}


def norm_quant_variants() -> list[Variant]:
    signature = _layer_norm_signature() | {"q_ptr": "*i8:16", "q_scale_ptr": "*fp32:16"}
    rows, blocks = norm_quant.layer_norm_rows_kernel, norm_quant.layer_norm_blocks_kernel
    block_signature = signature | {"channels": "i32:16"}
    launches = [
        (blocks, block_signature, {"PER_TOKEN": per_token}, norm_quant.BLOCKS_LAUNCH, label)
        for per_token, label in ((False, "sample"), (True, "token"))
    ]
    for c in CHANNELS:
        loop = of_width(LAYER_NORM_ROWS, c)
        for label, given in LAYER_NORM_OPERANDS.items():
            per_token = label == "token"
            absent = [name for name in OPERAND_POINTERS if name not in given]
            types = {name: type_ for name, type_ in signature.items() if name not in absent}
            constants = {"PER_TOKEN": per_token, **dict.fromkeys(absent), **_row(c)}
            launch = norm_quant.rows_launch(loop, per_token)
            launches.append((rows, types, constants, launch, f"{c}-{label}"))
    return [
        variant
        for kernel, types, constants, launch, label in launches
        for variant in variants_of(
            kernel, types, LAYER_NORM_CONTIGUOUS | constants, lambda _, to=launch: to, label
        )
    ]


def _layer_norm_signature() -> dict[str, str]:
    return {
        "x_ptr": "*bf16:16",
        **_pointers("fp32", *OPERAND_POINTERS),
        "length": "i32",
        "eps": "fp32",
        **dict.fromkeys(("stride_xb", "stride_xl"), "i32:16"),
        **dict.fromkeys(("stride_scale_b", "stride_scale_l"), "i32:16"),
        **dict.fromkeys(("stride_shift_b", "stride_shift_l"), "i32:16"),
    }


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
    means = {"x": "*bf16:16", "means": "*fp32:16", **_strides("stride")}
    scores = {**_pointers("fp32", "q_means", "k_means", "scores"), **_sizes("n_queries", "n_keys")}
    select = {"scores": "*fp32:16", "block_map": "*i32:16", **_sizes("n_keys", "count")}
    block = {"BLOCK": 128, "HEAD_DIM": 128}
    centered = _pointers("fp32", "means", "centered", "mean") | _sizes("blocks", "length")
    sizes = {"ROWS": block_map.TILE, "CHANNELS": block_map.CHANNELS}
    launches = (
        (block_map.block_means_kernel, means | _sizes("heads", "length"), block),
        (block_map.center_means_kernel, centered, block | sizes),
        (block_map.scores_kernel, scores, {"TILE": block_map.TILE, "HEAD_DIM": 128}),
        (block_map.select_blocks_kernel, select, {"CHUNK": block_map.CHUNK}),
    )
    resident = block_map.select_resident_kernel, select, {"RESIDENT": block_map.RESIDENT}
    return [
        *(v for launch in launches for v in variants_of(*launch, lambda _: block_map.LAUNCH)),
        *variants_of(*resident, lambda _: block_map.ROW_LAUNCH),
    ]


def prepare_variants() -> list[Variant]:
    norms = {"x": "*bf16:16", "norms": "*fp32:16", **_strides("stride"), "eps": "fp32"}
    norms |= _sizes("length", "heads")
    rows = _pointers("bf16", "x", "out") | {"integers": "*i8:16"} | _strides("x")
    rows |= _pointers("fp32", "norms", "weight", "cos", "sin", "means", "scales")
    rows |= dict.fromkeys(("cos_b", "cos_l", "sin_b", "sin_l"), "i32:16")
    rows |= _sizes("length", "heads")
    variants = variants_of(
        qk_prepare.row_norms_kernel,
        norms,
        {"HEAD_DIM": 128, "HEADS": 64},
        lambda _: qk_prepare.ROW_LAUNCH,
    )
    for block, quantize in ((128, True), (128, False), (64, True), (64, False)):
        flags = {"BLOCK": block, "HEAD_DIM": 128, "QUANTIZE": quantize}
        variants += variants_of(
            qk_prepare.prepare_kernel,
            rows,
            flags | {"HEADS": qk_prepare.HEADS},
            lambda _, block=block: qk_prepare.config(block),
            f"{block}{'-int8' if quantize else ''}",
        )
    return variants


def linear_attention_variants() -> list[Variant]:
    state = {**_pointers("bf16", "k", "v"), **_pointers("fp32", "state", "normalizer", "maxima")}
    state |= _strides("k", "v") | _sizes("heads", "length", "rows")
    branch = {**_pointers("bf16", "q", "out", "mix"), **_pointers("fp32", "normalizer", "bias")}
    branch |= _strides("q") | _sizes("heads", "length")
    flags = {"HEAD_DIM": 128, "FEATURE_MAP": "softmax"}
    op = linear_attention
    launches = (
        (op.key_value_state_kernel, state, {"TILE": op.TILE, "MAXIMA": True}, op.STATE_LAUNCH),
        (op.apply_state_kernel, branch, {"ROWS": op.ROWS}, op.LAUNCH),
    )
    return [
        variant
        for kernel, signature, tile, launch in launches
        for variant in variants_of(kernel, signature, flags | tile, lambda _, to=launch: to)
    ]


def sparse_attention_variants() -> list[Variant]:
    signature = _pointers("bf16", "q", "out") | {"block_map": "*i32:16"}
    signature |= {"scale": "fp32"}
    signature |= _strides("q", "k", "v") | _sizes("length", "count")

    def operands(tile, tma):
        dim, _, block_k = tile
        if not tma:
            return _pointers("bf16", "k", "v")
        rows = f"tensordesc<bf16[1, 1, {block_k}, {dim}]>"
        return {"k": rows, "v": rows}

    kernel, config = sparse_attention.sparse_attention_kernel, sparse_attention.float_config
    return [
        variant
        for tile in TILES
        for variant in _tile_variants(kernel, signature, operands, {}, config, tile, "bf16")
    ]


def sage_attention_variants() -> list[Variant]:
    signature = _pointers("bf16", "out")
    signature |= {"q_int": "*i8:16", "block_map": "*i32:16"}
    signature |= _pointers("fp32", "q_scale", "k_scale", "v_scale")
    signature |= _sizes("length", "count")

    def operands(tile, tma, pv):
        dim, _, block_k = tile
        if not tma:
            return {"k_int": "*i8:16", "v": f"*{pv}:16"}
        return {
            "k_int": f"tensordesc<i8[{block_k}, {dim}]>",
            "v": f"tensordesc<{pv}[{dim}, {block_k}]>",
        }

    kernel, config = sparse_attention.sage_attention_kernel, sparse_attention.low_bit_config
    return [
        variant
        for pv in ("fp16", "fp8e4nv")
        for tile in TILES
        for variant in _tile_variants(
            kernel,
            signature,
            functools.partial(operands, pv=pv),
            {"FP8": pv != "fp16"},
            functools.partial(config, fp8=pv != "fp16"),
            tile,
            pv,
        )
    ]


def attention_operand_variants() -> list[Variant]:
    values = {"v": "*bf16:16", **_strides("stride"), **_sizes("heads", "length")}
    blocks = {"x": "*bf16:16", "integers": "*i8:16", **_pointers("fp32", "center", "scales")}
    blocks |= {**_strides("stride"), **_sizes("heads", "length")}
    quantized = values | {"factors": "*fp32:16", "limit": "fp32"}
    block = {"BLOCK": 64, "HEAD_DIM": 128, "FOR_HOPPER": False}
    centered = {"BLOCK": 64, "HEAD_DIM": 128, "CENTERED": True, "FOR_HOPPER": False}
    hopper = {"FOR_HOPPER": True}
    rows = {"ROWS": 64, "HEAD_DIM": 128}
    op = sparse_attention
    fp8 = quantized | {"values": "*fp8e4nv:16"}
    launches = (
        (op.quantize_heads_kernel, blocks, centered, "", CARDS),
        (op.quantize_heads_kernel, blocks, centered | hopper, "hopper", ((9, 0),)),
        (op.quantize_values_kernel, fp8, block | hopper, "hopper", ((9, 0),)),
        (op.channel_max_kernel, values | {"amax": "*fp32:16"}, rows, "", CARDS),
        (op.quantize_values_kernel, quantized | {"values": "*fp16:16"}, block, "fp16", CARDS),
        (op.quantize_values_kernel, fp8, block, "fp8", FP8_CARDS),
    )
    return [
        variant
        for kernel, signature, flags, label, cards in launches
        for variant in variants_of(kernel, signature, flags, lambda _: op.LAUNCH, label, cards)
    ]


def _tile_variants(kernel, signature, operands, flags, config, tile, pv) -> list[Variant]:
    """One tile, written or added on; all but the default tile only where memory is
    tightest, and on Hopper. `operands(tile, tma)` are the types of what TMA loads."""
    dim, block_q, block_k = tile
    flags = flags | {"HEAD_DIM": dim, "BLOCK_Q": block_q, "BLOCK_K": block_k}
    cards = CARDS if tile == TILES[0] else ((9, 0), (12, 0))
    return [
        variant
        for card in cards
        for onto in (True, False)
        if pv != "fp8e4nv" or card in FP8_CARDS
        for variant in variants_of(
            kernel,
            signature | operands(tile, sparse_attention.has_tma(card)),
            flags
            | {"ONTO": onto}
            | {"TMA": sparse_attention.has_tma(card)},
            functools.partial(config, block_q=block_q, block_k=block_k),
            f"{pv}-{dim}-{block_q}x{block_k}{'-onto' if onto else ''}",
            (card,),
        )
    ]


def _pointers(dtype: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{dtype}:16")


def _strides(*names: str) -> dict[str, str]:
    return {f"{name}_{axis}": "i32:16" for name in names for axis in "blh"}


def _sizes(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


OPS = (
    int8_quant_variants,
    int8_linear_variants,
    requantize_variants,
    norm_variants,
    norm_quant_variants,
    rope_variants,
    block_map_variants,
    prepare_variants,
    linear_attention_variants,
    sparse_attention_variants,
    sage_attention_variants,
    attention_operand_variants,
)
