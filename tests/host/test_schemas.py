"""What the frontend is told of the nodes beside their interface."""

import inspect
import json

import pytest
from comfyui_install import ROOT
from in_comfyui import comfy  # noqa: F401 - starts ComfyUI
from turbodiffusion_pack.nodes import NODES
from turbodiffusion_pack.nodes.schema import io

from locales import node_defs

CHINESE = json.loads((ROOT / "tests" / "data" / "zh.json").read_text(encoding="utf-8"))
LANGUAGES = {"en": lambda text: text, "zh": CHINESE.__getitem__}

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


def test_every_sentence_has_a_translation_and_none_is_left_over():
    sentences = set()
    node_defs(NODES, lambda text: sentences.add(text) or text)
    assert sentences == CHINESE.keys()
    special = set("{}@|")  # to the frontend's messages
    assert not [text for pair in CHINESE.items() for text in pair if special & set(text)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_locales_are_those_of_the_schemas(language):
    """A file that is missing is written: remove one that is not current, and commit the new one."""
    file = ROOT / "locales" / language / "nodeDefs.json"
    wanted = node_defs(NODES, LANGUAGES[language])
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(wanted, indent=2, ensure_ascii=False)
        file.write_text(f"{text}\n", encoding="utf-8")
        pytest.fail(f"{file.name} was missing and has been written: read it and commit it")
    assert json.loads(file.read_text(encoding="utf-8")) == wanted
