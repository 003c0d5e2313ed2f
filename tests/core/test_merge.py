"""The merge of SLA's and rCM's updates: what it computes, what it refuses, what it tells."""

import hashlib
import json
import re

import pytest
import torch
import trained_pair
from goldens import unpack_checkpoint
from layouts import LAYOUTS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.checkpoint import CheckpointError, read_checkpoint
from turbodiffusion_pack.turbo_core.training.merge import METADATA, merge_files, table

NAMES = ("base", "sla", "rcm")


@pytest.fixture(scope="module")
def trained():
    return trained_pair.trio()


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    return trained_pair.write(trained, tmp_path_factory.mktemp("trained"))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "merged.safetensors"


def merged(files, target, **options):
    return merge_files(*(files[name] for name in NAMES), target, **options)


def rewritten(files, tmp_path, role, tensors):
    """`files` with other tensors in one of them."""
    path = tmp_path / f"another_{role}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return {**files, role: path}


def refuse(files, target, message):
    with pytest.raises(CheckpointError, match=message):
        merged(files, target)
    assert list(target.parent.glob("merged*")) == list(target.parent.glob("*.part")) == []


def test_both_updates_are_added(files, trained, target):
    merged(files, target)
    found = load_file(target)
    assert found.keys() == trained["sla"].keys()
    for name, base in trained["base"].items():
        expected = base.double() + (trained["sla"][name].double() - base)
        expected += trained["rcm"][name].double() - base
        torch.testing.assert_close(found[name], expected.float(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(found[name], trained["sla"][name])
        assert not torch.equal(found[name], trained["rcm"][name])


def test_proj_l_is_carried_as_it_is(files, trained, target):
    """Not scaled by a weight: only SLA has it, and it has no base to differ from."""
    merged(files, target, weights=(0.5, 1.0))
    found = load_file(target)
    names = [name for name in trained["sla"] if trained_pair.PROJ_L in name]
    assert len(names) == 4
    assert all(torch.equal(found[name], trained["sla"][name]) for name in names)
    assert read_checkpoint(target).has_sla


def test_weights_scale_the_updates(files, trained, target):
    merged(files, target, weights=(0.5, 0.0))
    name = "blocks.1.ffn.0.weight"
    half = (trained["base"][name] + trained["sla"][name]) / 2
    torch.testing.assert_close(load_file(target)[name], half)


def test_the_result_has_the_bases_dtypes(tmp_path, target):
    """Rounded once, from a float32 sum: updates in float32 files onto a bf16 base, say."""
    trained = trained_pair.trio()
    trained["base"] = {name: t.bfloat16() for name, t in trained["base"].items()}
    trained["base"]["blocks.0.norm3.weight"] = trained["base"]["blocks.0.norm3.weight"].float()
    merged(trained_pair.write(trained, tmp_path / "in"), target)
    found = load_file(target)
    for name, base in trained["base"].items():
        assert found[name].dtype == base.dtype
        expected = base.float() + (trained["sla"][name] - base.float())
        expected = (expected + (trained["rcm"][name] - base.float())).to(base.dtype)
        assert torch.equal(found[name], expected)
    assert found["blocks.0.self_attn.attn_op.local_attn.proj_l.weight"].dtype == torch.float32


@pytest.mark.parametrize("role", NAMES)
def test_a_prefix_on_one_side_changes_nothing(files, trained, tmp_path, target, role):
    """With `net.` before them all names differ, and a merge that skips those merges nothing."""
    merged(files, target)
    expected = load_file(target)
    prefixed = {f"net.{name}": tensor for name, tensor in official(trained[role]).items()}
    torch.save({"state_dict": prefixed}, tmp_path / "training.pth")
    merged({**files, role: tmp_path / "training.pth"}, target, overwrite=True)
    found = load_file(target)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_of_other_makers_merge(files, trained, tmp_path, target):
    """In shards and under diffusers' names."""
    shards = LAYOUTS["sglang_shards"](official(trained["rcm"]), tmp_path)
    merged({**files, "rcm": shards}, target)
    assert read_checkpoint(target).has_sla


def official(tensors):
    """The patch embedding as a Linear, as the official files have it."""
    return {n: t.flatten(1) if n == "patch_embedding.weight" else t for n, t in tensors.items()}


def test_a_name_that_one_lacks_is_refused(files, trained, tmp_path, target):
    extra = {**trained["rcm"], "blocks.0.cross_attn.k_img.bias": torch.zeros(256)}
    wrong = rewritten(files, tmp_path, "rcm", extra)
    refuse(wrong, target, r"the rCM checkpoint has blocks.0.cross_attn.k_img.bias, the base")
    wrong = rewritten(files, tmp_path, "base", {**trained["base"], "img_emb": torch.zeros(2)})
    refuse(wrong, target, r"the base checkpoint has img_emb, the SLA checkpoint has not, one of 1")


def test_another_model_is_refused(files, trained, tmp_path, target):
    longer = trained_pair.base(layers=3)
    refuse(rewritten(files, tmp_path, "rcm", longer), target, "the rCM checkpoint has blocks.2")
    wide = dict(trained["rcm"].items())
    for block in (0, 1):
        for name in ("ffn.0.weight", "ffn.0.bias"):
            wide[f"blocks.{block}.{name}"] = torch.cat([wide[f"blocks.{block}.{name}"]] * 2)
        wide[f"blocks.{block}.ffn.2.weight"] = wide[f"blocks.{block}.ffn.2.weight"].repeat(1, 2)
    refuse(rewritten(files, tmp_path, "rcm", wide), target, r"is \[512.*and \[1024.*rCM checkpoint")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (("sla", "base", "rcm"), "base checkpoint has SLA projections"),
        (("base", "rcm", "sla"), "SLA checkpoint has no SLA projections"),
        (("base", "sla", "base"), "rCM checkpoint has the base's own weights"),
        (("base", "sla", "sla"), "rCM checkpoint has SLA projections"),
    ],
    ids="-".join,
)
def test_files_in_the_wrong_order_are_refused(files, target, order, message):
    refuse({name: files[role] for name, role in zip(NAMES, order, strict=True)}, target, message)


def test_an_untuned_sla_is_refused(files, trained, tmp_path, target):
    untuned = trained_pair.with_proj_l(trained["base"])
    refuse(rewritten(files, tmp_path, "sla", untuned), target, "SLA checkpoint has the base's own")


def test_base_and_rcm_in_each_others_place_are_told(files, target):
    """Nothing forbids it but the updates' common direction."""
    assert "check the order" not in table(merged(files, target))
    changed = {**files, "base": files["rcm"], "rcm": files["base"]}
    assert "check the order of the files" in table(merged(changed, target, overwrite=True))


def test_eight_bits_are_refused(files, trained, tmp_path, target):
    quantized = {**files, "rcm": unpack_checkpoint("t2v-quant.pth", tmp_path)}
    with pytest.raises(CheckpointError, match="rCM checkpoint has SLA projections"):
        merged(quantized, target)
    quantized = {**files, "sla": unpack_checkpoint("t2v-quant.pth", tmp_path)}
    refuse(quantized, target, "SLA checkpoint is quantized.*take the plain file")
    small = {n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in trained["rcm"].items()}
    message = "rCM checkpoint has .* in float8_e4m3fn"
    refuse(rewritten(files, tmp_path, "rcm", small), target, message)


def test_a_value_that_is_not_finite_is_refused(files, trained, tmp_path, target):
    """In a big weight, which reading does not look through."""
    spoilt = dict(trained["rcm"])
    spoilt["blocks.1.ffn.0.weight"] = spoilt["blocks.1.ffn.0.weight"].clone()
    spoilt["blocks.1.ffn.0.weight"][3, 4] = torch.nan
    message = "blocks.1.ffn.0.weight became infinite or NaN"
    refuse(rewritten(files, tmp_path, "rcm", spoilt), target, message)


def test_no_file_is_lost(files, target, tmp_path):
    with pytest.raises(ValueError, match="is one of the files to merge"):
        merged({**files, "rcm": files["rcm"]}, files["rcm"], overwrite=True)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        merged(files, tmp_path / "merged.pth")
    target.write_bytes(b"older")
    with pytest.raises(FileExistsError):
        merged(files, target)
    with pytest.raises(CheckpointError, match="does not exist"):
        merged({**files, "sla": tmp_path / "gone.safetensors"}, target, overwrite=True)
    assert target.read_bytes() == b"older"


def test_the_file_says_what_it_was_made_of(files, trained, tmp_path, target):
    told = {"stage": "sla", "block_q": "64", "block_k": "64", "workflow": "{}"}
    sla = tmp_path / "tuned.safetensors"
    save_file(trained["sla"], sla, told)
    merged({**files, "sla": sla}, target, weights=(1.0, 0.5))
    with safe_open(target, framework="pt") as file:
        made = json.loads(file.metadata()[METADATA])
    assert made["sla"]["file"] == "tuned.safetensors"
    assert made["sla"]["training"] == {"stage": "sla", "block_q": "64", "block_k": "64"}
    assert made["sla"]["sha256"] == hashlib.sha256(sla.read_bytes()).hexdigest()
    assert [made[name]["weight"] for name in NAMES] == [1.0, 1.0, 0.5]
    assert "/" not in json.dumps(made)


def test_the_table_has_sizes_and_cosines(files, trained, target):
    updates = merged(files, target)
    assert updates.keys() == {"block 0", "block 1", "outside the blocks"}
    by_sla, by_rcm, base = [], [], []
    for name, start in trained["base"].items():
        if name.startswith("blocks.1."):
            by_sla.append((trained["sla"][name] - start).flatten())
            by_rcm.append((trained["rcm"][name] - start).flatten())
            base.append(start.flatten())
    a, b, start = (torch.cat(parts).double() for parts in (by_sla, by_rcm, base))
    cosine = torch.dot(a, b) / a.norm() / b.norm()
    line = next(text for text in table(updates).splitlines() if text.startswith("block 1"))
    found = [float(text.rstrip("%")) for text in line.split()[2:]]
    wanted = [100 * a.norm() / start.norm(), 100 * b.norm() / start.norm(), cosine]
    assert found == pytest.approx([value.item() for value in wanted], abs=6e-4)
    lines = table(updates).splitlines()
    assert [re.split(r"\s{2,}", text)[0] for text in lines][-1] == "all"


def test_progress_is_told(files, trained, target):
    calls = []
    merged(files, target, progress=lambda done, total: calls.append((done, total)))
    count = len(trained["sla"])
    assert calls == [(done, count) for done in range(1, count + 1)]
