"""The patch embedding as one product: near what float32 gives, rounded once, where it may be."""

import types

import in_comfyui  # noqa: F401 - starts ComfyUI
import pytest
import torch
from turbodiffusion_pack.turbo_core.host import operations, patch, patch_embedding
from turbodiffusion_pack.turbo_core.host.operations import TurboOperations
from turbodiffusion_pack.turbo_core.host.patch_embedding import is_one_product, rounded_at_once


def embedding(channels=16, dim=256, **options):
    conv = TurboOperations.Conv3d(
        channels, dim, (1, 2, 2), **{"stride": (1, 2, 2), "dtype": torch.float32} | options
    )
    conv.weight.data.normal_(0, 0.1)
    if conv.bias is not None:
        conv.bias.data.normal_()
    return conv


def network(conv):
    return types.SimpleNamespace(patch_embedding=conv)


@pytest.fixture
def anywhere(monkeypatch):
    monkeypatch.setattr(patch_embedding, "DEVICES", ("cuda", "cpu"))


@pytest.fixture
def products(anywhere, monkeypatch):
    """How often the convolution was a product."""
    found, product = [], operations.patches_times

    def counted(*operands):
        found.append(operands)
        return product(*operands)

    monkeypatch.setattr(operations, "patches_times", counted)
    return found


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize(("batch", "channels"), ((1, 16), (2, 36)))
@pytest.mark.parametrize("exact", (True, False))
def test_it_is_the_convolution_rounded_once(products, batch, channels, dtype, exact):
    """Whether the latents have 16 bits, as the host gives them, or all of float32's."""
    conv, x = embedding(channels), torch.randn(batch, channels, 3, 8, 10)
    x = x.to(dtype).float() if exact else x
    conv.bias = None if not exact else conv.bias
    with torch.inference_mode(), rounded_at_once(network(conv), dtype):
        y = conv(x)
    assert len(products) == 1
    assert y.dtype == dtype
    assert y.flatten(2).transpose(1, 2).is_contiguous()
    weight, bias = conv.weight.double(), None if conv.bias is None else conv.bias.double()
    expected = torch.nn.functional.conv3d(x.double(), weight, bias, conv.stride)
    summands = torch.nn.functional.conv3d(x.double().abs(), weight.abs(), None, conv.stride) + 1
    error = (y.double() - expected).abs() - torch.finfo(dtype).eps / 2 * expected.abs()
    # tf32 alone is up to 2^-11 of the summands off.
    assert (error / summands).max() < 2**-15


def test_it_is_so_during_a_pass_only(products):
    conv, x = embedding(), torch.randn(1, 16, 1, 4, 4)
    with torch.inference_mode():
        assert conv(x).dtype == torch.float32
        with rounded_at_once(network(conv), torch.bfloat16):
            with rounded_at_once(network(conv), torch.float16):
                assert conv(x).dtype == torch.float16
            assert conv(x).dtype == torch.bfloat16
        with rounded_at_once(network(conv), torch.float32):
            assert conv(x).dtype == torch.float32
        assert conv(x).dtype == torch.float32
    assert len(products) == 2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_a_pass_rounds_to_what_its_latents_are_in(dtype, monkeypatch):
    wan, found = network(embedding()), []
    wan.blocks, wan.rope_embedder, wan.dim = torch.nn.ModuleList(), None, 256
    executor = types.SimpleNamespace(class_obj=wan)
    rounded_to = lambda *_: found.append(wan.patch_embedding.rounded_to)  # noqa: E731
    monkeypatch.setattr(patch, "_forward", rounded_to)
    x = torch.zeros(1, 16, 1, 4, 4, dtype=dtype)
    patch._around_forward(executor, x, None, None, transformer_options={})
    assert found == [None if dtype == torch.float32 else dtype]
    assert wan.patch_embedding.rounded_to is None


CASES = {
    "latents that end within a patch": ({}, (1, 16, 2, 5, 4), torch.float32),
    "patches that overlap": ({"stride": (1, 1, 1)}, (1, 16, 2, 4, 4), torch.float32),
    "padding": ({"padding": (0, 1, 1)}, (1, 16, 2, 4, 4), torch.float32),
    "groups": ({"groups": 2}, (1, 16, 2, 4, 4), torch.float32),
    "dilation of a kernel": ({"dilation": (1, 2, 2)}, (1, 16, 2, 4, 4), torch.float32),
    "latents of 16 bits": ({}, (1, 16, 2, 4, 4), torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_such_product_is_convolved(case, anywhere):
    options, shape, dtype = CASES[case]
    conv = embedding(**options)
    with torch.inference_mode(), rounded_at_once(network(conv), torch.bfloat16):
        assert not is_one_product(conv, torch.zeros(shape, dtype=dtype))


def test_gradients_hooks_and_other_devices_keep_the_convolution(products, monkeypatch):
    conv, x = embedding(), torch.randn(1, 16, 1, 4, 4)
    with torch.enable_grad(), rounded_at_once(network(conv), torch.bfloat16):
        assert conv(x).dtype == torch.float32
    hook = conv.register_forward_hook(lambda *_: None)
    with torch.inference_mode(), rounded_at_once(network(conv), torch.bfloat16):
        assert conv(x).dtype == torch.float32
    hook.remove()
    monkeypatch.setattr(patch_embedding, "DEVICES", ("cuda",))
    with torch.inference_mode(), rounded_at_once(network(conv), torch.bfloat16):
        assert conv(x).dtype == torch.float32
    other = torch.nn.Conv3d(16, 8, (1, 2, 2), stride=(1, 2, 2))
    with rounded_at_once(network(other), torch.bfloat16):
        assert other(x).dtype == torch.float32
    assert not products


def test_sums_in_float16_keep_the_convolution(products, monkeypatch):
    conv, x = embedding(), torch.randn(1, 16, 1, 4, 4)
    matmul = types.SimpleNamespace(allow_fp16_accumulation=True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with torch.inference_mode():
        for dtype, many in ((torch.float16, 0), (torch.bfloat16, 1)):
            with rounded_at_once(network(conv), dtype):
                assert conv(x).dtype == (dtype if many else torch.float32)
            assert len(products) == many


def test_what_is_not_finite_stays_with_its_token(products):
    conv, x = embedding(), torch.randn(1, 16, 1, 4, 6)
    x[0, 3, 0, 1, 2], x[0, 5, 0, 3, 5] = torch.nan, torch.inf
    with torch.inference_mode(), rounded_at_once(network(conv), torch.bfloat16):
        finite = conv(x).isfinite().all(1)[0, 0]
    assert finite.tolist() == [[True, False, True], [True, True, False]]
