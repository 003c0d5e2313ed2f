"""Room on the GPU for the model that runs next: made at once, or left to the other expert."""

import functools
import types

import first_attention
import fresh_process
import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core.host import experts as switch
from turbodiffusion_pack.turbo_core.host import patch, room, split_worker
from turbodiffusion_pack.turbo_core.host.experts import switch_experts
from turbodiffusion_pack.turbo_core.host.int8_tensor import is_int8, unpack
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.operations import Linear
from turbodiffusion_pack.turbo_core.host.patch_owner import mark_as_ours
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas

management = comfy.model_management
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
SIGMAS = rcm_sigmas(4, 200)  # two steps above 0.9, two below


class _Dynamic:
    """A MODEL of so many bytes under dynamic VRAM, so many of them on the GPU."""

    def __init__(self, size, there, device=GPU, dynamic=True):
        self.size, self.there, self.dynamic = size, there, dynamic
        self.load_device, self.offload_device, self.model = device, CPU, self

    def is_dynamic(self):
        return self.dynamic

    def model_size(self):
        return self.size

    def loaded_size(self):
        return self.there

    def is_clone(self, other):
        return other.model is self.model

    def partially_unload(self, device, size):
        freed = min(self.there, size)
        self.there -= freed
        return freed


@pytest.fixture
def card(monkeypatch):
    """Puts MODELs on a card with so much free memory, the one that was loaded last first."""

    def put(free, *models):
        loaded = [types.SimpleNamespace(model=model, device=model.load_device) for model in models]
        monkeypatch.setattr(management, "current_loaded_models", loaded)
        monkeypatch.setattr(management, "get_free_memory", lambda _: free)

    monkeypatch.setattr(management, "minimum_inference_memory", lambda: 1)
    activations = comfy.sampler_helpers, "estimate_memory", lambda *_: (8, 4)
    monkeypatch.setattr(*activations)
    return put


def _loading(model):
    done = []
    assert room.around_loading(lambda *a, **k: done.append((a, k)) or "loaded", model, (), {})
    return done == [((model, (), {}), {"model_options": None})]


@pytest.mark.parametrize(
    ("free", "last", "first"), [(19, 15, 2), (18, 15, 1), (10, 8, 0), (0, 0, 0)]
)
def test_others_give_up_what_a_model_lacks_at_once(card, free, last, first):
    """14 of its own, 4 of activations, 1 that the host keeps free; what came first goes first."""
    model, others = _Dynamic(15, 1), (_Dynamic(15, 15), _Dynamic(2, 2))
    card(free, *others)
    assert _loading(model)
    assert [other.there for other in others] == [last, first]


def test_nothing_else_gives_up_memory(card):
    """A clone, a model that the host moves as a whole, one on another GPU, one that is gone."""
    model, clone = _Dynamic(15, 5), _Dynamic(15, 5)
    clone.model = model
    others = _Dynamic(9, 9, dynamic=False), _Dynamic(9, 9, torch.device("cuda", 1))
    card(0, clone, *others)
    gone = types.SimpleNamespace(model=None, device=GPU)
    management.current_loaded_models.append(gone)
    assert _loading(model)
    assert clone.there == 5
    assert [other.there for other in others] == [9, 9]


def test_the_host_makes_room_itself_for_a_model_that_it_moves_as_a_whole(card):
    other = _Dynamic(15, 15)
    card(0, other)
    assert _loading(_Dynamic(15, 0, dynamic=False))
    assert other.there == 15


class _Pages:
    """Those of a MODEL on the GPU; how many bytes of weights they are for at most, None for all."""

    most = None

    def prioritize(self):
        self.most = None

    def deprioritize(self):
        pass

    def set_watermark(self, size):
        self.most = size


def _with_pages(model, pages):
    model.dynamic_vbars = {GPU: pages}
    model.memory_required = mark_as_ours(lambda shape: 4)  # told to the host
    return model


@pytest.mark.parametrize("guest", [False, True])
@pytest.mark.parametrize(
    ("free", "there", "most"), [(4, 0, 0), (9, 0, 4), (9, 3, 7), (19, 0, 14), (20, 0, None)]
)
def test_weights_have_no_pages_that_activations_take_again(card, free, there, most, guest):
    """15 of its own; 4 of activations and 1 that the host keeps free are not theirs."""
    pages = _Pages()
    model = _with_pages(_Dynamic(15, there), pages)
    card(free)
    options = room.as_guest_of(_Dynamic(15, 15), {"transformer_options": {}}) if guest else {}
    room.around_loading(lambda *_, **__: pages.prioritize(), model, (), {}, options)
    assert pages.most == most


@pytest.mark.parametrize("why", ["the host's figure", "another's", "an older host", "not loaded"])
def test_else_the_host_decides_about_pages(card, why):
    pages = types.SimpleNamespace(deprioritize=None) if why == "an older host" else _Pages()
    model = _with_pages(_Dynamic(15, 0), pages)
    if why == "the host's figure":
        del model.memory_required
    elif why == "another's":
        model.memory_required = lambda shape: 4
    elif why == "not loaded":
        model.dynamic_vbars = {}
    card(0)
    room.around_loading(lambda *_, **__: None, model, (), {})
    assert getattr(pages, "most", None) is None


# Two experts


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return str(goldens.unpack_checkpoint("t2v-quant.pth", folder))


@pytest.fixture
def experts(path, monkeypatch):
    """Two experts of other weights, for a host that streams what it has no room for."""
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)
    high, low = load_turbo_model(path), load_turbo_model(path)
    for op in low.model.modules():
        if isinstance(op, Linear) and is_int8(op.weight):
            unpack(op.weight)[0].add_(1)
    return high, low


def _run(high, low, sigmas=SIGMAS, **cond):
    guider = comfy.samplers.CFGGuider(switch_experts(high, low, 0.9))
    data = goldens.load("rcm")
    guider.inner_set_conds({"positive": [[in_comfyui.pad_context(data["t2v.context"]), cond]]})
    noise = data["t2v.noise0"]
    start = torch.zeros_like(noise)
    return guider.sample(noise, start, rcm_sampler("ode"), sigmas, disable_pbar=True, seed=0)


@pytest.fixture
def guests(experts, monkeypatch):
    """Of each load of the host: which expert, and whether it could unload the high-noise one."""
    loads, load, (high, low) = [], management.load_models_gpu, experts
    names = {high.model: "high", low.model: "low"}

    def recording(models, *args, **kwargs):
        there = [one.model for one in management.current_loaded_models]
        loads.append((names[models[0].model], any(map(high.is_clone, filter(None, there)))))
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", recording)
    return loads


legacy = pytest.mark.skipif(in_comfyui.DYNAMIC, reason="dynamic VRAM unloads no model for another")


@legacy
def test_an_expert_of_few_steps_comes_beside_the_other(experts, guests):
    _run(*experts)
    _run(*experts)
    assert guests == [("high", False), ("low", False), ("high", True), ("low", False)]
    there = [one.model for one in management.current_loaded_models]
    assert all(any(map(model.is_clone, there)) for model in experts)


@legacy
@pytest.mark.parametrize(
    "why", ["more steps", "a LoRA", "a scheduled LoRA", "another loader's", "streamed itself"]
)
def test_else_they_change_places(experts, guests, monkeypatch, why):
    (high, low), sigmas, cond = experts, SIGMAS, {}
    if why == "more steps":
        sigmas = rcm_sigmas(5, 200)
        assert (sigmas[:-1] < 0.9).sum() == 3
    elif why == "a LoRA":
        low = low.clone()
        name = next(n for n, _ in low.model.named_parameters() if n.endswith("self_attn.q.weight"))
        low.add_patches({name: ("diff", (torch.zeros(low.model.state_dict()[name].shape),))})
    elif why == "a scheduled LoRA":
        cond = {"hooks": comfy.hooks.create_hook_lora({}, 1.0, 1.0)}
    elif why == "another loader's":
        monkeypatch.setattr(switch, "Linear", torch.nn.Linear)
    else:
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "loaded_size", lambda _: 1)
    _run(high, low, sigmas, **cond)
    assert guests == [("high", False), ("low", True)]


@legacy
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vram_state", management.VRAMState.HIGH_VRAM),  # --highvram
        ("vram_state", management.VRAMState.SHARED),  # Apple
        ("lowvram_available", False),  # DirectML
        ("DISABLE_SMART_MEMORY", True),
    ],
)
def test_they_change_places_where_the_host_loads_models_as_a_whole(
    experts, guests, monkeypatch, name, value
):
    """Both at once might not fit."""
    monkeypatch.setattr(management, name, value)
    _run(*experts)
    assert guests == [("high", False), ("low", True)]


def test_the_expert_that_stays_keeps_its_place_among_models(card):
    """Behind what was loaded since, before what came earlier, which is the first to go."""
    newer, high, decoder, text = (_Dynamic(5, 5) for _ in range(4))
    card(0, newer, high, decoder, text)
    loaded, low = management.current_loaded_models, _Dynamic(5, 0)
    entry, guest = loaded[1], types.SimpleNamespace(model=low, device=GPU)

    def load(*_, **__):
        assert entry not in loaded
        loaded.pop()  # makes room
        loaded.insert(0, guest)

    room.around_loading(load, low, (), {}, room.as_guest_of(high, {"transformer_options": {}}))
    assert [one.model for one in loaded] == [low, newer, high, decoder]
    assert not entry.currently_used


@legacy
@pytest.mark.parametrize(("loaded", "freed"), [(0.2, 0.2), (1.0, None)])
def test_a_guest_leaves_what_it_had_of_the_gpu(experts, monkeypatch, loaded, freed):
    """Unless all of it is there, which then has room."""
    calls, size = [], experts[1].model_size()
    patcher = comfy.model_patcher.ModelPatcher
    monkeypatch.setattr(patcher, "loaded_size", lambda self: loaded * size)
    monkeypatch.setattr(
        patcher, "partially_unload", lambda self, device, size: calls.append((self, size))
    )
    _run(*experts)
    assert calls == ([] if freed is None else [(experts[1], freed * size)])


@legacy
def test_where_the_guest_does_not_load_the_other_is_known_still(experts, monkeypatch):
    high, low = experts
    load = management.load_models_gpu

    def fails_for_low(models, *args, **kwargs):
        if models[0].model is low.model:
            raise RuntimeError("no room")
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", fails_for_low)
    with pytest.raises(RuntimeError, match="no room"):
        _run(high, low)
    assert any(high.is_clone(one.model) for one in management.current_loaded_models)


@pytest.mark.skipif(not in_comfyui.DYNAMIC, reason="only dynamic VRAM has pages")
def test_pages_go_to_the_expert_that_stays(experts, monkeypatch):
    import comfy_aimdo.model_vbar

    order = []
    for name in ("prioritize", "deprioritize"):
        call = functools.partial(lambda self, name: order.append((self, name)), name=name)
        monkeypatch.setattr(comfy_aimdo.model_vbar.ModelVBAR, name, lambda *_, c=call: c(*_))
    _run(*experts)
    high, low = (next(iter(model.model.dynamic_vbars.values())) for model in experts)
    wanted = [(high, "prioritize"), (low, "prioritize"), (low, "deprioritize")]
    assert order == wanted


@pytest.mark.skipif(not in_comfyui.DYNAMIC, reason="only dynamic VRAM has pages")
@pytest.mark.parametrize("left", [0, 0.5])
def test_bits_are_the_same_with_fewer_pages(experts, monkeypatch, left):
    """And with the next load each has as many as before."""
    expected = _run(*experts)
    size = experts[0].model_size()
    assert all(model.loaded_size() >= size for model in experts)
    page = 2**25 if torch.cuda.is_available() else 1  # bytes, all that comfy-aimdo gives
    most = -(-left * size // page) * page + 2**20  # what is loaded at once is small
    none = {True: (0, 0), False: 0}
    free = lambda *_, torch_free_too=False: none[torch_free_too]  # noqa: E731
    taken = lambda model, *_: model.loaded_size() - left * size  # noqa: E731
    with monkeypatch.context() as short:
        short.setattr(room, "is_told", lambda model: True)
        short.setattr(room, "_taken_beside", taken)
        short.setattr(management, "get_free_memory", free)
        assert torch.equal(_run(*experts), expected)
        assert all(model.loaded_size() <= most for model in experts)
    assert torch.equal(_run(*experts), expected)
    assert all(model.loaded_size() >= size for model in experts)


# Bits


def test_attention_is_in_order_before_a_run(experts, monkeypatch):
    settled = []
    monkeypatch.setattr(patch, "settle", lambda device: settled.append((device, bool(ran))))
    ran = []
    ffn = experts[0].model.diffusion_model.blocks[0].ffn
    monkeypatch.setattr(ffn, "forward", lambda x, f=ffn.forward: ran.append(1) or f(x))
    _run(*experts)
    device = experts[0].load_device
    assert settled
    assert set(settled) == {(device, False)}


def test_a_workers_attention_is_in_order_before_its_first_pass(experts, monkeypatch):
    settled = []
    monkeypatch.setattr(split_worker, "settle", settled.append)
    split_worker._load(experts[0], (1, 16, 3, 16, 16))
    assert settled == [experts[0].load_device]


@pytest.mark.gpu
def test_the_first_attention_has_the_bits_of_later_ones():
    assert fresh_process.call(first_attention.equals_the_second, True)
