"""Schemas that older hosts accept too."""

import inspect

from comfy_api.latest import io

_KNOWN = inspect.signature(io.Schema).parameters


def schema(search_aliases: list[str], **fields) -> io.Schema:
    """An io.Schema; search aliases are left out where the host does not know them."""
    if "search_aliases" in _KNOWN:
        fields["search_aliases"] = search_aliases
    return io.Schema(**fields)
