"""Schemas that older hosts accept too."""

from comfy_api.latest import io

from ..turbo_core.host.versions import known_fields


def schema(**fields) -> io.Schema:
    """An io.Schema of what the host knows of `fields`."""
    return io.Schema(**known_fields(io.Schema, fields))
