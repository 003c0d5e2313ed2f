"""One forward pass that ranks share, each with a GPU and the same weights."""

import comfy.ldm.wan.model
import torch
from comfy.patcher_extension import WrappersMP

from ...kernels.checks import BLOCK
from ..parallel.exchange import Ranks, gather
from ..parallel.shares import token_shares
from .block import why_not_fused
from .gradients import GRADIENTS, records_graph
from .options import SPLIT
from .patch import wan_model
from .patch_owner import has_own, is_ours, is_stock, owner_of
from .split_block import Split

# What caches put in the place of: they leave blocks out, and other ranks would wait in theirs.
PASS = "forward", "_forward", "forward_orig"
HEAD_DIM = 128  # of every Wan model: then a head is one block of scales


def split_over(model, ranks: Ranks):
    """A clone of `model` that computes its share of each forward pass that can be shared.

    Every rank has to run the same passes on the same inputs; each gets the whole output.

    Raises:
        ValueError: not a Wan MODEL.
    """
    wan_model(model)

    def around_forward(
        executor, x, timestep, context, clip_fea=None, concat=None, transformer_options=None, **more
    ):
        options, inputs = transformer_options or {}, (x, timestep, context, clip_fea)
        if why_not_split(executor.class_obj, x, timestep, context, options, ranks.count) is None:
            return split_pass(executor, ranks, inputs, options)
        return executor(*inputs, concat, options, **more)

    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, SPLIT)
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, SPLIT, around_forward)
    return patched


def split_pass(executor, ranks: Ranks, inputs: tuple, options: dict) -> torch.Tensor:
    """This rank's part of a forward pass of x, timestep, context and clip features; its result.

    The head too runs on own tokens, and what it makes of all comes together behind it.

    Raises:
        RuntimeError: it did not get as far as the head, while the other ranks did or wait.
    """
    wan = executor.class_obj
    shares = token_shares(_tokens(wan, inputs[0]), ranks.count)
    gathered = []

    def together(head, given, own):
        gathered.append(True)
        return gather(ranks, [own.contiguous()], [shares])[0]

    hook = wan.head.register_forward_hook(together)
    try:
        out = executor(*inputs, None, {**options, SPLIT: Split(ranks)})
    finally:
        hook.remove()
    if not gathered:
        raise RuntimeError(
            "a forward pass that GPUs share has left the model's layers out: a cache perhaps, "
            "which is for one GPU. Turn it off, or bypass Turbo Sequence Parallel."
        )
    return out


def why_not_split(
    wan: comfy.ldm.wan.model.WanModel, x, timestep, context, transformer_options: dict, gpus: int
) -> str | None:
    """Why one GPU has to run the forward pass of x [B, C, T, H, W]; None where `gpus` can share it.

    The same on every rank that has the same model and inputs.
    """
    if wan.num_heads % gpus:
        return f"{gpus} GPUs do not divide {wan.num_heads} heads"
    if wan.dim != wan.num_heads * HEAD_DIM:
        return f"head_dim {wan.dim // wan.num_heads} is not {HEAD_DIM}"
    blocks = -(-_tokens(wan, x) // BLOCK)
    if blocks < gpus:
        return f"its {blocks} blocks of {BLOCK} tokens are too few for {gpus} GPUs"
    if records_graph(wan, x, context):
        return GRADIENTS
    if transformer_options.get("patches_replace", {}).get("dit"):
        return "a node replaces blocks"
    e = timestep.reshape(len(x), -1, 1, 1)  # as blocks get it, but for the channels
    if reason := _why_not_stock(wan):
        return reason
    for index, block in enumerate(wan.blocks):
        if not is_ours(block.forward):
            return f"block {index} is patched by {owner_of(block.forward)}"
        if reason := why_not_fused(block, e, transformer_options):
            return f"block {index} is not fused: {reason}"
    return None


def _why_not_stock(wan: comfy.ldm.wan.model.WanModel) -> str | None:
    """Whether a node has changed something beside the blocks, which other ranks would not have."""
    for method in PASS:
        if not has_own(wan, method):
            return f"a node replaces its {method}, as caches do"
    for name, part in wan.named_children():
        if name != "blocks" and not all(map(is_stock, part.modules())):
            return f"a node patches its {name}"
    return None


def _tokens(wan: comfy.ldm.wan.model.WanModel, x: torch.Tensor) -> int:
    """How many tokens x [B, C, T, H, W] is, without those that a reference adds."""
    sizes = zip(x.shape[2:], wan.patch_size, strict=True)
    t, h, w = (-(-size // patch) for size, patch in sizes)
    return t * h * w
