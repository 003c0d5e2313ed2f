"""What locales/<language>/nodeDefs.json holds, made from the nodes' schemas."""

from collections.abc import Callable


def node_defs(kinds: list[type], translate: Callable[[str], str]) -> dict:
    """Names, descriptions and tooltips of all nodes as the frontend looks them up."""
    schemas = sorted((kind.define_schema() for kind in kinds), key=lambda schema: schema.node_id)
    return {schema.node_id: _node(schema, translate) for schema in schemas}


def _node(schema, translate: Callable[[str], str]) -> dict:
    def slot(name: str, tooltip: str) -> dict:
        return {"name": translate(name), "tooltip": translate(tooltip)}

    return {
        "display_name": translate(schema.display_name),
        "description": translate(schema.description),
        "inputs": {i.id: slot(i.display_name or i.id, i.tooltip) for i in schema.inputs},
        "outputs": {
            str(n): slot(o.display_name or o.io_type, o.tooltip)
            for n, o in enumerate(schema.outputs)
        },
    }
