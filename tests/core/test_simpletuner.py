"""SimpleTuner's sla_attention.pt, written here as its trainer writes it."""

import pytest
import torch
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError
from turbodiffusion_pack.turbo_core.checkpoint.simpletuner import read_shared_projection

SETTINGS = {
    "topk": 0.2,
    "feature_map": "softmax",
    "blkq": 64,
    "blkk": 64,
    "tie_feature_map_qk": True,
}
GENERATOR = torch.Generator().manual_seed(0)
PROJECTION = {
    "proj_l.weight": torch.randn(128, 128, generator=GENERATOR),
    "proj_l.bias": torch.randn(128, generator=GENERATOR),
}


def written(folder, state=None, **settings):
    state = {"128:bf16": PROJECTION} if state is None else state
    payload = {"settings": {**SETTINGS, **settings}, "state": state, "version": 1}
    torch.save(payload, folder / "sla_attention.pt")
    return folder / "sla_attention.pt"


def test_it_is_read(tmp_path):
    shared = read_shared_projection(written(tmp_path))
    assert torch.equal(shared.weight, PROJECTION["proj_l.weight"])
    assert torch.equal(shared.bias, PROJECTION["proj_l.bias"])
    assert shared.topk == 0.2


def test_the_part_for_wans_heads_is_taken(tmp_path):
    other = {name: -tensor for name, tensor in PROJECTION.items()}
    state = {"64:bf16": {}, "128:fp16": other, "128:bf16": PROJECTION}
    shared = read_shared_projection(written(tmp_path, state))
    assert torch.equal(shared.weight, PROJECTION["proj_l.weight"])


def test_other_files_are_left_to_others(tmp_path):
    torch.save({"state_dict": PROJECTION}, tmp_path / "model.pt")
    assert read_shared_projection(tmp_path / "model.pt") is None
    for payload in ({"settings": 3, "state": {}}, {"settings": {}, "state": None}):
        torch.save(payload, tmp_path / "model.pt")
        assert read_shared_projection(tmp_path / "model.pt") is None
    assert read_shared_projection(tmp_path / "not_there.safetensors") is None
    (tmp_path / "renamed.pth").write_bytes(b"\x80\0\0\0\0\0\0\0{")
    assert read_shared_projection(tmp_path / "renamed.pth") is None, "it is a .safetensors file"


@pytest.mark.parametrize(
    ("state", "settings", "told"),
    [
        (None, {"feature_map": "elu"}, "feature map elu, only softmax is known here"),
        (None, {"topk": 3.0}, "names the top-k 3.0"),
        (None, {"topk": "a"}, "names the top-k a"),
        ({"64:bf16": PROJECTION}, {}, "no projection for heads of 128 channels.* got 64:bf16"),
        ({}, {}, "no projection for heads of 128 channels.* got none"),
        (
            {"128:bf16": {**PROJECTION, "proj_l.bias": torch.ones(64)}},
            {},
            r"proj_l\.bias must be \[128\]",
        ),
        ({"128:bf16": {"proj_l.weight": torch.ones(128, 128)}}, {}, r"proj_l\.bias is missing"),
        (
            {"128:bf16": {**PROJECTION, "proj_l.bias": torch.full((128,), torch.nan)}},
            {},
            "values that are not finite",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, state, settings, told):
    with pytest.raises(CheckpointError, match=rf"^sla_attention\.pt: .*{told}"):
        read_shared_projection(written(tmp_path, state, **settings))


def test_a_file_that_is_cut_short(tmp_path):
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"^sla_attention\.pt: is truncated"):
        read_shared_projection(path)
