"""Under every refusal that an op declares, the run's report names the implementation that runs."""

import ast
import functools
import inspect
import re
import sys

import pytest
import torch
from turbodiffusion_pack.kernels import (
    block_map,
    causal_frames,
    checks,
    derivatives,
    dispatch,
    int8_linear,
    int8_quant,
    linear_attention,
    norm,
    norm_quant,
    nvrtc,
    qk_prepare,
    requantize,
    rope,
    sparse_attention,
    text_attention,
)
from turbodiffusion_pack.turbo_core import run_report

REFERENCE, TRITON, CUDA = dispatch.REFERENCE, dispatch.TRITON, dispatch.CUDA
HALF = torch.float16
ANGLES = torch.zeros(1, 130, 64)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = property(lambda self: True)


def heads(dim=128, dtype=HALF, length=130, spare=0):
    """[1, L, 2, D] with `spare` more channels in memory."""
    return torch.zeros(1, length, 2, dim + spare, dtype=dtype)[..., :dim]


def rows(channels=256, dtype=HALF, spare=0):
    """[1, 130, C] with `spare` more channels in memory."""
    return torch.zeros(1, 130, channels + spare, dtype=dtype)[..., :channels]


def weight(columns, spare=0):
    """[128, K] in int8 with `spare` more columns in memory."""
    return torch.zeros(128, columns + spare, dtype=torch.int8)[:, :columns]


def on_gpu(x):
    return x.as_subclass(OnGpu)


def clip():
    """One frame of 4 x 4 with 32 channels."""
    return torch.zeros(1, 1, 4, 4, 32, dtype=HALF)


def strided(x):
    """The same values with the last dimension not side by side."""
    return x.mT.contiguous().mT


def a_map(block_q=128):
    return torch.zeros(1, 2, -(-130 // block_q), 1, dtype=torch.int32)


def branch(dim=128, feature_map="softmax"):
    state, normalizer = torch.zeros(1, 2, dim, dim), torch.zeros(1, 2, dim)
    proj = torch.zeros(dim, dim), torch.zeros(dim)
    return linear_attention.LinearBranch(state, normalizer, *proj, feature_map)


def linear(**changed):
    """An int8_linear [1, 130, 256] x [128, 256] that fits the CUDA kernel, but for what changed."""
    operands = {
        "x_q": torch.zeros(1, 130, 256, dtype=torch.int8),
        "x_scale": torch.zeros(1, 130),
        "w_q": torch.zeros(128, 256, dtype=torch.int8),
        "w_scale": torch.zeros(128),
        "out_dtype": HALF,
    }
    return int8_linear.int8_linear(**{**operands, **changed})


def beyond_int32(rows):
    """[1, rows, 128] whose samples would be 2^31 numbers apart."""
    return torch.zeros(1, rows, 128, dtype=HALF).as_strided((1, rows, 128), (2**31, 128, 1))


def prepare(x, angles=ANGLES, **options):
    weight = torch.zeros(x.shape[2] * x.shape[3])
    return qk_prepare.prepare(x, weight, angles, angles, **options)


def sage(q, block_map=None, pv="fp8", **options):
    known = {"block_map": a_map() if block_map is None else block_map, "pv": pv}
    return sparse_attention.sage_attention(
        q, q, q, k_mean=torch.zeros(1, 2, 128), **known, **options
    )


def row_sums():
    """The log-sum-exp that belongs to `heads`."""
    return torch.zeros(1, 2, 130)


def requantized(q):
    return requantize.requantize_rows(q, torch.zeros(1, -(-q.shape[1] // 128)))


def recorded(x):
    """x as autograd records it."""
    return x.requires_grad_()


# What runs an op where nothing is refused on Hopper, and the call.
FITTING = {
    "causal_frames": (
        TRITON,
        lambda: causal_frames.causal_frames(clip(), torch.zeros(1, 2, 4, 4, 32, dtype=HALF)),
    ),
    "resample_frames": (TRITON, lambda: causal_frames.resample_frames(clip(), scale=2)),
    "block_means": (TRITON, lambda: block_map.block_means(heads(), 64)),
    "center_means": (TRITON, lambda: block_map.center_means(torch.zeros(1, 2, 3, 128), 130, 64)),
    "select_blocks": (
        CUDA,
        lambda: block_map.select_blocks(torch.zeros(1, 2, 2, 64), torch.zeros(1, 2, 513, 64), 1),
    ),
    "quantize_blocks": (TRITON, lambda: int8_quant.quantize_blocks(torch.zeros(1, 130, 128))),
    "quantize_rows": (CUDA, lambda: int8_quant.quantize_rows(rows())),
    "int8_linear": (CUDA, linear),
    "key_value_state": (CUDA, lambda: linear_attention.key_value_state(heads(), heads())),
    "text_attention": (
        TRITON,
        lambda: text_attention.text_attention(heads(), *[heads(length=3)] * 2, 510),
    ),
    "linear_attention": (TRITON, lambda: linear_attention.linear_attention(heads(), *branch())),
    "linear_attention_backward": (
        TRITON,
        lambda: linear_attention.linear_attention_backward(
            *[heads()] * 3, branch(), heads(), [heads()] * 3
        ),
    ),
    "linear_attention_jvp": (
        TRITON,
        lambda: linear_attention.linear_attention_jvp(
            *[heads()] * 3, branch(), (*[heads()] * 3, *branch()[2:4])
        ),
    ),
    "rms_norm": (TRITON, lambda: norm.rms_norm(torch.zeros(1, 130, 128), torch.zeros(128))),
    "layer_norm": (TRITON, lambda: norm.layer_norm(torch.zeros(1, 130, 128))),
    "layer_norm_quant": (
        CUDA,
        lambda: norm_quant.layer_norm_quant(rows(), "rows"),
    ),
    "prepare": (CUDA, lambda: prepare(heads())),
    "norms_of_squares": (TRITON, lambda: qk_prepare.norms_of_squares(torch.ones(1, 2, 130), 128)),
    "square_sums": (TRITON, lambda: qk_prepare.square_sums(heads())),
    "requantize_rows": (TRITON, lambda: requantized(weight(128))),
    "apply_rope": (TRITON, lambda: rope.apply_rope(heads(), ANGLES, ANGLES)),
    "sparse_attention": (
        TRITON,
        lambda: sparse_attention.sparse_attention(heads(), heads(), heads(), a_map()),
    ),
    "sparse_attention_with_lse": (
        TRITON,
        lambda: sparse_attention.sparse_attention_with_lse(*[heads()] * 3, a_map()),
    ),
    "sparse_attention_backward": (
        TRITON,
        lambda: sparse_attention.sparse_attention_backward(
            *[heads()] * 4, row_sums(), heads(), a_map()
        ),
    ),
    "sparse_attention_jvp": (
        TRITON,
        lambda: sparse_attention.sparse_attention_jvp(
            *[heads()] * 4, row_sums(), *[heads()] * 3, a_map()
        ),
    ),
    "sage_attention": (CUDA, lambda: sage(heads())),
}

# Op, what runs it then, the reason, and the call.
REFUSALS = [
    (
        "block_means",
        REFERENCE,
        "not contiguous",
        lambda: block_map.block_means(strided(heads()), 64),
    ),
    (
        "select_blocks",
        TRITON,
        "of 2049 key blocks, over 2048",
        lambda: block_map.select_blocks(torch.zeros(1, 2, 2, 64), torch.zeros(1, 2, 2049, 64), 1),
    ),
    (
        "int8_linear",
        TRITON,
        "on different devices",
        lambda: linear(bias=torch.zeros(128, device="meta")),
    ),
    ("int8_linear", TRITON, "the output is float32", lambda: linear(out_dtype=torch.float32)),
    ("int8_linear", TRITON, "of another dtype than", lambda: linear(bias=torch.zeros(128))),
    (
        "int8_linear",
        TRITON,
        "not one float32 vector",
        lambda: linear(gate=torch.zeros(1, 130, 128)),
    ),
    (
        "int8_linear",
        TRITON,
        "the gate is not contiguous",
        lambda: linear(gate=torch.zeros(1, 1, 256)[..., ::2]),
    ),
    (
        "int8_linear",
        TRITON,
        "multiples of 16 bytes",
        lambda: linear(out=torch.zeros(1, 130, 132, dtype=HALF)[..., :128]),
    ),
    ("int8_linear", TRITON, "strides exceed int32", lambda: linear(residual=beyond_int32(130))),
    ("int8_linear", TRITON, "aligned eights", lambda: linear(w_scale=torch.zeros(129)[1:])),
    (
        "key_value_state",
        REFERENCE,
        "not contiguous",
        lambda: linear_attention.key_value_state(heads(), strided(heads())),
    ),
    (
        "key_value_state",
        REFERENCE,
        "float32 tiles",
        lambda: linear_attention.key_value_state(*[on_gpu(heads(dtype=torch.float32))] * 2),
    ),
    (
        "key_value_state",
        TRITON,
        "heads do not lie side by side",
        lambda: linear_attention.key_value_state(*[heads(spare=8)] * 2),
    ),
    (
        "linear_attention",
        REFERENCE,
        "not contiguous",
        lambda: linear_attention.linear_attention(strided(heads()), *branch()),
    ),
    (
        "linear_attention",
        REFERENCE,
        "float32 tiles",
        lambda: linear_attention.linear_attention(on_gpu(heads(dtype=torch.float32)), *branch()),
    ),
    ("prepare", REFERENCE, "not contiguous", lambda: prepare(strided(heads()))),
    (
        "square_sums",
        REFERENCE,
        "not contiguous",
        lambda: qk_prepare.square_sums(strided(heads())),
    ),
    (
        "prepare",
        REFERENCE,
        "float32 tiles",
        lambda: prepare(on_gpu(heads(dtype=torch.float32)), branch=branch()),
    ),
    (
        "prepare",
        TRITON,
        "the head dim is 64, not 128",
        lambda: prepare(heads(64), ANGLES[..., :32]),
    ),
    ("prepare", TRITON, "q and k are float32", lambda: prepare(heads(dtype=torch.float32))),
    (
        "prepare",
        TRITON,
        "the feature map is elu",
        lambda: prepare(heads(), branch=branch(feature_map="elu")),
    ),
    (
        "prepare",
        TRITON,
        "float16 has no room for the linear branch's sums",
        lambda: prepare(heads(dtype=torch.float16), branch=branch()),
    ),
    ("prepare", TRITON, "multiples of 16 bytes", lambda: prepare(heads(spare=4))),
    (
        "prepare",
        TRITON,
        "strides exceed int32",
        lambda: prepare(heads(), ANGLES.as_strided((1, 130, 64), (2**31, 64, 1))),
    ),
    (
        "rms_norm",
        REFERENCE,
        "gradients are asked for",
        lambda: norm.rms_norm(torch.zeros(1, 130, 128), recorded(torch.zeros(128))),
    ),
    (
        "apply_rope",
        REFERENCE,
        "gradients are asked for",
        lambda: rope.apply_rope(recorded(heads()), ANGLES, ANGLES),
    ),
    (
        "linear_attention_backward",
        REFERENCE,
        "not contiguous",
        lambda: linear_attention.linear_attention_backward(
            *[strided(heads())] * 3, branch(), heads(), [heads()] * 3
        ),
    ),
    (
        "sparse_attention_with_lse",
        REFERENCE,
        "float32 tiles",
        lambda: sparse_attention.sparse_attention_with_lse(
            *[on_gpu(heads(dtype=torch.float32))] * 3, a_map()
        ),
    ),
    (
        "apply_rope",
        REFERENCE,
        "96 is not a power of two",
        lambda: rope.apply_rope(heads(96), ANGLES[..., :48], ANGLES[..., :48]),
    ),
    (
        "sparse_attention",
        REFERENCE,
        "not contiguous",
        lambda: sparse_attention.sparse_attention(*[strided(heads())] * 3, a_map()),
    ),
    (
        "sparse_attention",
        REFERENCE,
        "float32 tiles",
        lambda: sparse_attention.sparse_attention(
            *[on_gpu(heads(dtype=torch.float32))] * 3, a_map()
        ),
    ),
    *(
        (op, TRITON, reason, functools.partial(run, refused))
        for op, run in (
            ("quantize_rows", int8_quant.quantize_rows),
            ("layer_norm_quant", lambda x: norm_quant.layer_norm_quant(x, "rows")),
        )
        for reason, refused in (
            ("the rows are float32", rows(dtype=torch.float32)),
            ("rows of 320 channels do not divide into warps", rows(320)),
            ("multiples of 16 bytes", rows(spare=4)),
            ("channels do not lie side by side", rows(512)[..., ::2]),
            ("strides exceed int32", rows().as_strided((1, 130, 256), (2**31, 256, 1))),
        )
    ),
    (
        "layer_norm_quant",
        TRITON,
        "are not float32",
        lambda: norm_quant.layer_norm_quant(rows(), "rows", torch.zeros(256, dtype=HALF)),
    ),
    (
        "layer_norm_quant",
        TRITON,
        "channels do not lie side by side",
        lambda: norm_quant.layer_norm_quant(rows(), "rows", torch.zeros(512)[::2]),
    ),
    (
        "layer_norm_quant",
        TRITON,
        "every token has its own scale or shift",
        lambda: norm_quant.layer_norm_quant(rows(), "rows", shift=torch.zeros(1, 130, 256)),
    ),
    ("sage_attention", REFERENCE, "not contiguous", lambda: sage(strided(heads()))),
    (
        "sage_attention",
        REFERENCE,
        "float32 tiles",
        lambda: sage(on_gpu(heads(dtype=torch.float32))),
    ),
    ("sage_attention", REFERENCE, "fp8 needs sm_89", lambda: sage(on_gpu(heads()))),
    (
        "sage_attention",
        TRITON,
        "rows of query and key blocks are",
        lambda: sage(heads(), a_map(64), block_q=64),
    ),
    ("sage_attention", TRITON, "the values are fp16", lambda: sage(heads(), pv="fp16")),
    ("sage_attention", TRITON, "and fp8 needs 12.8", lambda: sage(heads())),
]


# Where an op is named: in `choose`, or in what a package asks for all its gradients.
CHOSEN = r'(?:choose|_gradient_kernels)\(\s*"(\w+)"'


class LaunchedError(Exception):
    """Raised in place of running an implementation, by its name."""


@pytest.fixture
def hopper(monkeypatch):
    """Pretends to a Hopper whose implementations say their name in place of running."""
    dispatch.say_once.cache_clear()
    _pretend(monkeypatch, (9, 0))
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda device: None)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "version", lambda: sparse_attention.mma.FP8_NVRTC)
    names = {"reference": REFERENCE, "triton": TRITON, "hopper": CUDA, "mma": CUDA, "cuda": CUDA}
    names |= {"gradients_reference": REFERENCE, "gradients_triton": TRITON}
    for module in list(sys.modules.values()):
        folder, _, name = getattr(module, "__name__", "").rpartition(".")
        if folder.startswith("turbodiffusion_pack.kernels.") and name in names:
            ops = {"linear", "prepare", "quantize", "query_gradients", "state_jvp"}
            ops |= {"key_value_state", *FITTING}
            for op in ops & vars(module).keys():
                monkeypatch.setattr(module, op, _announce(names[name]))


def _announce(name):
    def launch(*_, **__):
        raise LaunchedError(name)

    return launch


def _pretend(monkeypatch, card):
    real = dispatch.capability
    for module in list(sys.modules.values()):
        if getattr(module, "capability", None) is real:
            monkeypatch.setattr(module, "capability", lambda device: card)
    monkeypatch.setattr(sparse_attention, "has_fp8", lambda device: card >= (8, 9))


def told(run) -> tuple[str, str]:
    """What ran, and the report's line."""
    with run_report.run() as report:
        run_report.note_forward(1)
        with pytest.raises(LaunchedError) as launched:
            run()
    return str(launched.value), report.line()


@pytest.mark.parametrize("op", FITTING)
def test_nothing_refused(op, hopper):
    name, run = FITTING[op]
    launched, line = told(run)
    assert launched == name
    assert line.endswith(f"; kernels: {name}")


@pytest.mark.parametrize(
    ("op", "name", "reason", "run"), REFUSALS, ids=[f"{op}: {why}" for op, _, why, _ in REFUSALS]
)
def test_a_refusal(op, name, reason, run, hopper, monkeypatch, caplog):
    if "sm_89" in reason:
        _pretend(monkeypatch, (8, 6))
    if "12.8" in reason:
        _pretend(monkeypatch, (8, 9))
        monkeypatch.setattr(nvrtc, "version", lambda: (12, 6))
    launched, line = told(run)
    assert launched == name
    if name == REFERENCE:
        assert re.search(f"; kernels: {REFERENCE}, as .*{reason}", line)
    else:
        assert re.search(f"; kernels: {name}; {op} in {name}: .*{reason}", line)
        assert re.search(f"{op} runs in Triton, more slowly: .*{reason}", caplog.text)


@pytest.mark.parametrize("op", FITTING)
def test_no_nvrtc(op, hopper, monkeypatch):
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "no NVRTC here")
    if op == "sage_attention":
        assert sparse_attention.default_pv(torch.device("cpu")) == "fp16"
    best, run = FITTING[op]
    launched, line = told(run)
    assert launched == TRITON
    declined = f"; {op} in Triton: no NVRTC here" if best == CUDA else ""
    assert line.endswith(f"; kernels: Triton{declined}")


@pytest.mark.parametrize("op", FITTING)
def test_no_triton(op, hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda device: "no Triton here")
    launched, line = told(FITTING[op][1])
    assert launched == REFERENCE
    assert line.endswith("; kernels: torch reference, as no Triton here")


# Ops in CUDA C++ on cards of mma.sync.
BY_MMA = {"int8_linear", "key_value_state", "layer_norm_quant", "prepare", "sage_attention"}
BY_MMA |= {"requantize_rows", "select_blocks", "text_attention"}


@pytest.mark.parametrize("card", [(8, 0), (8, 9), (10, 0), (12, 0)], ids="sm_{0[0]}{0[1]}".format)
@pytest.mark.parametrize("op", FITTING)
def test_other_cards_have_nothing_to_decline(op, card, hopper, monkeypatch, caplog):
    _pretend(monkeypatch, card)
    launched, line = told(FITTING[op][1])
    assert launched == (CUDA if op in BY_MMA and card != (10, 0) else TRITON)
    assert line.endswith(f"; kernels: {launched}")
    assert not [record for record in caplog.records if "slow" in record.message]


@pytest.mark.parametrize(
    ("text", "launched", "why"),
    [
        (heads(length=128), CUDA, None),
        (heads(length=129), TRITON, None),
        (heads(64, length=3), TRITON, "the head dim is 64, not 128"),
        (heads(length=3, spare=4), TRITON, "rows do not begin at multiples of 16 bytes"),
    ],
    ids=["short", "long", "head dim", "rows"],
)
def test_a_card_of_mma_takes_short_texts_in_cuda(text, launched, why, hopper, monkeypatch):
    """A longer one is not declined: it has no such kernel."""
    _pretend(monkeypatch, (8, 9))
    q = heads(text.shape[-1])
    ran, line = told(lambda: text_attention.text_attention(q, text, text, 9))
    assert ran == launched
    assert line.endswith(f"text_attention in Triton: {why}" if why else f"; kernels: {launched}")


def test_a_card_of_mma_declines_other_blocks(hopper, monkeypatch):
    _pretend(monkeypatch, (8, 9))
    launched, line = told(lambda: sage(heads(), a_map(64), block_q=64))
    assert launched == TRITON
    assert line.endswith("are 128, 64 and 64, not 128, 128 and 64")
    assert told(lambda: sage(heads(), pv="fp16"))[0] == CUDA


@pytest.mark.parametrize(
    ("shaped", "feature_map", "reason"),
    [
        ({"dim": 64}, "softmax", "the head dim is 64, not 128"),
        ({}, "elu", "the feature map is elu"),
        ({"spare": 4}, "softmax", "rows do not begin at multiples of 16 bytes"),
    ],
)
@pytest.mark.parametrize("card", [(8, 9), (9, 0)], ids="sm_{0[0]}{0[1]}".format)
def test_other_keys_are_declined(card, shaped, feature_map, reason, hopper, monkeypatch):
    _pretend(monkeypatch, card)
    keys = heads(**shaped)
    launched, line = told(lambda: linear_attention.key_value_state(keys, keys, feature_map))
    assert launched == TRITON
    assert line.endswith(reason)


@pytest.mark.parametrize(
    ("channels", "activation", "launched", "why"),
    [
        (512, "gelu_tanh", CUDA, None),
        (512, None, TRITON, None),
        (256, "gelu_tanh", TRITON, "rows of 256 channels do not divide into warps"),
    ],
)
def test_a_card_of_mma_takes_rows_after_gelu_in_cuda(
    channels, activation, launched, why, hopper, monkeypatch
):
    """As they are they are not declined: there is no such kernel."""
    _pretend(monkeypatch, (8, 9))
    ran, line = told(lambda: int8_quant.quantize_rows(rows(channels), activation))
    assert ran == launched
    assert line.endswith(f"quantize_rows in Triton: {why}" if why else f"; kernels: {launched}")


@pytest.mark.parametrize(
    ("blocks", "launched", "why"),
    [(1, CUDA, None), (2048, CUDA, None), (2049, TRITON, "of 2049 key blocks, over 2048")],
)
def test_a_card_of_mma_scores_few_blocks_in_cuda_too(blocks, launched, why, hopper, monkeypatch):
    _pretend(monkeypatch, (8, 9))
    means = torch.zeros(1, 2, 2, 64), torch.zeros(1, 2, blocks, 64)
    ran, line = told(lambda: block_map.select_blocks(*means, 1))
    assert ran == launched
    assert f"select_blocks in Triton: {why}" in line if why else line.endswith(f": {launched}")


# What weights a card of mma.sync declines to give row scales in CUDA C++.
WEIGHTS = {
    "rows of 300 numbers do not divide into threads": weight(300),
    "rows do not begin at multiples of 16 bytes": weight(304, spare=8),
    "strides exceed int32": weight(128)[:1].as_strided((1, 128), (2**31, 1)),
}


@pytest.mark.parametrize("reason", WEIGHTS)
def test_a_card_of_mma_declines_other_weights(reason, hopper, monkeypatch):
    _pretend(monkeypatch, (8, 9))
    launched, line = told(lambda: requantized(WEIGHTS[reason]))
    assert launched == TRITON
    assert line.endswith(f"requantize_rows in Triton: {reason}")


TOO_FAR = "x or w spans more than 4 GiB"


def test_a_card_of_mma_declines_a_linear_that_32_bits_do_not_reach(hopper, monkeypatch):
    _pretend(monkeypatch, (8, 9))
    assert told(linear)[0] == CUDA
    dispatch.say_once.cache_clear()
    monkeypatch.setattr(int8_linear.mma, "_bytes_spanned", lambda x: 2**32 + 1)
    launched, line = told(lambda: linear(residual=torch.zeros(1, 130, 128, dtype=HALF)))
    assert launched == TRITON
    assert line.endswith(TOO_FAR)


ODD_K = "K is not a multiple of 16"


def test_a_card_of_mma_declines_a_linear_of_an_odd_k(hopper, monkeypatch):
    _pretend(monkeypatch, (8, 9))
    x, w = torch.zeros(1, 130, 256, dtype=torch.int8), weight(256)
    assert told(lambda: linear(x_q=x[..., :240], w_q=w[:, :240]))[0] == CUDA
    dispatch.say_once.cache_clear()
    launched, line = told(lambda: linear(x_q=x[..., :250], w_q=w[:, :250]))
    assert launched == TRITON
    assert line.endswith(ODD_K)


def test_every_op_and_every_declared_refusal_is_here():
    kernels = [m for n, m in sys.modules.items() if n.startswith("turbodiffusion_pack.kernels.")]
    sources = {inspect.getsource(module) for module in kernels if hasattr(module, "choose")}
    ops = {op for source in sources for op in re.findall(CHOSEN, source)}
    assert ops == FITTING.keys()
    functions = [module.unfit for module in kernels if hasattr(module, "unfit")]
    functions += [checks.not_contiguous, checks.float32_on_gpu, derivatives.no_gradients]
    functions += [rope._odd_head_dim, sparse_attention._no_fp8]
    shown = [TOO_FAR, ODD_K, *WEIGHTS, *(reason for _, _, reason, _ in REFUSALS)]
    for declared in (reason for function in functions for reason in _reasons(function)):
        assert any(_fits(declared, reason) for reason in shown), declared


def _reasons(function) -> list[str]:
    """What a function that gives reasons may return, with * for what it fills in."""
    tree = ast.parse(inspect.getsource(function))
    texts = []
    for returned in (node.value for node in ast.walk(tree) if isinstance(node, ast.Return)):
        if isinstance(returned, ast.Call):  # of a function that is among these, too
            continue
        alternatives = [returned]
        if isinstance(returned, ast.IfExp):
            alternatives = [returned.body, returned.orelse]
        texts += [_text(node) for node in alternatives]
    return [text for text in texts if text is not None]


def _text(node) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value
    return "".join(p.value if isinstance(p, ast.Constant) else "*" for p in node.values)


def _fits(declared: str, reason: str) -> bool:
    """Whether `reason` is a part of what `declared` may say."""
    pieces = [piece for piece in declared.split("*") if len(piece) > 8]
    return any(reason in piece or piece.strip(" ,") in reason for piece in pieces)
