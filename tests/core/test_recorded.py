"""Passes of training that are replayed as CUDA graphs."""

import pack  # noqa: F401
import pytest
import torch
from turbodiffusion_pack.turbo_core.training import recorded
from turbodiffusion_pack.turbo_core.training.recorded import Backward, Recorded


@pytest.fixture(autouse=True)
def outside_inference_mode():
    with torch.inference_mode(False):
        yield


class Same:
    """Recorded without a GPU: it gives the same tensors at every call, as a graph does."""

    def __init__(self, work):
        self.work, self.outputs = work, None

    def __call__(self, *given):
        found = self.work(*given)
        if self.outputs is None:
            self.outputs = [torch.empty_like(tensor) for tensor in found]
        for own, tensor in zip(self.outputs, found, strict=True):
            own.copy_(tensor)
        return self.outputs


def weights_of(device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(4, 4, generator=generator) for _ in range(3))
    return [weight.to(device).requires_grad_() for weight in drawn]


def loss_of(weights):
    """The last weight has no part in it; without an image it is another loss."""

    def loss(x, level, image):
        answer = torch.tanh(x @ weights[0]) @ weights[1] * level[:, None]
        answer = answer if image is None else answer + image
        return answer.square().mean(), {"loss": answer.square().mean().detach(), "x0": x + 1}

    return loss


def inputs(seed: int, device: str = "cpu", image: bool = False) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x, picture = (torch.randn(6, 4, generator=generator).to(device) for _ in range(2))
    level = torch.rand(6, generator=generator, dtype=torch.float64).to(device)
    return x, level, picture if image else None


def learnt(again: bool, device: str = "cpu", image: bool = False) -> tuple[list, list]:
    """Gradients of two passes of different shares, twice in a row, and what the passes told."""
    weights = weights_of(device)
    learn, gradients, told = Backward(loss_of(weights), weights, again), [], []
    for first in (0, 2):
        told += [learn(0.25, *inputs(first, device, image))]
        told += [learn(0.75, *inputs(first + 1, device, image))]
        gradients += [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
    return gradients, told


def assert_alike(found: tuple[list, list], wanted: tuple[list, list]) -> None:
    assert [g is None for g in wanted[0]] == [False, False, True] * 2
    for a, b in zip(found[0], wanted[0], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    for a, b in zip(found[1], wanted[1], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name])


@pytest.mark.parametrize("image", [False, True])
def test_gradients_of_a_replay_add_up_as_those_of_backward(image, monkeypatch):
    """And nothing of an earlier pass changes with a later one, which overwrites the graph's own."""
    monkeypatch.setattr(recorded, "Recorded", Same)
    assert_alike(learnt(True, image=image), learnt(False, image=image))


@pytest.mark.gpu
@pytest.mark.parametrize("image", [False, True])
def test_a_graph_learns_as_python_does(image):
    assert_alike(learnt(True, "cuda", image), learnt(False, "cuda", image))


@pytest.mark.gpu
def test_a_graph_counts_on_the_gpu_what_hosts_count_on_the_cpu():
    """torch.arange without a device, which ComfyUI's time embedding has."""
    work = Recorded(lambda x: [x * torch.arange(3).to(x)])
    for factor in (1.0, 2.0):
        (found,) = work(torch.full((3,), factor, device="cuda"))
        assert found.tolist() == [0.0, factor, 2 * factor]
