"""Chat templates that somebody else wrote: programs, so they are rendered in a child with limits (trainers.limited)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpaudit.errors import UsageError
from trainers import limited


@dataclass(frozen=True)
class Rendered:
    """What a chat template makes of a conversation: its text, or why there is none."""

    text: str
    error: str | None = None


_TEMPLATES: dict[tuple[str, str], list[Rendered]] = {}


def rendered_templates(
    template: str, special: Mapping[str, Any], conversations: Sequence[list[dict[str, Any]]]
) -> list[Rendered]:
    """A chat template on conversations, rendered in a child, thinking off. Raises UsageError where it does not end."""
    named = {name: str(value) for name, value in special.items() if isinstance(value, str)}
    key = (template, json.dumps([named, list(conversations)], sort_keys=True))
    if key not in _TEMPLATES:
        given = {"conversations": list(conversations), "special": named}
        try:
            found = limited.ask(
                "template", given, template.encode("utf-8", "replace"), seconds=limited.TEMPLATE_SECONDS
            )
        except limited.Refused as error:
            raise UsageError(f"model: its chat template {error}") from None
        _TEMPLATES[key] = [Rendered(str(text or ""), None if error is None else str(error)) for text, error in found]
    return _TEMPLATES[key]
