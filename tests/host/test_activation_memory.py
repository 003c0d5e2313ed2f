"""What the fused block works in: counted from what is alive, told to ComfyUI, and kept low."""

import contextlib
import functools
import itertools
import math
import sys
import types

import goldens
import in_comfyui
import live_memory
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.kernels import dispatch, int8_linear, sla, sparse_attention
from turbodiffusion_pack.turbo_core.activation_memory import Network, fused_bytes, rounding
from turbodiffusion_pack.turbo_core.host import (
    block,
    cross_attention,
    memory,
    operations,
    patch,
    per_run,
    self_attention,
    short_memory,
    text,
)
from turbodiffusion_pack.turbo_core.host.gradients import GRADIENTS
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.operations import Linear, TurboOperations
from turbodiffusion_pack.turbo_core.host.options import (
    ATTENTION,
    MADE_ONCE,
    SPLIT,
    TEXT,
    THIS_PASS,
    TIMESTEP,
)
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.patch_owner import mark_as_ours
from turbodiffusion_pack.turbo_core.host.projections import projection
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.host.split_pass import split_over
from turbodiffusion_pack.turbo_core.host.timesteps import round_timesteps
from turbodiffusion_pack.turbo_core.parallel.exchange import Ranks
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

NETWORKS = {"1.3B": (1536, 8960, 12), "14B": (5120, 13824, 40)}  # dim, ffn_dim, heads
LATENTS = {"480p": (21, 60, 104), "720p": (21, 90, 160)}
meta = functools.partial(torch.empty, device="meta")
pytestmark = pytest.mark.skipif(not dispatch.has_triton(), reason="counts what Triton's files take")


def _wan(dim, ffn_dim, num_heads, layers=2):
    """A Wan model of fused INT8 blocks on "meta"."""
    wan = comfy.ldm.wan.model.WanModel(
        model_type="t2v", dim=dim, ffn_dim=ffn_dim, num_heads=num_heads, num_layers=layers,
        in_dim=16, device="meta", dtype=torch.bfloat16, operations=TurboOperations,
    )  # fmt: skip
    for name, op in wan.named_modules():
        if isinstance(op, Linear):
            _fill(op, int8=name.startswith("blocks"))
    for index, wan_block in enumerate(wan.blocks):
        wan_block.self_attn.proj_l = projection(meta(128, 128), meta(128))
        wan_block.self_attn.forward = mark_as_ours(lambda *_: None)
        wan_block.forward = functools.partial(block.block_forward, wan_block, index)
    return wan


def _fill(op, int8):
    shape = op.out_features, op.in_features
    bias = meta(shape[0], dtype=torch.bfloat16)
    if not int8:
        return op.assign(meta(shape, dtype=torch.bfloat16), bias)
    blocks = [-(-size // 128) for size in shape]
    op.assign(meta(shape, dtype=torch.int8), bias, meta(blocks))
    op.granularity = "rows"


def _peak(wan, latent, batch, attention, allocator=None, passes=1, around=None):
    """Bytes alive at the peak of forward passes of one prompt, their inputs among them; `around`
    gives a context of each."""
    with torch.inference_mode(), live_memory.LiveBytes(allocator) as live, per_run.keep():
        for _ in range(passes):
            x = meta(batch, 16, *latent, dtype=torch.bfloat16)
            context = meta(batch, 512, 4096, dtype=torch.bfloat16)
            made = per_run.made("text", lambda: _room_for_texts(wan, batch))
            options = {THIS_PASS: (SLASettings(attention), -1), MADE_ONCE: {}, TEXT: _given(made)}
            with around() if around else contextlib.nullcontext():
                wan(x, meta(batch), context, transformer_options=options)
            del x, context, options
    return live.peak


def _given(made):
    return lambda: made


def _room_for_texts(wan, batch):
    return text.KeysValues(meta(len(wan.blocks), 2, batch, 512, wan.dim, dtype=torch.bfloat16))


@pytest.fixture
def on_meta(monkeypatch):
    if in_comfyui.DYNAMIC:
        pytest.skip("the same without dynamic VRAM, whose stand-ins know no meta tensors")
    for module in (block, self_attention):
        monkeypatch.setattr(module, "host_attention", lambda attn, q, *_: torch.empty_like(q))


@pytest.fixture
def alive(on_meta, monkeypatch):
    """Nothing is computed, on a card with fp8."""
    for module in (sla, self_attention):
        monkeypatch.setattr(module, "default_pv", lambda device: "fp8")
    monkeypatch.setattr(sparse_attention, "_no_fp8", lambda *_: None)
    monkeypatch.setattr(int8_linear, "hopper", int8_linear.triton_kernels)
    monkeypatch.setattr(int8_linear.hopper, "linear_and_squares", _and_squares, raising=False)
    with live_memory.kernels_that_allocate_only(monkeypatch):
        yield


@pytest.fixture(
    params=[((8, 6), "fp16"), ((8, 9), "fp8"), ((9, 0), "fp8"), ((12, 0), "fp8")], ids=str
)
def in_cuda(request, on_meta, monkeypatch):
    """Nothing is computed, on a card with kernels in CUDA C++; gives what its values are in."""
    card, pv = request.param
    live_memory.play_cuda_that_allocates_only(monkeypatch, card)
    with live_memory.kernels_that_allocate_only(monkeypatch):
        assert sparse_attention.default_pv(torch.device("meta")) == pv
        yield pv


def _and_squares(*operands):
    """The linear of GPUs, which takes memory for the squares of rows: a number of 64 columns by
    mma.sync, of 128 by blocks, of 256 on Hopper."""
    batch, length, n = operands[-1].shape
    return operands[-1], meta(batch, n // 64, length)


def _by_cudnn(conv, x):
    """The patch embedding where it comes channels last without a copy."""
    batch, _, frames, height, width = x.shape
    shape = batch, conv.out_channels, frames, height // 2, width // 2
    return meta(shape, memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("attention", ["sagesla", "sla", "dense"])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_formula_is_above_what_is_taken(alive, network, attention, copied, monkeypatch):
    if not copied:
        monkeypatch.setattr(TurboOperations.Conv3d, "forward", _by_cudnn)
    layers = 4
    wan, found = _wan(*NETWORKS[network], layers), {}
    for latent, batch in ((LATENTS["480p"], 1), (LATENTS["720p"], 1), (LATENTS["720p"], 2),
                          ((13, 76, 134), 1)):  # fmt: skip
        tokens = latent[0] * latent[1] * latent[2] // 4
        sizes = Network(*NETWORKS[network], num_layers=layers), batch, tokens, attention
        asked = fused_bytes(*sizes, texts=batch, topk=0.1)
        # Two passes in that, with a GPU that has no more.
        peak = _peak(wan, latent, batch, attention, live_memory.Allocator(asked), passes=2)
        found[latent, batch] = asked / peak
    # More where what is hidden in the feed-forward layers is larger than an activation.
    assert max(found.values()) <= 2, found
    assert network == "1.3B" or found[LATENTS["720p"], 1] <= 1.4, found


@pytest.mark.parametrize("network", NETWORKS)
def test_keys_in_int8_take_no_more_than_keys(in_cuda, network, monkeypatch):
    """And what is asked for is enough."""
    wan, fp8 = _wan(*NETWORKS[network]), in_cuda == "fp8"
    for batch in (1, 2):
        sizes = Network(*NETWORKS[network], num_layers=2), batch, math.prod(LATENTS["720p"]) // 4
        asked = fused_bytes(*sizes, "sagesla", fp8, texts=batch, topk=0.1)
        allocator = live_memory.Allocator(asked)
        peak = _peak(wan, LATENTS["720p"], batch, "sagesla", allocator, passes=2)
        with monkeypatch.context() as only_here:
            for module in (sla, self_attention):
                only_here.setattr(module, "reads_int8_keys", lambda *_, **__: False)
            assert peak < _peak(wan, LATENTS["720p"], batch, "sagesla")


@pytest.mark.parametrize("latent", ["480p", "720p"])
@pytest.mark.parametrize("network", NETWORKS)
def test_parts_as_long_as_they_may_be_fit(alive, network, latent, monkeypatch):
    monkeypatch.setattr(block, "tiles_of", lambda device, granularity: "some")
    monkeypatch.setattr(block, "soonest", lambda lengths, *_: lengths[-1])
    latent, layers = LATENTS[latent], 4
    sizes = Network(*NETWORKS[network], num_layers=layers), 1, math.prod(latent) // 4, "sagesla"
    asked = fused_bytes(*sizes, topk=0.1)
    wan = _wan(*NETWORKS[network], layers)
    _peak(wan, latent, 1, "sagesla", live_memory.Allocator(asked), passes=2)


def test_an_allocator_that_gives_nothing_back_by_itself_fits_too(alive, monkeypatch):
    """In less than it takes of a GPU without an end, where operations are run again."""
    latent, wan, boundless = LATENTS["720p"], _wan(*NETWORKS["14B"], layers=4), sys.maxsize
    played = functools.partial(_peak, wan, latent, 1, "sagesla", passes=2)
    room = int(1.04 * played(taking := live_memory.Allocator(boundless, itself=False)))
    assert room < taking.reserved
    with pytest.raises(torch.OutOfMemoryError):
        played(live_memory.Allocator(room, itself=False))
    allocator = live_memory.Allocator(room, itself=False)
    monkeypatch.setattr(comfy.model_management, "soft_empty_cache", allocator.give_back)
    monkeypatch.setattr(short_memory, "_cached", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    played(allocator, around=lambda: short_memory.TriedAgain(torch.device("meta")))


def test_a_weight_that_the_allocator_asks_for_alone_takes_whole_pieces():
    """[5120, 5120] in INT8 are 25 MB, of which it takes 26; smaller ones share."""
    assert rounding([5120 * 5120, 5120 * 13824, 1536 * 1536]) == 1.5 * 2**20


def test_a_720p_forward_of_14b_takes_little(alive):
    """Three and a half activations of 774 MB, where the host reserves 14.6 GB; and of all 40
    layers no more than 4 GB are asked for."""
    assert _peak(_wan(*NETWORKS["14B"]), LATENTS["720p"], 1, "sagesla") < 3.05e9
    tokens = math.prod(LATENTS["720p"]) // 4
    network = Network(*NETWORKS["14B"], num_layers=40)
    assert fused_bytes(network, 1, tokens, "sagesla", topk=0.1) <= 4.0e9


@pytest.mark.parametrize("batch", [1, 2])
def test_the_patch_embedding_gives_tokens_side_by_side(batch, monkeypatch):
    conv = TurboOperations.Conv3d(16, 256, (1, 2, 2), stride=(1, 2, 2), dtype=torch.float32)
    conv.weight.data.normal_(), conv.bias.data.normal_()
    x = torch.randn(batch, 16, 3, 8, 10)
    y = conv(x)
    monkeypatch.setattr(operations, "CONV_BYTES", 2 * y[:, :, :1].nbytes + 1)  # of three frames two
    torch.testing.assert_close(conv(x), y)
    assert conv(x).stride() == y.stride()
    torch.testing.assert_close(y, torch.nn.functional.conv3d(x, conv.weight, conv.bias, (1, 2, 2)))
    assert y.to(torch.bfloat16).flatten(2).transpose(1, 2).is_contiguous()


# Told to the host


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return load_turbo_model(str(goldens.unpack_checkpoint("t2v-quant.pth", folder)))


@pytest.fixture
def model(loaded):
    return loaded.clone()


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As where kernels run and attention is torch's."""
    monkeypatch.setattr(memory, "triton_unavailable", lambda device: None)
    monkeypatch.setattr(memory, "SIXTEEN_BITS", (torch.bfloat16, torch.float32))
    management = comfy.model_management
    monkeypatch.setattr(management, "pytorch_attention_enabled", lambda: True)


def _run(model, steps=3, context="t2v.context", cfg=1.0, callback=None):
    data = goldens.load("rcm")
    guider = comfy.samplers.CFGGuider(model)
    prompt = in_comfyui.pad_context(data[context])
    guider.inner_set_conds({"positive": [[prompt, {}]], "negative": [[prompt / 2, {}]]})
    guider.set_cfg(cfg)
    noise = data["t2v.noise0"]
    sigmas, options = rcm_sigmas(steps, 80), {"disable_pbar": True, "callback": callback}
    return guider.sample(noise, torch.zeros_like(noise), rcm_sampler("ode"), sigmas, **options)


def _reserved(model, monkeypatch):
    """What the host is asked to keep free of weights in a run of `model`."""
    asked, load = [], comfy.model_management.load_models_gpu

    def recording(models, memory_required=0, minimum_memory_required=None, **options):
        asked.append((memory_required, minimum_memory_required))
        load(models, memory_required, minimum_memory_required=minimum_memory_required, **options)

    with monkeypatch.context() as only_here:
        only_here.setattr(comfy.model_management, "load_models_gpu", recording)
        _run(model, steps=1)
    assert "memory_required" not in vars(model.model)
    return asked[0]


def test_a_run_asks_for_what_its_blocks_take(model, on_a_gpu, monkeypatch):
    shape, wan = goldens.load("rcm")["t2v.noise0"].shape, model.model.diffusion_model
    network = Network(wan.dim, wan.ffn_dim, wan.num_heads, wan.num_layers)
    tokens = shape[2] * shape[3] * shape[4] // 4
    fp8 = sparse_attention.default_pv(model.load_device) == "fp8"
    topk = model.model_options["transformer_options"][ATTENTION]["topk"]
    both = [fused_bytes(network, b, tokens, "sagesla", fp8, 2 * b, topk=topk) for b in (2, 1)]
    assert _reserved(model, monkeypatch) == tuple(both)
    dense = patch_attention(model, SLASettings("sagesla", dense_steps=1))
    assert _reserved(dense, monkeypatch)[0] >= both[0]


def _patched(model):
    model.add_object_patch("diffusion_model.blocks.1.ffn.forward", lambda x: x)


def _compiled(model):
    def compiled(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    model.add_wrapper_with_key("apply_model", "torch.compile", compiled)


def _replaced(model):
    def block(args, extra):
        return extra["original_block"](args)

    model.set_model_patch_replace(block, "dit", "double_block", 0)


@pytest.mark.parametrize("change", [_patched, _compiled, _replaced])
def test_the_hosts_figure_where_a_block_may_not_run_fused(model, on_a_gpu, monkeypatch, change):
    shape = list(goldens.load("rcm")["t2v.noise0"].shape)
    host = [model.model.memory_required([b, *shape[1:]]) for b in (2, 1)]
    assert _reserved(model, monkeypatch) != tuple(host)
    change(model)
    assert _reserved(model, monkeypatch) == pytest.approx(host)


def test_the_hosts_figure_holds_where_gradients_are_asked_for(model, on_a_gpu):
    reason = functools.partial(memory.why_the_hosts_figure, model, {}, model.model_options)
    assert reason() is None
    with torch.inference_mode(False):
        assert reason() == GRADIENTS


def test_the_hosts_figure_holds_without_kernels(model, monkeypatch):
    shape = list(goldens.load("rcm")["t2v.noise0"].shape)
    if torch.cuda.is_available():
        monkeypatch.setattr(memory, "triton_unavailable", lambda device: "this is a test")
    host = [model.model.memory_required([b, *shape[1:]]) for b in (2, 1)]
    assert _reserved(model, monkeypatch) == pytest.approx(host)


# The text, once a run


def _linears_that_run(monkeypatch):
    ran, product = [], block.int8_product

    def noted(op, *args, **options):
        ran.append(op)
        return product(op, *args, **options)

    for module in (block, cross_attention):
        monkeypatch.setattr(module, "int8_product", noted)
    return ran


def _of_the_text(model):
    attentions = [wan_block.cross_attn for wan_block in model.model.diffusion_model.blocks]
    return [op for attn in attentions for op in (attn.k, attn.v)]


@contextlib.contextmanager
def _kept_nowhere(monkeypatch):
    with monkeypatch.context() as only_here:
        only_here.setattr(per_run, "current", lambda: None)
        yield


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_keys_and_values_of_the_text_are_made_once_a_run(model, monkeypatch, cfg):
    monkeypatch.setattr(text, "MOST_KEYS", 0)  # padding as one key rounds otherwise
    with _kept_nowhere(monkeypatch):
        every_step = _run(model, cfg=cfg)
    ran = _linears_that_run(monkeypatch)
    assert torch.equal(_run(model, cfg=cfg), every_step)
    times = {sum(op is other for other in ran) for op in _of_the_text(model)}
    # Both prompts go together here, or apart where the host finds them to take too much.
    assert times == {1} or (cfg > 1 and times == {2})
    ran.clear()
    _run(model)
    assert {sum(op is other for other in ran) for op in _of_the_text(model)} == {1}


@pytest.mark.skipif(in_comfyui.DYNAMIC, reason="the queue of weights asks for the text at once")
def test_texts_are_compared_once_the_host_has_made_python_wait(model, monkeypatch):
    """Which it does for the frequencies of the timestep, that it copies from the CPU. But not
    before one pass knew its text: room for another would come to lie between activations."""
    events, wan = [], comfy.ldm.wan.model
    for event, module, name, function in (
        ("embedded", wan, "sinusoidal_embedding_1d", wan.sinusoidal_embedding_1d),
        ("compared", torch, "equal", torch.equal),
    ):
        note = functools.partial(events.append, event)
        monkeypatch.setattr(module, name, lambda *a, f=function, note=note: note() or f(*a))
    _run(model, steps=4)
    first, second, *later = ["embedded"], ["compared", "embedded"], *2 * [["embedded", "compared"]]
    assert events == [*first, *second, *itertools.chain(*later)]


def test_in_training_nothing_is_kept(model):
    def executor(*_):
        return per_run.current()

    options = {"conds": {}, "model_patcher": model, "model_options": model.model_options}
    executor.class_obj = types.SimpleNamespace(**options)
    latent = goldens.load("rcm")["t2v.noise0"]
    assert patch._around_run(executor, latent) is not None
    with torch.inference_mode(False):
        assert patch._around_run(executor, latent) is None


def test_where_weights_change_within_a_run_nothing_is_kept(model, monkeypatch):
    monkeypatch.setattr(patch, "has_hooks", lambda conds: True)
    ran = _linears_that_run(monkeypatch)
    _run(model)
    assert {sum(op is other for other in ran) for op in _of_the_text(model)} == {3}


WRAPPER = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL


def _text_replaced(model):
    def scaled(scales, args, extra):
        return extra["original_block"]({**args, "txt": args["txt"] * next(scales)})

    for index in range(2):
        block = functools.partial(scaled, itertools.cycle((1, 2, 3)))
        model.set_model_patch_replace(block, "dit", "double_block", index)


def _text_wrapped(model):
    scales = itertools.cycle((1, 2, 3))

    def wrapper(executor, x, t, context, *args, **more):
        return executor(x, t, context * next(scales), *args, **more)

    model.add_wrapper_with_key(WRAPPER, "another node", wrapper)


def _text_embedded_otherwise(model):
    scales, own = itertools.cycle((1, 2, 3)), model.model.diffusion_model.text_embedding[0]
    forward = type(own).forward
    name = "diffusion_model.text_embedding.0.forward"
    model.add_object_patch(name, lambda x: forward(own, x) * next(scales))


def _run_otherwise(model):
    scales, wan = itertools.cycle((1, 2, 3)), model.model.diffusion_model

    def forward_orig(x, t, context, **more):
        return type(wan).forward_orig(wan, x, t, context * next(scales), **more)

    model.add_object_patch("diffusion_model.forward_orig", forward_orig)


@pytest.mark.parametrize(
    "change", [_text_replaced, _text_wrapped, _text_embedded_otherwise, _run_otherwise]
)
def test_a_text_that_another_node_changes_from_step_to_step_is_not_kept(model, monkeypatch, change):
    change(model)
    with _kept_nowhere(monkeypatch):
        expected = _run(model)
    assert torch.equal(_run(model), expected)


def test_a_text_is_kept_where_ranks_share_the_pass_behind(model, monkeypatch):
    ran, shared = _linears_that_run(monkeypatch), split_over(model, Ranks(None))
    rounding = shared.wrappers[WRAPPER].pop(TIMESTEP, [round_timesteps])
    shared.wrappers[WRAPPER][TIMESTEP] = rounding  # behind as well
    assert list(shared.wrappers[WRAPPER]) == [ATTENTION, SPLIT, TIMESTEP]
    _run(shared)
    assert {sum(op is other for other in ran) for op in _of_the_text(model)} == {1}


def test_keys_and_values_are_those_of_one_network_and_two_texts():
    high, low = (types.SimpleNamespace(blocks=[None] * 3, dim=16) for _ in range(2))
    texts = [torch.arange(32.0).view(1, 4, 8) + number for number in range(3)]

    def keys_values(network, context):
        return text.keys_values(network, context, torch.float16, fused=True)

    assert keys_values(high, texts[0]) is not keys_values(high, texts[0])
    with per_run.keep():
        made = [keys_values(high, one) for one in texts[:2]]
        again = [keys_values(high, one.clone()) for one in texts[:2]]
        assert all(a is b for a, b in zip(again, made, strict=True))
        assert keys_values(high, texts[0].half()) is not made[0]
        keys_values(high, texts[2])
        assert keys_values(high, texts[1]) is not made[1]
        kept = keys_values(high, texts[2])
        assert [kept.room.shape, kept.room.dtype] == [(3, 2, 1, 4, 16), torch.float16]
        assert text.will_be_known(high) and not text.will_be_known(low)
        keys_values(low, texts[2])
        assert not text.will_be_known(high) and not text.will_be_known(low)
        assert keys_values(high, texts[2]) is not kept


def test_keys_and_values_lie_in_one_tensor_where_they_fit():
    k, v = torch.rand(2, 1, 4, 16)
    for room, within in ((torch.empty(3, 2, 1, 4, 16), True), (torch.empty(3, 2, 1, 9, 16), False)):
        made = text.KeysValues(room)
        made.keep(1, k, v)
        assert all(map(torch.equal, made[1], (k, v)))
        assert (made[1][0].data_ptr() == room[1, 0].data_ptr()) is within
        assert list(made) == [1]
