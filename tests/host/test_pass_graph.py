"""A forward pass as one CUDA graph: when it is captured, when it is dropped, and that it is right.

Without a GPU a stand-in for the graph computes the captured pass again, from its own inputs.
"""

import logging
import types

import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core import run_report
from turbodiffusion_pack.turbo_core.host import pass_graph, per_run
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.options import SPLIT
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

FIRST = 2  # passes before one is captured
needs_resident = pytest.mark.skipif(
    in_comfyui.DYNAMIC, reason="dynamic VRAM moves the weights by itself"
)


class Pace:
    """Passes that Python takes all of the time to launch."""

    launching, whole, done = 100.0, 100.0, True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def over(self):
        return self.done

    def ms(self):
        return self.launching, self.whole


class Graph:
    """Computes the captured pass again, with the decisions it was captured with."""

    made, size, card_memory = [], 1, 100

    def __init__(self, run, inputs):
        self.inputs = {name: x.clone() for name, x in inputs.items()}
        self.run, self.replays, self.dropped = run, 0, False
        with run_report.noting() as self.notes:
            run(self.inputs)
        self.made.append(self)

    def replay(self, inputs):
        assert not self.dropped
        self.replays += 1
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        run_report.note_replayed(self.notes)
        with run_report.noting():
            return self.run(self.inputs)

    def drop(self):
        self.dropped = True


@pytest.fixture
def graphs(monkeypatch, caplog):
    """The graphs that were made, of stand-ins, on any device."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pass_graph, "_device_problem", lambda device: None)
    monkeypatch.setattr(pass_graph, "EAGER_PASSES", FIRST)
    monkeypatch.setattr(pass_graph, "Graph", Graph)
    monkeypatch.setattr(pass_graph, "Pace", Pace)
    monkeypatch.setattr(Graph, "made", [])
    pass_graph._followed.clear()
    yield Graph.made
    pass_graph._followed.clear()


@pytest.fixture(scope="module")
def loaded(paths):
    return load_turbo_model(paths[0])


@pytest.fixture
def model(loaded):
    model = patched(loaded)
    comfy.model_management.load_models_gpu([model])
    yield model
    model.detach()


def patched(model, topk=0.34, **settings):
    return patch_attention(model, SLASettings("sla", topk, **settings))


def latent(frames=2, seed=0):
    return torch.randn(1, 16, frames, 8, 8, generator=torch.Generator().manual_seed(seed))


def context(seed=0):
    return torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(seed))


def run(model, x=None, text=None, timestep=900.0):
    x = latent() if x is None else x
    return in_comfyui.apply(model, x, context() if text is None else text, timestep)


def passes(model, n=FIRST + 1):
    for _ in range(n):
        run(model)


@needs_resident
def test_passes_that_python_holds_back_become_a_graph(model, graphs, caplog):
    passes(model, FIRST)
    assert graphs == []
    others = [(latent(seed=1), context(), 900.0), (latent(), context(1), 900.0)]
    others += [(latent(), context(), 500.0), (latent(seed=2), context(2), 100.0)]
    found = [run(model, *other) for other in others]
    assert [graph.replays for graph in graphs] == [len(others)]
    assert "launching takes 100 of a pass's 100 ms" in caplog.text
    pass_graph._followed.clear()
    for other, out in zip(others, found, strict=True):
        assert torch.equal(out, run(model, *other))


@needs_resident
def test_a_graph_keeps_nothing_of_a_prompt(model, graphs):
    """What a run keeps of its prompt, eager passes take from there."""
    with per_run.keep():
        passes(model)
        found = run(model, text=context(1))
    assert len(graphs) == 1
    pass_graph._followed.clear()
    with per_run.keep():
        assert torch.equal(found, run(model, text=context(1)))


def padded(tokens):
    return torch.cat([context()[:, :tokens], torch.zeros(1, 512 - tokens, 64)], 1)


@needs_resident
def test_a_graph_attends_to_padding_as_eager_passes_do(model, graphs):
    with per_run.keep():
        eager = {tokens: run(model, text=padded(tokens)) for tokens in (40, 20)}
        pass_graph._followed.clear()
        for tokens in 40, 20:
            for _ in range(FIRST + 2):
                assert torch.equal(run(model, text=padded(tokens)), eager[tokens])
    assert [(graph.replays, graph.dropped) for graph in graphs] == [(2, True), (2, False)]


@needs_resident
@pytest.mark.parametrize(
    "pace", [{"launching": 89.0}, {"done": False}], ids=["fast", "no pass over"]
)
def test_passes_that_the_gpu_takes_long_for_stay_as_they_are(model, graphs, monkeypatch, pace):
    """And nobody goes through the whole model before each: the GPU would wait for that."""
    monkeypatch.setattr(pass_graph, "_state", lambda *_: pytest.fail("the model was looked at"))
    for name, value in pace.items():
        monkeypatch.setattr(Pace, name, value)
    passes(model, FIRST + 3)
    assert graphs == []


@needs_resident
def test_a_pass_that_the_gpu_still_runs_is_not_judged(model, graphs):
    passes(model, FIRST)
    pass_graph._followed[model.model.diffusion_model].paces[-1].done = False
    run(model)
    assert len(graphs) == 1


def lora(model):
    key = "diffusion_model.blocks.0.ffn.0.weight"
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    changed = model.clone()
    changed.add_patches({key: ("diff", (torch.ones(weight.shape) / 8,))})
    return load(changed)


def load(model):
    comfy.model_management.load_models_gpu([model])
    return model


def node_patch(model):
    head = model.model.diffusion_model.head
    head.forward = lambda x, e: -type(head).forward(head, x, e)
    return model


def hooked(model):
    norm = model.model.diffusion_model.blocks[1].norm2
    model.hook = norm.register_forward_hook(lambda *_: None)
    return model


def hooked_attention(model):
    """Its forward is this pack's, which does not call the hook."""
    attn = model.model.diffusion_model.blocks[1].self_attn
    model.hook = attn.register_forward_hook(lambda *_: None)
    return model


def moved(model):
    linear = model.model.diffusion_model.blocks[1].ffn[2]
    linear.bias = torch.nn.Parameter(linear.bias + 1, requires_grad=False)
    return model


def compiled_part(model):
    model.model.diffusion_model.head.compile(backend="eager")
    return model


def at_each_use(model):
    model.model.diffusion_model.head.head.weight_function = [lambda weight: -weight]
    return model


def undone(model):
    """Puts a model right again that was not patched through its MODEL."""
    wan = model.model.diffusion_model
    for part in (wan.blocks[1].norm2, wan.blocks[1].self_attn):
        part._forward_hooks.clear()
    wan.head._compiled_call_impl = None
    wan.head.__dict__.pop("forward", None)
    wan.head.head.weight_function = []


CHANGES = {
    "a LoRA": lora,
    "other settings": lambda model: patched(model, topk=1.0),  # of the same weights
    "other settings, loaded": lambda model: load(patched(model, topk=1.0)),
    "dense attention": lambda model: patch_attention(model, SLASettings("dense")),
    "a node's patch": node_patch,
    "a hook": hooked,
    "a hook of an attention": hooked_attention,
    "a weight elsewhere": moved,
    "a compiled part": compiled_part,
    "a weight patched at each use": at_each_use,
}


@needs_resident
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_drops_the_graph(model, graphs, change):
    passes(model)
    (graph,) = graphs
    changed = change(model)
    try:
        out = run(changed, latent(seed=1))
        assert graph.dropped
        pass_graph._followed.clear()
        assert torch.equal(out, run(changed, latent(seed=1)))
    finally:
        undone(model)
        changed.detach()


@needs_resident
@pytest.mark.parametrize(
    "other", [{"x": latent(frames=3)}, {"x": latent().expand(2, -1, -1, -1, -1)}]
)
def test_another_shape_drops_the_graph(model, graphs, other):
    passes(model)
    other["text"] = context().expand(len(other["x"]), -1, -1)
    out = run(model, **other)
    assert graphs[0].dropped
    pass_graph._followed.clear()
    assert torch.equal(out, run(model, **other))
    passes(model)
    assert len(graphs) == 2


@needs_resident
@pytest.mark.parametrize("name", ["allow_tf32", "allow_fp16_accumulation"])
def test_other_rounding_drops_the_graph(model, graphs, monkeypatch, name):
    passes(model)
    now = {n: getattr(torch.backends.cuda.matmul, n, None) for n in pass_graph.ROUNDING}
    other = types.SimpleNamespace(**now | {name: not now.get(name)})
    monkeypatch.setattr(torch.backends.cuda, "matmul", other)
    run(model)
    assert graphs[0].dropped


@needs_resident
def test_giving_up_the_gpu_drops_the_graph(model, graphs):
    passes(model)
    model.clone().detach()
    assert graphs[0].dropped
    load(model)
    passes(model, FIRST)
    assert len(graphs) == 1


def option(name, value):
    def change(model):
        model.model_options["transformer_options"][name] = value

    return change


def wrapper(kind, key):
    def change(model):
        model.add_wrapper_with_key(
            kind, key, lambda executor, *args, **options: executor(*args, **options)
        )

    return change


WRAPPERS = comfy.patcher_extension.WrappersMP
FORWARD = WRAPPERS.DIFFUSION_MODEL
REFUSALS = {
    "an option that nobody here knows": option("rope_options", {"scale_t": 2.0}),
    "attention of a node's own": option(
        "optimized_attention_override", lambda f, *a, **k: f(*a, **k)
    ),
    "patches": option("patches", {"attn1_patch": [lambda given: given["x"]]}),
    "blocks replaced": option(
        "patches_replace", {"dit": {("double_block", 0): lambda a, b: b["original_block"](a)}}
    ),
    "another node around the model": wrapper(FORWARD, "other"),
    "the host's compiler": wrapper(WRAPPERS.APPLY_MODEL, "torch.compile"),
}


@needs_resident
@pytest.mark.parametrize("change", REFUSALS.values(), ids=REFUSALS)
def test_no_graph_where_it_would_not_be_honoured(model, graphs, change):
    passes(model)
    changed = model.clone()
    change(changed)
    passes(load(changed))
    assert graphs[0].dropped
    assert len(graphs) == 1


def test_no_graph_where_gradients_are_asked_for(graphs):
    inputs = {"x": latent(), "timestep": torch.ones(1)}
    assert pass_graph._refusal(inputs, {}, {}) is None
    with torch.inference_mode(False), torch.enable_grad():
        assert "gradients" in pass_graph._refusal(inputs, {}, {})


STRANGE_INPUTS = {
    "a timestep for each token": ({"timestep": torch.ones(1, 8)}, {}),
    "an input on another device": ({"timestep": torch.ones(1, device="meta")}, {}),
    "an input that is no tensor": ({}, {"control": object()}),
}


@pytest.mark.parametrize(("inputs", "others"), STRANGE_INPUTS.values(), ids=STRANGE_INPUTS)
def test_no_graph_of_strange_inputs(graphs, inputs, others):
    inputs = {"x": latent(), "timestep": torch.ones(1)} | inputs
    assert pass_graph._refusal(inputs, others, {}) is not None


@pytest.mark.parametrize("options", [{SPLIT: None}, {"wrappers": {FORWARD: {SPLIT: [None]}}}])
def test_no_graph_of_a_pass_that_gpus_share(graphs, options):
    inputs = {"x": latent(), "timestep": torch.ones(1)}
    assert SPLIT in pass_graph._refusal(inputs, {}, options)


def test_no_graph_of_weights_that_the_host_moves(loaded, graphs):
    model = patched(loaded)
    with in_comfyui.streamed(model), run_report.run():
        for module in model.model.diffusion_model.modules():
            if not in_comfyui.DYNAMIC and isinstance(module, comfy.ops.CastWeightBiasOp):
                module._v = None
        try:
            passes(model)
            assert graphs == []
            assert run_report._current.get().counts.no_graph == {
                "the host moves the weights by itself"
            }
        finally:
            for module in model.model.diffusion_model.modules():
                if not in_comfyui.DYNAMIC:
                    module.__dict__.pop("_v", None)


@needs_resident
def test_no_graph_of_blocks_that_the_host_computes(paths, graphs):
    model = load(patched(load_turbo_model(paths[1])))
    with run_report.run() as report:
        passes(model)
    assert graphs == []
    assert report.counts.no_graph == {"its weights are not INT8"}
    assert "no CUDA graph: its weights are not INT8" in report.line()


def test_no_graph_on_a_cpu():
    assert pass_graph._device_problem(torch.device("cpu")) == "it runs on cpu"


def test_no_graph_in_memory_that_is_not_torchs_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert "--disable-cuda-malloc" in pass_graph._device_problem(torch.device("cuda", 0))


@needs_resident
def test_a_pass_that_cannot_be_captured_runs_all_the_same(model, graphs, monkeypatch, caplog):
    def fail(self, run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graph, "__init__", fail)
    before = run(model)
    passes(model)
    assert torch.equal(run(model), before)
    assert caplog.text.count("cannot be captured as a CUDA graph: operation not permitted") == 1


@needs_resident
def test_a_graph_that_takes_too_much_memory_is_given_up(model, graphs, monkeypatch, caplog):
    monkeypatch.setattr(Graph, "size", 11)
    passes(model, FIRST + 3)
    assert [graph.dropped for graph in graphs] == [True]
    assert "no CUDA graph, it would keep" in caplog.text


@needs_resident
def test_cancelling_ends_a_replay(model, graphs):
    passes(model)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(model)
    assert graphs[0].replays == 1
    run(model)
    assert graphs[0].replays == 2


@needs_resident
def test_the_report_tells_of_replays_what_the_captured_pass_told(model, graphs, caplog):
    with run_report.run():
        passes(model, FIRST)
    eager = caplog.messages[-1]
    with run_report.run():
        passes(model, FIRST)
    replayed = caplog.messages[-1]
    assert f"{FIRST} forward passes; SLA in 2 of 2 blocks" in eager
    told = f"{FIRST} forward passes; {FIRST} of them as a CUDA graph; SLA"
    assert replayed == eager.replace(f"{FIRST} forward passes; SLA", told)


@pytest.mark.gpu
@needs_resident
class TestOnAGPU:
    """The graph itself."""

    @pytest.fixture(autouse=True)
    def bound_by_python(self, monkeypatch):
        monkeypatch.setattr(pass_graph, "EAGER_PASSES", FIRST)
        monkeypatch.setattr(pass_graph, "BOUND", 0.0)
        pass_graph._followed.clear()
        yield
        pass_graph._followed.clear()

    def graph_of(self, model):
        return pass_graph._followed[model.model.diffusion_model].graph

    def capture(self, model):
        for _ in range(FIRST):
            run(model)
            torch.cuda.synchronize()
        run(model)
        assert self.graph_of(model) is not None

    def test_a_replay_is_the_eager_pass_bit_for_bit(self, model):
        others = [(latent(seed=n), context(n), 1000.0 - 200 * n) for n in range(4)]
        eager = [run(model, *other) for other in others]
        pass_graph._followed.clear()
        self.capture(model)
        random = torch.cuda.get_rng_state()
        found = [run(model, *other) for other in others]
        assert all(torch.equal(a, b) for a, b in zip(found, eager, strict=True))
        assert torch.equal(torch.cuda.get_rng_state(), random)

    def test_a_pass_behind_other_work_tells_no_pace(self):
        """Its launches may wait for room in the GPU's queue."""
        torch.cuda.synchronize()
        with pass_graph.Pace() as alone:
            torch.cuda._sleep(10**8)
        with pass_graph.Pace() as behind:
            pass
        torch.cuda.synchronize()
        assert alone.over() and not behind.over()

    def test_its_memory_is_held_and_given_back(self, model):
        self.capture(model)
        graph = self.graph_of(model)
        segments = [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == graph.pool]
        free = sum(s["total_size"] - s["allocated_size"] for s in segments)
        assert 0 < graph.size == sum(s["total_size"] for s in segments)
        assert free < graph.size / 4 or free < 8 * 2**20
        pool = graph.pool
        del graph
        pass_graph.drop(model.model.diffusion_model)
        assert not [s for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == pool]

    def test_a_failed_capture_leaves_no_trace(self, model, monkeypatch):
        before, original = run(model), pass_graph.Graph._capture

        def fail(self, run):
            return original(
                self, lambda inputs: run(inputs) * float(inputs["timestep"].max().item())
            )

        monkeypatch.setattr(pass_graph.Graph, "_capture", fail)
        for _ in range(FIRST + 2):
            torch.cuda.synchronize()
            assert torch.equal(run(model), before)
        assert self.graph_of(model) is None
        torch.randn(8, device="cuda")
        monkeypatch.setattr(pass_graph.Graph, "_capture", original)
        pass_graph._followed.clear()
        self.capture(model)
        assert torch.equal(run(model), before)
