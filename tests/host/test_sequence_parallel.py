"""TurboSequenceParallel: runs that two and three processes share, over gloo; what is not shared.

The workers are the pack's own, but for how they start: see support/zygote.py.
"""

import contextlib
import gc
import logging
import os
import signal
from unittest import mock

import comfyui_install
import dynamic_vram
import in_comfyui
import pytest
import tiny_models
import torch
import worker_jobs
import zygote
from comfy_api.torch_helpers.torch_compile import apply_torch_compile_factory
from in_comfyui import comfy
from processes import children
from split_seen import Seen
from turbodiffusion_pack.nodes.experts import Wan22ExpertSwitch
from turbodiffusion_pack.nodes.parallel import TurboSequenceParallel
from turbodiffusion_pack.turbo_core.host import (
    gpu_workers,
    per_run,
    split_block,
    split_pass,
    split_worker,
    turbo_vae,
)
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention, wan_model
from turbodiffusion_pack.turbo_core.host.turbo_vae import accelerate_vae
from turbodiffusion_pack.turbo_core.parallel import exchange, parcels
from turbodiffusion_pack.turbo_core.parallel import workers as workers_module
from turbodiffusion_pack.turbo_core.parallel.exchange import Ranks
from turbodiffusion_pack.turbo_core.parallel.workers import WorkerError
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="is about the CPU's fp32"),
]
DIM = 768  # six heads, for two ranks and for three
LATENT = 7, 4, 46  # 322 tokens: 2 whole blocks of 128 and one of 66
SHARES = {2: [256, 66], 3: [128, 128, 66]}
CASES = ["sagesla fast", "sagesla exact", "sla fast", "dense exact"]
# Of a rank that norms by its own heads, or rounds them by their own largest, far more is seen. With
# another last bit of a norm INT8 would round otherwise here and there, 1e-3 in all.
SAME = 1e-6
# With dynamic VRAM this process adds a LoRA at each use, and rounds its sum with INT8 weights
# otherwise than its workers, which add it once.
SAME_WITH_LORA = 5e-3 if dynamic_vram.wanted() else SAME


@pytest.fixture(scope="module", autouse=True)
def forked():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have: sums of several threads round otherwise
    with (
        zygote.forking(workers_module, "comfy_worker_imports"),
        mock.patch.object(gpu_workers, "ON_CPUS", True),
        mock.patch.object(parcels, "KNOWN", parcels.KNOWN | {"worker_jobs"}),
    ):
        yield
        gpu_workers.stop()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("high", "low")):
        tensors = tiny_models.t2v_checkpoint(seed, dim=DIM, ffn=512)
        tiny_models.write_checkpoint(folder / f"{name}.safetensors", tensors)
    return {name: str(folder / f"{name}.safetensors") for name in ("high", "low")}


@pytest.fixture(scope="module")
def model(files):
    loaded = load_turbo_model(files["high"])
    comfy.model_management.load_models_gpu([loaded])
    return patch_attention(loaded, SLASettings("sagesla", topk=0.4))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.double().norm())


def inputs() -> dict:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 16, *LATENT, generator=generator)
    context = torch.randn(1, 8, 4096, generator=generator) / 8
    return {"x": x, "context": context, "timestep": 900}


def pass_of(model) -> torch.Tensor:
    """One forward pass, as in a run."""
    with torch.inference_mode(), per_run.keep():
        return in_comfyui.velocity(model, **inputs())


def share(model, gpus):
    return TurboSequenceParallel.execute(model, gpus).args[0]


def one_rank(model):
    """`model` computed as ranks do, by one."""
    return split_pass.split_over(model, Ranks(None))


def run(model, sigmas=(1.0, 0.0), **options) -> torch.Tensor:
    """A whole run through ComfyUI's guider."""
    x, context = inputs()["x"], inputs()["context"]
    with torch.inference_mode():
        sampler = comfy.samplers.sampler_object("euler")
        return in_comfyui.sample(model, sampler, torch.tensor(sigmas), x, context, **options)


@pytest.fixture(scope="module")
def alone(files):
    """Each case computed by one rank and by one process, once for all numbers of ranks."""
    found = {}

    def get(case):
        if case not in found:
            attention, granularity = case.split()
            loaded = load_turbo_model(files["high"], granularity)
            model = patch_attention(loaded, SLASettings(attention, topk=0.4))
            with Seen().watch() as seen:
                by_rank = pass_of(one_rank(model))
            found[case] = model, by_rank, seen, pass_of(model)
        return found[case]

    return get


@pytest.mark.parametrize(("count", "case"), [*((3, c) for c in CASES), (2, CASES[0])])
def test_ranks_compute_what_one_computes(alone, count, case):
    model, by_rank, seen_alone, ordinary = alone(case)
    with Seen().watch() as seen:
        shared = pass_of(share(model, count))
    assert seen.tokens == SHARES[count][0]  # it was shared, and these are uneven
    assert seen.differing(seen_alone, count) == []  # maps, means, states and scales, to the bit
    assert relative(shared, by_rank) <= SAME
    assert relative(shared, ordinary) <= SAME


def test_what_is_not_reduced_over_ranks_is_seen(alone):
    model, by_rank, *_ = alone(CASES[0])
    pass_of(share(model, 2))
    workers = gpu_workers.running_workers()
    for name, alike in worker_jobs.REDUCED.items():
        own = getattr(split_block, name)
        workers.together(worker_jobs.reduce_nothing, (name,), lambda ranks: None)
        with mock.patch.object(split_block, name, alike):
            assert relative(pass_of(share(model, 2)), by_rank) > 1e-3
        workers.together(worker_jobs.reduce_again, (name,), lambda ranks: None)
        assert getattr(split_block, name) is own
    assert relative(pass_of(share(model, 2)), by_rank) <= SAME


def test_a_run_is_shared_and_says_so(model, caplog):
    caplog.set_level(logging.INFO)
    expected = run(one_rank(model), (1.0, 0.5, 0.0))
    assert relative(run(share(model, 2), (1.0, 0.5, 0.0)), expected) <= SAME
    assert "2 forward passes; on 2 GPUs; SLA in 2 of 2 blocks" in caplog.messages[-1]
    (worker,) = gpu_workers.running_workers().processes
    assert relative(run(share(model, 2), (1.0, 0.5, 0.0)), expected) <= SAME
    assert gpu_workers.running_workers().processes == [worker]  # stays from run to run


def test_loras_are_sent_when_they_change(model):
    def with_lora(strength):
        lora = tiny_models.lora(dim=DIM)
        return comfy.sd.load_lora_for_models(model, None, lora, strength, 0)[0]

    sent = []
    together = workers_module.Workers.together

    def noted(self, job, arguments, own):
        sent.append(job is split_worker.prepare and bool(arguments[3]))
        return together(self, job, arguments, own)

    plain, strong = run(share(model, 2)), with_lora(2.0)
    with mock.patch.object(workers_module.Workers, "together", noted):
        for lora in (strong, with_lora(-2.0)):
            expected = run(one_rank(lora))
            assert relative(plain, expected) > 0.03
            shared = run(share(lora, 2))
            assert relative(shared, expected) <= SAME_WITH_LORA
        assert run(share(lora.clone(), 2)).equal(shared)
        assert run(share(model, 2)).equal(plain)
    assert sum(sent) == 2  # the clone's are the same


def test_both_experts_are_shared(files, model, caplog):
    caplog.set_level(logging.INFO)
    run(share(model, 2))
    workers = gpu_workers.running_workers()
    workers.together(worker_jobs.count_models, (0,), workers_module.nothing)
    high, low = (load_turbo_model(files[name]) for name in ("high", "low"))
    both, sigmas = Wan22ExpertSwitch.execute(high, low, 0.6).args[0], (1.0, 0.5, 0.0)
    expected, loading = run(one_rank(both), sigmas), []
    together = workers_module.Workers.together

    def noted(self, job, arguments, own):
        loading.append(job is split_worker.prepare and own is not workers_module.nothing)
        return together(self, job, arguments, own)

    with mock.patch.object(workers_module.Workers, "together", noted):
        assert relative(run(share(both, 2), sigmas), expected) <= SAME
    assert sum(loading) == 2  # of each expert, while this process loads it as well
    assert caplog.messages[-1].count("1 forward pass; on 2 GPUs") == 2
    assert relative(run(share(high, 2), sigmas), expected) > 0.01
    run(share(both, 2), (0.5, 0.0))
    assert "TurboDiffusion: low-noise expert: 1 forward pass; on 2 GPUs" in caplog.messages[-1]
    workers.together(worker_jobs.count_models, (2,), workers_module.nothing)
    del high, low, both
    gc.collect()  # as ComfyUI does between prompts
    run(share(model, 2))
    workers.together(worker_jobs.count_models, (0,), workers_module.nothing)


@contextlib.contextmanager
def in_the_second_block(do):
    """`do` in rank 0 while a pass is shared, when other ranks wait for it in the second block."""
    attend = split_block.attend

    def attended(attn, index, *arguments):
        if index == 1:
            do()
        return attend(attn, index, *arguments)

    with mock.patch.object(split_block, "attend", attended):
        yield


def test_a_run_is_cancelled_between_passes(model):
    expected = run(share(model, 2))
    processes = list(gpu_workers.running_workers().processes)
    steps = []
    with (
        in_the_second_block(comfy.model_management.interrupt_current_processing),
        pytest.raises(comfy.model_management.InterruptProcessingException),
    ):
        run(share(model, 2), (1.0, 0.5, 0.0), callback=lambda step, *_: steps.append(step))
    assert steps == []  # the first pass was the last
    assert not comfy.model_management.processing_interrupted()
    assert run(share(model, 2)).equal(expected)
    assert gpu_workers.running_workers().processes == processes


@pytest.mark.parametrize("what", ["a worker is killed", "rank 0 is out of memory"])
def test_the_next_run_works_after_one_that_failed(model, what):
    expected = run(share(model, 2))
    pids = [process.pid for process in gpu_workers.running_workers().processes]
    error = comfy.model_management.OOM_EXCEPTION if "memory" in what else WorkerError

    def fail():
        if "memory" in what:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")
        os.kill(pids[-1], signal.SIGKILL)

    with in_the_second_block(fail), pytest.raises(error):
        run(share(model, 2))
    assert not gpu_workers.running_workers()
    assert not set(pids) & set(children(os.getpid()))
    assert run(share(model, 2)).equal(expected)


@contextlib.contextmanager
def blocks_left_out(owner):
    """A cache's way in a second pass: what the first gave, and no block runs. `owner` has it."""
    loop, kept = owner.forward_orig, []

    def forward_orig(*arguments, **more):
        if not kept:
            kept.append(loop(*arguments, **more))
        return kept[0]

    with mock.patch.object(owner, "forward_orig", forward_orig):
        yield


def test_a_model_with_a_cache_runs_on_one_gpu(model, caplog):
    caplog.set_level(logging.INFO)
    run(share(model, 2))
    gpu_workers.running_workers().seconds = 20
    with blocks_left_out(wan_model(model)):
        run(share(model, 2), (1.0, 0.5, 0.0))
    assert "on one GPU, as a node replaces its forward_orig, as caches do" in caplog.messages[-1]


def test_blocks_that_are_left_out_in_secret_keep_nobody_waiting(model):
    run(share(model, 2))
    gpu_workers.running_workers().seconds = 20
    with blocks_left_out(type(wan_model(model))), pytest.raises(RuntimeError, match=r"left .* out"):
        run(share(model, 2), (1.0, 0.5, 0.0))
    assert relative(run(share(model, 2)), run(one_rank(model))) <= SAME


def test_new_workers_get_the_model_where_one_dies_between_two_passes(model):
    expected = run(share(model, 2), (1.0, 0.5, 0.0))

    def kill(step, *_):
        if step == 0:
            worker = gpu_workers.running_workers().processes[0]
            worker.kill()
            worker.wait()

    assert run(share(model, 2), (1.0, 0.5, 0.0), callback=kill).equal(expected)


def test_a_run_is_what_it_is_if_a_worker_fails_at_its_end(model):
    expected = run(share(model, 2))
    workers = gpu_workers.running_workers()
    workers.together(worker_jobs.fail_at_the_end, (), workers_module.nothing)
    assert run(share(model, 2)).equal(expected)
    assert not workers.running
    assert run(share(model, 2)).equal(expected)


def test_a_worker_that_is_out_of_memory_says_so(model):
    run(share(model, 2))
    workers = gpu_workers.running_workers()
    workers.together(worker_jobs.run_out_of_memory, (), lambda ranks: None)
    with pytest.raises(WorkerError, match="OutOfMemoryError: in a worker"):
        run(share(model, 2))


@pytest.fixture(scope="module")
def vae():
    return accelerate_vae(comfy.sd.VAE(sd=tiny_models.vae_state_dict(comfyui_install.find())))


def test_frames_are_decoded_by_all(vae, model):
    """In strips that are not alike, two videos of three latent frames."""
    latents = torch.randn(2, 16, 3, 4, 11, generator=torch.Generator().manual_seed(0))
    narrow = latents[:1, :, :1, :3, :3]
    gpu_workers.stop()
    vae.make_room(latents.shape, 2)
    # A CPU's convolution sums otherwise at another size.
    expected, expected_narrow = vae._decode(latents, 2), vae._decode(narrow, 2)
    run(share(model, 2))
    workers = gpu_workers.running_workers()
    sent = []

    def noted(ranks, *arguments):
        sent.append(arguments[1])
        return collect(ranks, *arguments)

    collect = exchange.collect
    with mock.patch.object(exchange, "collect", noted):
        assert vae.decode(latents).equal(expected)
    assert len(sent) == 6 and {tuple(shape[3] for shape in shapes) for shapes in sent} == {(40, 48)}
    assert vae._decode(narrow, 3).equal(expected_narrow)  # 3 are not enough for 2 strips each

    def cancel(*_):
        comfy.model_management.interrupt_current_processing()

    with (
        mock.patch.object(turbo_vae.ToMemory, "copy", cancel),
        pytest.raises(comfy.model_management.InterruptProcessingException),
    ):
        vae.decode(latents)
    start = latents[:, :, :1]
    assert vae.decode(start).equal(expected[:, :1])
    assert gpu_workers.running_workers() is workers


@pytest.mark.parametrize("what", ["a worker has no memory", "weights do not travel"])
def test_one_gpu_decodes_where_a_worker_cannot(vae, model, caplog, what):
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    gpu_workers.stop()
    expected = vae.decode(latents)
    run(share(model, 2))
    unsendable = {"weight": torch.zeros(1).as_subclass(type("Other", (torch.Tensor,), {}))}
    weights = unsendable if "weights" in what else vae.first_stage_model.model.state_dict()
    if "memory" in what:
        workers = gpu_workers.running_workers()
        workers.together(worker_jobs.have_no_memory_to_decode, (), lambda ranks: None)
    with mock.patch.object(vae.first_stage_model.model, "state_dict", return_value=weights):
        assert vae.decode(latents).equal(expected)
    assert "TurboVAE goes on with one GPU: " in caplog.text
    assert ("in a worker" if "memory" in what else "does not travel") in caplog.text


def reason(model, count=2, latent=(3, 16, 16), options=None, timesteps=1) -> str | None:
    x = torch.zeros(1, 16, *latent)
    wan, timestep, context = wan_model(model), torch.zeros(1, timesteps), torch.zeros(1, 8, 4096)
    with torch.inference_mode():
        return split_pass.why_not_split(wan, x, timestep, context, options or {}, count)


def test_what_cannot_be_shared_says_why(model):
    comfy.model_management.load_models_gpu([model])
    assert reason(model) is None
    assert reason(model, 4) == "4 GPUs do not divide 6 heads"
    few = "its 1 blocks of 128 tokens are too few for 2 GPUs"
    assert reason(model, latent=(1, 16, 16)) == few
    replaced = {"patches_replace": {"dit": {("double_block", 0): None}}}
    assert reason(model, options=replaced) == "a node replaces blocks"
    own_timesteps = "block 0 is not fused: timesteps differ between tokens"
    assert reason(model, timesteps=3) == own_timesteps
    for name in ("patch_embedding", "text_embedding", "time_projection", "head"):
        part = wan_model(model).get_submodule(name)
        hook = list(part.modules())[-1].register_forward_hook(lambda *_: None)
        assert reason(model) == f"a node patches its {name}"
        hook.remove()
    patched = {"patches": {"attn1_patch": [None]}}
    assert reason(model, options=patched) == "block 0 is not fused: a node patches its attention"


def wrapped(model):
    def wrapper(executor, *args, **kwargs):
        return executor(*args, **kwargs)

    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "another node", wrapper)


def from_elsewhere(model):
    model.cached_patcher_init = None


def compiled(model):
    """As the host's node does it, by a compiler that changes nothing."""
    wan = wan_model(model)

    class Compiled(torch.nn.Module):
        dtype = wan.dtype

        def forward(self, *arguments, **more):
            return wan(*arguments, **more)

    around = apply_torch_compile_factory({"diffusion_model": Compiled()})
    kind = comfy.patcher_extension.WrappersMP.APPLY_MODEL
    model.add_wrapper_with_key(kind, "torch.compile", around)


def patched(model):
    name = "diffusion_model.rope_embedder"
    model.add_object_patch(name, model.get_model_object(name))


def with_wrapped_weights(model):
    model.add_weight_wrapper("diffusion_model.head.head.weight", lambda weight: 2 * weight)


def lora_of_another_pack(model):
    key = "diffusion_model.head.head.bias"
    model.add_patches({key: ("diff", (torch.zeros(64),))})
    name, value, strength, offset, _ = model.patches[key][0]
    model.patches[key] = [(name, value, strength, offset, lambda weight: weight)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (compiled, "torch.compile has the model, whose layers one GPU runs"),
        (wrapped, "a node behind Turbo Sequence Parallel wraps the model"),
        (from_elsewhere, "its loader does not tell how to load it again"),
        (patched, "a node patches its rope_embedder"),
        (with_wrapped_weights, "a node wraps its weights"),
        (lora_of_another_pack, "workers cannot load it"),
    ],
)
def test_what_is_not_alike_elsewhere_runs_on_one_gpu(model, caplog, change, words):
    caplog.set_level(logging.INFO)
    model = share(model, 2)
    change(model)
    run(model)
    assert f"on one GPU, as {words}" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("platform", "device", "words"),
    [
        ("win32", "cpu", "needs Linux, where GPUs can exchange by NCCL; on Windows take WSL"),
        ("linux", "xpu", "is for NVIDIA GPUs, not for xpu"),
        ("linux", "cpu", "is for NVIDIA GPUs, not for cpu"),
        ("linux", "cuda", "2 GPUs are asked for and only 0 are visible"),
    ],
)
def test_where_there_are_no_workers(platform, device, words):
    with (
        mock.patch.object(gpu_workers.sys, "platform", platform),
        mock.patch.object(gpu_workers, "ON_CPUS", False),
    ):
        assert words in gpu_workers.why_no_workers(2, torch.device(device))


def test_workers_are_of_one_device():
    """GPU 0 of three is this process's, then GPU 1."""
    gpu_workers.stop()
    current, found = [0], {}

    def devices(gpu):
        current[0] = gpu
        assert gpu_workers.why_no_workers(2, torch.device("cuda", gpu)) is None
        found[gpu] = gpu_workers.workers_for(2, torch.device("cuda", gpu))
        assert gpu_workers.workers_for(2, torch.device("cuda")) is found[gpu]
        return [device for device, _ in found[gpu].first[1]]

    with (
        mock.patch.object(torch.cuda, "device_count", return_value=3),
        mock.patch.object(torch.cuda, "current_device", lambda: current[0]),
        mock.patch.object(gpu_workers.dist, "is_nccl_available", return_value=True),
    ):
        assert devices(0) == [1] and devices(1) == [0] and found[0] is not found[1]
        words = "the model is on cuda:2, and only ComfyUI's own GPU can be among those that share"
        assert gpu_workers.why_no_workers(2, torch.device("cuda", 2)) == words
    gpu_workers.stop()


def test_what_another_device_decodes_is_not_shared(model):
    run(share(model, 2))
    assert gpu_workers.running_workers(model.load_device) is gpu_workers.running_workers()
    assert gpu_workers.running_workers(torch.device("cuda", 1)) is None


def test_another_nodes_group_is_left_alone(model, caplog):
    gpu_workers.stop()
    caplog.set_level(logging.INFO)
    with mock.patch.object(gpu_workers.dist, "is_initialized", return_value=True):
        run(share(model, 2))
    assert "on one GPU, as another node has workers of its own" in caplog.messages[-1]
