"""A checkpoint's own processor of pictures and prompts, without its part for videos.

transformers' processors of videos need torchvision, also where no video is ever shown; without that part the others
work on what is installed here. Nothing about pictures depends on it.
"""

from pathlib import Path
from typing import Any

from dpaudit import untrusted

VIDEO = "video_processor"


def load(folder: Path, model_type: str) -> Any:
    """The processor that lies in `folder`, of transformers' own classes alone; its parts are read from there too."""
    from transformers import AutoProcessor

    kind = _kind(folder, model_type)
    source: Any = AutoProcessor if kind is None or VIDEO not in kind.get_attributes() else without_video(kind)
    return source.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def without_video(kind: Any) -> Any:
    """A class of processors that is made, and read, with None where `kind` has a part for videos."""

    def parts(cls: Any) -> list[str]:
        return [name for name in kind.get_attributes() if name != VIDEO]

    still = type(kind.__name__, (kind,), {"get_attributes": classmethod(parts)})

    def read(cls: Any, *given: Any, **more: Any) -> list[Any]:
        found = iter(still._get_arguments_from_pretrained(*given, **more))  # type: ignore[attr-defined]
        return [None if name == VIDEO else next(found) for name in kind.get_attributes()]

    def check(self: Any, name: str, argument: Any) -> Any:
        if name == VIDEO and argument is None:
            return None
        return kind.check_argument_for_proper_class(self, name, argument)

    methods = {"_get_arguments_from_pretrained": classmethod(read), "check_argument_for_proper_class": check}
    return type(kind.__name__, (kind,), methods)


def _kind(folder: Path, model_type: str) -> Any:
    """The class that the folder names, else that of its model type; None where transformers has none of that name."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(model_type)
    if (folder / "processor_config.json").exists():
        text = untrusted.read_text(untrusted.part_of(folder, "processor_config.json"), untrusted.MOST_CONFIGURATION)
        tree = untrusted.parse_json(text)
        name = tree.get("processor_class", name) if isinstance(tree, dict) else name
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    known = isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin)
    return kind if known else None
