"""What the frontend is told of the nodes beside their interface."""

import inspect

import pytest
from in_comfyui import comfy  # noqa: F401 - starts ComfyUI
from turbodiffusion_pack.nodes import NODES
from turbodiffusion_pack.nodes.schema import io

ADVANCED = {"SLAAttentionPatch": {"dense_blocks", "dense_steps", "backend", "projections"}}


@pytest.mark.parametrize("kind", NODES, ids=lambda kind: kind.define_schema().node_id)
def test_what_few_users_need_is_advanced(kind):
    node_id, inputs = kind.define_schema().node_id, kind.INPUT_TYPES()
    marked = {i.id for i in kind.define_schema().inputs if getattr(i, "advanced", False)}
    assert marked == ADVANCED.get(node_id, set())
    told = {
        name
        for group in ("required", "optional")
        for name, (_, *options) in inputs.get(group, {}).items()
        if options and options[0].get("advanced")
    }
    known = "advanced" in inspect.signature(io.Input).parameters  # not in 0.3.75
    assert told == (marked if known else set())
