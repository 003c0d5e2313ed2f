"""Schemas that older hosts accept too."""

from comfy_api.latest import io

from ..turbo_core.host.versions import known_fields


def schema(advanced: tuple[str, ...] = (), **fields) -> io.Schema:
    """An io.Schema of what the host knows of `fields`.

    Newer hosts fold the `advanced` inputs away until a user asks for them.
    """
    for field in fields["inputs"]:
        if field.id in advanced:
            field.advanced = True  # not an argument: 0.3.75 has none such
    return io.Schema(**known_fields(io.Schema, fields))
