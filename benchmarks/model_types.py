"""The table of model types in docs/models.md: what is tested, what is refused and why, what was not tried.

Says of each image-text-to-text type of the installed transformers what the tests run on a tiny random checkpoint of it,
and of the others what its default configuration and the packages it needs give; nothing is downloaded.

    python benchmarks/model_types.py [--write]
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.tiny_types import TYPES
from tests.tiny_types_more import MORE, REFUSED
from trainers.families import FAMILIES
from trainers.families.scattered import ATTENTION

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- types: benchmarks/model_types.py --write -->", "<!-- end of types -->"
EXACT = "exact, with reducers"
AS_IS = "exact, as it is"
RUN = "refused (run)"
BY_CONFIGURATION = "refused by its default configuration (not run)"
NEEDS = "not run here: needs torchvision"
OTHER = "not tried"


def statuses() -> dict[str, tuple[str, str]]:
    """(status, why) of every type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN

    return {kind: _status(kind) for kind in sorted(KNOWN)}


def _status(kind: str) -> tuple[str, str]:
    if kind in FAMILIES:
        return EXACT, ""
    if kind in TYPES or kind in MORE:
        return AS_IS, ""
    if kind in REFUSED:
        return RUN, REFUSED[kind][1].removesuffix(" by")
    why = _by_configuration(kind)
    if why:
        return BY_CONFIGURATION, why
    return (NEEDS, "") if _needs_torchvision(kind) else (OTHER, "")


def _by_configuration(kind: str) -> str:
    """What the generic family refuses before it has a model; empty where that is nothing."""
    from transformers import CONFIG_MAPPING

    try:
        config: Any = CONFIG_MAPPING[kind]()
        text = config.get_text_config()
    except (ValueError, TypeError, AttributeError, KeyError, ImportError):
        return ""  # no default configuration: nothing is known without a checkpoint
    if config.is_encoder_decoder or text.is_encoder_decoder:
        return "encoder and decoder"
    others = set(getattr(text, "layer_types", None) or ()) - set(ATTENTION)
    if others:
        return f"layers of {', '.join(sorted(others))}"
    if not hasattr(text, "max_position_embeddings"):
        return "no length of context"
    if all(getattr(config, name, None) is None for name in ("image_token_id", "image_token_index")):
        return "no image token"
    return ""


def _needs_torchvision(kind: str) -> bool:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    backends = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)
    alone = isinstance(backends, dict) and not backends.get("pil")
    return alone or PROCESSOR_MAPPING_NAMES.get(kind) == "PixtralProcessor"


def table() -> str:
    """The rows, one a status (and reason), in Markdown."""
    rows: dict[tuple[str, str], list[str]] = {}
    for kind, said in statuses().items():
        rows.setdefault(said, []).append(kind)
    order = [EXACT, AS_IS, RUN, BY_CONFIGURATION, NEEDS, OTHER]
    lines = ["| status | why | types | n |", "|---|---|---|---|"]
    for (status, why), kinds in sorted(rows.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        lines.append(f"| {status} | {why or '–'} | {', '.join(f'`{kind}`' for kind in kinds)} | {len(kinds)} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it into the page."""
    if "--write" not in sys.argv[1:]:
        print(table())
        return
    before, rest = PAGE.read_text().split(BEGIN)
    behind = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{behind}")


if __name__ == "__main__":
    main()
