"""Nodes of an older TurboDiffusion pack (anveshane's and its forks) that others can stand for.

Only what they load: that pack's samplers do a whole run in one node, and have no counterpart.
"""

from ..turbo_core.host.versions import offer_replacement

REPLACEMENTS = (
    {
        "old_node_id": "TurboWanModelLoader",
        "new_node_id": "TurboLoader",
        "old_widget_ids": ["model_name", "attention_type", "sla_topk", "offload_mode"],
        "input_mapping": [
            {"new_id": "checkpoint", "old_id": "model_name"},
            {"new_id": "granularity", "set_value": "fast"},
        ],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    },
    {
        "old_node_id": "TurboWanVAELoader",
        "new_node_id": "VAELoader",
        "old_widget_ids": ["vae_name"],
        "input_mapping": [{"new_id": "vae_name", "old_id": "vae_name"}],
        "output_mapping": [{"new_idx": 0, "old_idx": 0}],
    },
)


async def offer_replacements() -> None:
    """Tell the host of them; it uses them where that pack is not installed."""
    for fields in REPLACEMENTS:
        await offer_replacement(fields)
