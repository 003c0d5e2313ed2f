"""SLA on a stock Wan MODEL with the projections of a TurboDiffusion file."""

import gc
import logging

import goldens
import in_comfyui
import model_folders
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.nodes.attention import SLAAttentionPatch
from turbodiffusion_pack.nodes.quantize import W8A8Quantize
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.checkpoint.names import PROJ_L
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.projections import attach_projections
from turbodiffusion_pack.turbo_core.host.save import save_turbo_model

FOLDER = "diffusion_models"
FILE = "t2v.pth"
NO_BRANCH = "no proj_l so no linear branch"
# A GPU computes in 16 bits, the CPU in fp32.
EXACT = 1e-2 if torch.cuda.is_available() else 1e-5

pytestmark = pytest.mark.usefixtures("info_log")


@pytest.fixture
def info_log(caplog):
    caplog.set_level(logging.INFO)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of diffusion models: the golden checkpoints, plain.pth and others.pth.

    plain.pth has no projections, others.pth has other ones.
    """
    folder = tmp_path_factory.mktemp("models")
    for name in (FILE, "t2v-quant.pth"):
        goldens.unpack_checkpoint(name, folder)
    tensors = torch.load(folder / FILE, weights_only=True)
    torch.save({n: t for n, t in tensors.items() if PROJ_L not in n}, folder / "plain.pth")
    others = {n: t.flip(0) if PROJ_L in n else t for n, t in tensors.items()}
    torch.save(others, folder / "others.pth")
    with model_folders.listed(FOLDER, folder):
        yield folder


def _stock(folder):
    """The golden model through ComfyUI's own loader, which knows no projections."""
    tensors = dict(read_checkpoint(folder / FILE).tensors)
    return comfy.sd.load_diffusion_model_state_dict(
        tensors, model_options={"dtype": torch.bfloat16}
    )


@pytest.fixture(scope="module")
def stock(folder):
    return _stock(folder)


def _patch(model, projections="none", attention="sla"):
    return SLAAttentionPatch.execute(model, attention, 0.34, "", 0, "auto", projections).args[0]


def _run(model):
    """One step through ComfyUI's guider."""
    noise = torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([0.99, 0.0])
    return in_comfyui.sample(model, sampler, sigmas, noise, goldens.load("rcm")["t2v.context"])


@pytest.fixture
def line(caplog):
    """Returns the report line of the last run."""
    return lambda: [m for m in caplog.messages if "forward pass" in m][-1]


@pytest.fixture(scope="module")
def expected(folder):
    """The same model from our own loader, by the file its projections come from."""

    def run(name):
        model = load_turbo_model(str(folder / name))
        # Rounded timesteps are for TurboDiffusion's checkpoints, other loaders' models have none.
        model.remove_wrappers_with_key("diffusion_model", "turbodiffusion.timestep")
        return _run(_patch(model))

    return {name: run(name) for name in (FILE, "others.pth", "plain.pth")}


def _names(model):
    return {name for name, _ in model.model.named_parameters()}


# What it does


def test_without_projections_it_is_top_k_attention_and_says_so(stock, line, expected):
    out = _run(_patch(stock))
    assert f"SLA in 2 of 2 blocks; sla top-k 0.34 (16 bit, {NO_BRANCH}) in blocks 0-1" in line()
    assert goldens.relative_error(out, expected["plain.pth"]) < EXACT


@pytest.mark.parametrize("name", [FILE, "others.pth"])
def test_projections_make_it_a_turbodiffusion_model(stock, line, expected, name):
    out = _run(_patch(stock, name))
    assert "SLA in 2 of 2 blocks; sla top-k 0.34 (16 bit) in blocks 0-1" in line()
    assert goldens.relative_error(out, expected[name]) < EXACT
    (other,) = {FILE, "others.pth"} - {name}
    assert goldens.relative_error(out, expected[other]) > 5e-3
    assert goldens.relative_error(out, expected["plain.pth"]) > 5e-3


def test_projections_of_an_int8_file(stock, expected):
    """They are the same as in the plain one."""
    assert goldens.relative_error(_run(_patch(stock, "t2v-quant.pth")), expected[FILE]) < EXACT


def test_the_one_projection_of_simpletuner(stock, folder, line):
    """The same as a checkpoint that has it in every block."""
    tensors = torch.load(folder / FILE, weights_only=True)
    weight, bias = (tensors[f"blocks.0.{PROJ_L}.{part}"] for part in ("weight", "bias"))
    one = {n: {"weight": weight, "bias": bias}.get(n.rpartition(".")[2]) for n in tensors}
    torch.save({n: one[n] if PROJ_L in n else t for n, t in tensors.items()}, folder / "one.pth")
    state = {"128:bf16": {"proj_l.weight": weight, "proj_l.bias": bias}}
    settings = {"topk": 0.2, "feature_map": "softmax", "blkq": 64, "blkk": 64}
    torch.save({"settings": settings, "state": state, "version": 1}, folder / "sla_attention.pt")
    out = _run(_patch(stock, "sla_attention.pt"))
    assert NO_BRANCH not in line()
    assert torch.equal(out, _run(_patch(stock, "one.pth")))


def test_the_host_sees_them_while_the_model_is_loaded(stock):
    model, names = _patch(stock, FILE), _names(stock)
    comfy.model_management.load_models_gpu([model])
    proj_l = {f"diffusion_model.blocks.{i}.self_attn.proj_l" for i in range(2)}
    assert _names(model) == names | {f"{n}.{part}" for n in proj_l for part in ("weight", "bias")}
    saved = model.model.state_dict()
    assert all(saved[f"{name}.weight"].dtype == torch.float32 for name in proj_l)
    assert {saved[f"{name}.weight"].device.type for name in proj_l} == {in_comfyui.DEVICE.type}
    model.detach()
    assert _names(model) == names


def test_the_host_saves_them(stock, tmp_path, expected):
    path = str(tmp_path / "saved.safetensors")
    comfy.sd.save_checkpoint(path, _patch(stock, FILE))
    model = load_turbo_model(path)
    model.remove_wrappers_with_key("diffusion_model", "turbodiffusion.timestep")
    assert goldens.relative_error(_run(_patch(model)), expected[FILE]) < EXACT


def test_the_file_can_go(stock, folder, tmp_path, expected):
    path = tmp_path / "projections.pth"
    path.write_bytes((folder / FILE).read_bytes())
    model = attach_projections(_patch(stock), path)
    gc.collect()
    path.unlink()
    assert goldens.relative_error(_run(model), expected[FILE]) < EXACT


# Beside other clones of the same model


def test_the_shared_model_stays_as_it_was(stock):
    before, names = _run(_patch(stock)), _names(stock)
    modules = [id(module) for module in stock.model.modules()]
    weights = {name: tensor.clone() for name, tensor in stock.model.state_dict().items()}
    _run(_patch(stock, FILE))
    assert torch.equal(_run(_patch(stock)), before)
    assert _names(stock) == names
    assert [id(module) for module in stock.model.modules()] == modules
    for name, tensor in stock.model.state_dict().items():
        assert torch.equal(tensor.cpu(), weights[name].cpu())
    assert not stock.injections
    assert not stock.callbacks.get("on_clone")


def test_clones_with_and_without_take_turns(stock, expected):
    models = {FILE: _patch(stock, FILE), "plain.pth": _patch(stock)}
    models["others.pth"] = _patch(models["plain.pth"], "others.pth")
    for name in (FILE, "plain.pth", "others.pth", FILE, FILE, "others.pth", "plain.pth"):
        assert goldens.relative_error(_run(models[name]), expected[name]) < EXACT, name


def test_a_clone_keeps_them(stock, expected):
    model = _patch(stock, FILE)
    _run(model)
    for clone in (model.clone(), model.clone().clone(), _patch(model)):
        assert goldens.relative_error(_run(clone), expected[FILE]) < EXACT


def test_the_last_file_counts(stock, expected):
    model = _patch(_patch(stock, FILE), "others.pth")
    assert goldens.relative_error(_run(model), expected["others.pth"]) < EXACT
    assert len(model.callbacks["on_clone"]["turbodiffusion.projections"]) == 1


def test_a_clone_that_goes_takes_nothing_with_it(stock):
    model = _patch(stock, FILE)
    comfy.model_management.load_models_gpu([model])
    clone = model.clone()
    clone.add_patches({})  # the host ejects and injects around it, as around a LoRA
    del clone
    gc.collect()
    assert hasattr(model.model.diffusion_model.blocks[1].self_attn, "proj_l")
    without = _patch(stock)
    comfy.model_management.load_models_gpu([without])
    assert not hasattr(model.model.diffusion_model.blocks[1].self_attn, "proj_l")


def test_a_model_that_goes_takes_them_with_it(folder):
    stock = _stock(folder)
    before = _run(_patch(stock))
    _run(_patch(stock, FILE))
    gc.collect()
    assert not hasattr(stock.model.diffusion_model.blocks[0].self_attn, "proj_l")
    assert torch.equal(_run(_patch(stock)), before)


def _quantized(stock, order):
    """`stock` with its own projections attached, in INT8."""
    if order == "projections first":
        return W8A8Quantize.execute(_patch(stock, FILE), "exact", False).args[0]
    return _patch(W8A8Quantize.execute(stock, "exact", False).args[0], FILE)


ORDERS = ("projections first", "quantized first")


@pytest.mark.parametrize("order", ORDERS)
def test_beside_quantized_weights(stock, folder, line, order):
    reference = W8A8Quantize.execute(load_turbo_model(str(folder / FILE)), "exact", False).args[0]
    reference.remove_wrappers_with_key("diffusion_model", "turbodiffusion.timestep")
    out = _run(_quantized(stock, order))
    assert "SLA in 2 of 2 blocks; sla top-k 0.34 (16 bit) in blocks 0-1; fused in" in line()
    assert goldens.relative_error(out, _run(_patch(reference))) < max(EXACT, 1e-3)
    assert not hasattr(stock.model.diffusion_model.blocks[0].self_attn, "proj_l")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_quantized_model_is_saved_with_them(stock, folder, tmp_path, order, loaded):
    model, path = _quantized(stock, order), tmp_path / "saved.safetensors"
    expected = _run(model)
    if not loaded:
        model.detach()
    save_turbo_model(model, path)
    checkpoint = read_checkpoint(path)
    originals = (tensor for pair in read_checkpoint(folder / FILE).proj_l for tensor in pair)
    saved = (tensor for pair in checkpoint.proj_l for tensor in pair)
    assert all(torch.equal(*pair) for pair in zip(saved, originals, strict=True))
    assert checkpoint.quantized
    again = load_turbo_model(str(path), "exact")
    again.remove_wrappers_with_key("diffusion_model", "turbodiffusion.timestep")
    assert goldens.relative_error(_run(_patch(again)), expected) < EXACT


def test_only_the_clone_that_has_them_is_saved_with_them(stock, tmp_path):
    model, without = _patch(stock, FILE), _patch(stock)
    comfy.model_management.load_models_gpu([model])
    for clone, has_sla in ((without, False), (model, True), (_patch(model), True)):
        path = tmp_path / f"{id(clone)}.safetensors"
        save_turbo_model(clone, path)
        assert read_checkpoint(path).has_sla is has_sla


def test_a_saved_workflow_without_the_input_runs(stock, expected):
    inputs = SLAAttentionPatch.define_schema().inputs
    assert [i.id for i in inputs][-1] == "projections"
    assert (inputs[-1].optional, inputs[-1].default) == (True, "none")
    model = SLAAttentionPatch.execute(stock, "sla", 0.34, "", 0, "auto").args[0]
    assert goldens.relative_error(_run(model), expected["plain.pth"]) < EXACT
    assert not model.injections


# Faults


def test_a_file_without_projections_is_refused(stock):
    with pytest.raises(ValueError, match=r"^plain\.pth has no SLA projections.*Choose .*none"):
        _patch(stock, "plain.pth")


def test_a_model_with_its_own_is_refused(folder):
    model = load_turbo_model(str(folder / FILE))
    with pytest.raises(ValueError, match=r"from its own file already.*Set projections to none"):
        _patch(model, "others.pth")


SIZES = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2}
UNFIT = {
    "blocks": ({"num_layers": 3}, "a model of 2 blocks, this MODEL has 3"),
    "channels": ({"dim": 384, "num_heads": 3}, "a model of 256 channels, this MODEL has 384"),
    "channels per head": (
        {"num_heads": 4},
        "a model of 128 channels per head, this MODEL has 64",
    ),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_a_file_of_another_size_is_refused(folder, unfit):
    sizes, match = UNFIT[unfit]
    holder = torch.nn.Module()
    holder.diffusion_model = comfy.ldm.wan.model.WanModel(
        **{**SIZES, **sizes}, operations=comfy.ops.manual_cast, device="meta"
    )
    model = comfy.model_patcher.ModelPatcher(holder, in_comfyui.DEVICE, torch.device("cpu"))
    with pytest.raises(ValueError, match=rf"^t2v\.pth has the SLA .* {match}\. Choose the Turbo"):
        attach_projections(model, folder / FILE)


def test_a_model_that_is_not_wan_is_refused(folder):
    holder = torch.nn.Module()
    holder.diffusion_model = torch.nn.Linear(2, 2)
    model = comfy.model_patcher.ModelPatcher(holder, in_comfyui.DEVICE, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"needs a Wan MODEL.*got Linear"):
        attach_projections(model, folder / FILE)


def test_a_broken_file_is_refused(stock, folder):
    (folder / "cut.pth").write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pth.*truncated") as caught:
        _patch(stock, "cut.pth")
    assert caught.type is ValueError


def test_a_file_that_is_not_there_is_refused(stock):
    assert SLAAttentionPatch.validate_inputs() is True
    assert SLAAttentionPatch.validate_inputs(FILE) is True
    told = SLAAttentionPatch.validate_inputs("not_there.pth")
    for part in ("'not_there.pth'", "not in models/diffusion_models", "press R", "choose none"):
        assert part in told
    assert SLAAttentionPatch.validate_inputs(None) is True
    with pytest.raises(FileNotFoundError) as caught:
        _patch(stock, "not_there.pth")
    assert str(caught.value) == f"projections {told}"
