"""ComfyUI's own WanModel as a network to train: the same module, parameters and names.

Only the two attentions' forwards are ours, because the host's pick kernels that know no gradients
or no tangents. `comfy` must be importable; no server is started.
"""

from collections.abc import Callable

import comfy.ldm.wan.model as wan
import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.dense_attention import attention_with_jvp
from ...kernels.derivatives import has_tangent
from ...kernels.sla import sla
from ..checkpoint.error import CheckpointError
from ..checkpoint.names import IN_A_MODEL, PROJ_L
from ..checkpoint.sizes import FREQ_DIM, HEAD_DIM, OUT_CHANNELS, PATCH, TEXT_DIM, Sizes
from .timesteps import round_to_bf16

Tensors = dict[str, torch.Tensor]

(PROJECTION,) = IN_A_MODEL  # self_attn.proj_l, as a MODEL of ours has it too


class WanNetwork(wan.WanModel):
    """Wan's transformer; parameters fp32, under Wan's own names.

    On a GPU the products run in bf16 (autocast); time embedding, modulation, norms, residual stream
    and head stay in fp32, without which rCM collapses (arXiv 2510.08431, section 3.3). On the CPU
    everything is fp32.

    Attributes:
        full_precision: products in fp32 (TF32 where torch allows it), for tangents and differences.
        bf16_timesteps: round timesteps as TurboDiffusion does (987.65 to 988). Tangents of the
            timestep pass unchanged.
        checkpointing: keep only each block's input for the backward pass, and compute it twice.
    """

    full_precision = False
    bf16_timesteps = True

    def __init__(self, sizes: Sizes, device: torch.device | str | None = None):
        super().__init__(
            in_dim=sizes.in_channels,
            dim=sizes.dim,
            ffn_dim=sizes.ffn_dim,
            num_layers=sizes.num_layers,
            num_heads=sizes.dim // HEAD_DIM,
            freq_dim=FREQ_DIM,
            text_dim=TEXT_DIM,
            out_dim=OUT_CHANNELS,
            patch_size=PATCH,
            wan_attn_block_class=Block,
            device=device,
            dtype=torch.float32,
            operations=Operations,
        )
        self.time_embedding = InFloat32(*self.time_embedding)
        self.time_projection = InFloat32(*self.time_projection)
        settings = {"operations": Operations, "device": device, "dtype": torch.float32}
        self.head = Head(sizes.dim, OUT_CHANNELS, PATCH, self.eps, operation_settings=settings)
        self.sizes = sizes
        self.rotations = {}  # by shape of the latent

    @property
    def checkpointing(self) -> bool:
        return self.blocks[0].checkpointing

    @checkpointing.setter
    def checkpointing(self, wanted: bool) -> None:
        for block in self.blocks:
            block.checkpointing = wanted

    def compile_blocks(self) -> None:
        """Have torch.compile make the blocks' kernels, but for passes with tangents."""
        for block in self.blocks:
            block.compiled = torch.compile(super(Block, block).forward, dynamic=False)

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: torch.Tensor,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rectified-flow velocity, noise - data.

        Args:
            x: [B, 16, T, H, W] float, the noisy latent; H and W even.
            timestep: [B] float, 0 to 1000.
            context: [B, N, 4096] float, text features.
            image: [B, 20, T, H, W] float, mask and latent of the picture, for 36 input channels.

        Returns:
            [B, 16, T, H, W] float32.
        """
        if image is not None:
            x = torch.cat([x, image.to(x)], dim=1)
        if self.bf16_timesteps:
            timestep = _rounded(timestep)
        freqs = self._rotation(x)
        with self.precision(x.device):
            velocity = self.forward_orig(
                x.float(), timestep.float(), context, freqs=freqs, transformer_options={}
            )
        return velocity.float()

    def precision(self, device: torch.device) -> torch.autocast:
        """The context that products run in; bf16 copies of weights are not kept beyond a use."""
        wanted = device.type == "cuda" and not self.full_precision
        return torch.autocast(device.type, torch.bfloat16, wanted, cache_enabled=False)

    def _rotation(self, x: torch.Tensor) -> torch.Tensor:
        """The host's rotation matrices [1, L, 1, D/2, 2, 2] fp32 of the positions in x."""
        key = (*x.shape[2:], x.device)
        if key in self.rotations:
            return self.rotations[key]
        with torch.no_grad():
            rotation = self.rope_encode(*x.shape[2:], device=x.device, dtype=torch.float32)
        if not has_tangent(x):  # torch.func.jvp wraps all that is made inside of it
            self.rotations = {key: rotation}
        return rotation


class PatchEmbedding(torch.nn.Conv3d):
    """The patches' convolution as the matrix product that it is: stride and kernel are alike."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, C, T, H, W] to [B, dim, T, H / 2, W / 2]."""
        _, height, width = self.kernel_size
        patches = rearrange(x, "b c t (h p) (w q) -> b t h w (c p q)", p=height, q=width)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(4, 1)


class Operations:
    """What the host builds a WanModel from: torch's own layers."""

    Conv3d = PatchEmbedding
    LayerNorm = torch.nn.LayerNorm
    Linear = torch.nn.Linear
    RMSNorm = torch.nn.RMSNorm


class InFloat32(torch.nn.Sequential):
    """Layers outside of autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


class Head(wan.Head):
    """The host's head outside of autocast."""

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """x [B, L, C] to [B, L, 64]."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x, e)


class Block(wan.WanAttentionBlock):
    """The host's block around attentions that can be differentiated."""

    checkpointing = False
    compiled: Callable | None = None

    def __init__(self, *args, operation_settings: dict, **kwargs):
        super().__init__(*args, operation_settings=operation_settings, **kwargs)
        sizes = {"dim": self.dim, "num_heads": self.num_heads, "eps": self.eps}
        self.self_attn = SelfAttention(**sizes, operation_settings=operation_settings)
        self.cross_attn = CrossAttention(**sizes, operation_settings=operation_settings)

    def forward(self, x, e, freqs, context, context_img_len=None, transformer_options=None):
        """x [B, L, C] after this block; e [B, 1, 6, C] is the modulation of the timestep."""
        inputs = (x, e, freqs, context, context_img_len, {})
        run = super().forward
        if self.compiled and not has_tangent(x):
            run = self.compiled
        if self.checkpointing and torch.is_grad_enabled():
            # Nothing in a block is random, and a CUDA graph cannot hold a look at the generators.
            return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        return run(*inputs)


class SelfAttention(wan.WanSelfAttention):
    """Dense attention, or SLA where `sparse` has its options and `proj_l` is there."""

    sparse: dict | None = None

    def forward(self, x, freqs, transformer_options=None):
        """x [B, L, C] attends to itself."""
        heads = (self.num_heads, self.head_dim)
        q = _rotate(_norm(self.norm_q, self.q(x)).unflatten(2, heads), freqs)
        k = _rotate(_norm(self.norm_k, self.k(x)).unflatten(2, heads), freqs)
        v = self.v(x).unflatten(2, heads)
        q, k = q.to(v.dtype), k.to(v.dtype)
        sparse = self.sparse
        y = attention(q, k, v) if sparse is None else _sla(q, k, v, self.proj_l, sparse)
        return self.o(y.flatten(2))


class CrossAttention(wan.WanT2VCrossAttention):
    """Attention to the text, always dense."""

    def forward(self, x, context, context_img_len=None, transformer_options=None):
        """x [B, L, C] attends to context [B, N, C]."""
        heads = (self.num_heads, self.head_dim)
        v = self.v(context).unflatten(2, heads)
        q = _norm(self.norm_q, self.q(x)).unflatten(2, heads).to(v.dtype)
        k = _norm(self.norm_k, self.k(context)).unflatten(2, heads).to(v.dtype)
        return self.o(attention(q, k, v).flatten(2))


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense softmax attention of q [B, L, H, D] to k, v [B, N, H, D], by torch's fastest kernel.

    With a tangent where one is asked for; torch.compile does not trace that question.
    """
    if not torch.compiler.is_compiling():
        return attention_with_jvp(q, k, v)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads).transpose(1, 2)


@torch.compiler.disable
def _sla(q, k, v, proj_l: torch.nn.Linear, options: dict) -> torch.Tensor:
    return sla(q, k, v, (proj_l.weight, proj_l.bias), **options)


def _norm(norm: torch.nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over all heads in fp32."""
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight, norm.eps)


def _rotate(x: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
    """RoPE of x [B, L, H, D] fp32 by the matrices [1, L, 1, D/2, 2, 2]: pairs lie side by side."""
    first, second = x.unflatten(3, (-1, 2)).unbind(-1)
    cos, sin = freqs[..., 0, 0], freqs[..., 1, 0]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(3)


def _rounded(timestep: torch.Tensor) -> torch.Tensor:
    """Rounded to bf16; tangents and gradients pass as if it were not."""
    return timestep + (round_to_bf16(timestep.detach()) - timestep).detach()


def build_network(
    sizes: Sizes,
    device: torch.device | str = "cpu",
    sla: dict | None = None,
    shard: Callable[[WanNetwork], None] | None = None,
) -> WanNetwork:
    """A network whose weights are yet to come, see load_weights.

    Args:
        sizes: of the transformer.
        device: where its parameters lie.
        sla: options of kernels.sla.sla (topk, block_q, block_k, feature_map) for SLA with its
            `proj_l`; None for dense self-attention.
        shard: splits the network among processes, before it takes any memory.
    """
    network = WanNetwork(sizes, "meta")
    if sla is not None:
        _use_sla(network, sla)
    if shard:
        shard(network)
    return network.to_empty(device=device)


def _use_sla(network: WanNetwork, options: dict) -> None:
    for block in network.blocks:
        block.self_attn.sparse = dict(options)
        block.self_attn.proj_l = torch.nn.Linear(HEAD_DIM, HEAD_DIM, device="meta")


@torch.no_grad()
def load_weights(network: WanNetwork, tensors: Tensors) -> None:
    """Copy `tensors`, under Wan's names as read_checkpoint gives them, into the network.

    SLA's projections start at zero where `tensors` has none, so that SLA starts as its sparse part.

    Raises:
        CheckpointError: a tensor is missing, or one is left that the network has no place for.
    """
    given = {name.replace(PROJ_L, PROJECTION): tensor for name, tensor in tensors.items()}
    for name, parameter in network.named_parameters():
        if name not in given and f".{PROJECTION}." not in f".{name}":
            raise CheckpointError(f"{name} is missing: choose a complete Wan checkpoint")
        value = given.pop(name, None)
        parameter.copy_(_like(parameter, torch.zeros(parameter.shape) if value is None else value))
    if given:
        raise CheckpointError(
            f"{next(iter(given))} has no place in this network: choose another checkpoint or preset"
        )


def _like(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """`value`, which every process has, split as the parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def wan_tensors(tensors: Tensors) -> Tensors:
    """The network's parameters, or averages of them, under the names of a checkpoint file."""
    return {name.replace(PROJECTION, PROJ_L): tensor for name, tensor in tensors.items()}
