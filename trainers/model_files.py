"""Folders of models that somebody else wrote, checked before any library reads them.

What transformers would do because a file says so is refused here: code of a checkpoint, kernels and backbones that are
fetched by their ids, quantisers, shards outside of the folder. Sizes come from the weights: the headers of the
safetensors files say how many tensors there are, and a configuration that asks for more layers, or for far more numbers
than the files hold, is refused before anything of that size is made.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpaudit import online, untrusted
from dpaudit.errors import UsageError, rejected
from trainers import fetched, limited, unfinished

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_FILES = 10_000
MOST_TOKENIZER = 1 << 26  # bytes: 250,000 tokens with their merges take 35 million
WANTED = ("*.json", "*.jinja", "*.safetensors", "*.txt", "*.model")  # of a repository on the hub; nothing else is read
OTHERS = (*WANTED, "*.bin", "*.pt", "*.pth", "*.gguf")  # named in errors, never opened
MOST_EDGE, MOST_PIXELS = 1 << 13, 1 << 24  # that a picture is brought to
IN_PIXELS = ("qwen2", "qwen3")
PIXELS = ("shortest_edge", "longest_edge", "min_pixels", "max_pixels")
MOST_TILES = 32  # along an edge
PROBE = (
    "What digit is this? Is it even or odd?", "yes", "a" * 200, " " * 200, "\n" * 50, "0123456789" * 5,
    "éß漢字😀\u202e",
    "!?.,;:'\"()[]{}<>/\\|@#$%^&*-_=+~`" * 3, "A b C d " * 20, "", "<image>", "'s 're 'll",
)  # fmt: skip

# Keys of a configuration that name code or other places, wherever they stand: accepted only in these values.
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})
FORBIDDEN: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": _NOTHING, "compression_config": _NOTHING, "custom_generate": _NOTHING,
    "custom_pipelines": _NOTHING, "use_pretrained_backbone": _NOTHING, "use_timm_backbone": _NOTHING,
    "backbone": _NOTHING, "backbone_kwargs": _NOTHING, "kernel_config": _NOTHING,
    "experts_implementation": (*_NOTHING, "eager"), "_experts_implementation": (*_NOTHING, "eager"),
    "_experts_implementation_internal": (*_NOTHING, "eager"),
    "attn_implementation": (*_NOTHING, "eager", "sdpa"), "_attn_implementation": (*_NOTHING, "eager", "sdpa"),
    "_attn_implementation_internal": (*_NOTHING, "eager", "sdpa"), "_attn_implementation_autoset": (*_NOTHING, True),
}  # fmt: skip
_LAYERS = re.compile(r"(?!max_).*(layers?|depth|blocks?|stages?)$")
_EXPERTS = re.compile(r".*experts$")
_PLAIN = re.compile(r"[\w.-]{1,200}\.safetensors")

# Parts of a tokenizer that take time and room in proportion to the text; anything else is tried on every text first.
_LINEAR = frozenset({
    "ByteLevel", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Sequence",
    "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation", "Digits", "UnicodeScripts",
    "ByteFallback", "Fuse", "TemplateProcessing", "RobertaProcessing", "BertProcessing",
})  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """A folder that passed `check`. numbers: in all its tensors together."""

    folder: Path
    config: Mapping[str, Any]
    tensors: int
    numbers: int


def find(source: str, flag: str, fetch: bool) -> Path:
    """The folder of `source`: itself, or a hub id's in the local cache; UsageError where it is not there.

    fetch: ask the hub.
    """
    try:
        folder = Path(source).expanduser()
        there, other = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a folder that may not be entered, no home
        why = getattr(error, "strerror", None) or "no such place"
        raise rejected(flag, source, f"an existing folder, or a hub id ({why})") from None
    if there:
        return folder
    if other:
        raise rejected(flag, source, "a folder, not a file: the one with config.json and .safetensors files")
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source):
        raise rejected(flag, source, "an existing folder, or a hub id such as llava-hf/llava-1.5-7b-hf[@revision]")
    return fetched.model(source, flag, WANTED, fetch)


def model_type(folder: Path, flag: str) -> str:
    """What `config.json` calls the architecture; UsageError where it is damaged or missing."""
    if not (folder / CONFIG).exists():
        raise UsageError(f"{flag} {folder}: {CONFIG} is missing; {unfinished.instead(_names(folder, flag, OTHERS))}")
    return str(_object(folder, CONFIG, flag).get("model_type"))


def check(folder: Path, flag: str) -> ModelFiles:
    """Raise UsageError, one line that begins with `flag`, unless every file is one that may be read."""
    names = _names(folder, flag)
    config = _object(folder, CONFIG, flag)
    weights = [name for name in names if name.endswith(".safetensors")]
    _check_whole(folder, flag, names, weights)
    for name in names:
        if name in ("preprocessor_config.json", "processor_config.json"):
            _check_pictures(_object(folder, name, flag), f"{flag} {folder / name}", str(config.get("model_type")))
        elif name != CONFIG and name.endswith(".json"):
            large = name in (TOKENIZER, "vocab.json")
            _object(folder, name, flag, MOST_TOKENIZER if large else untrusted.MOST_SETTINGS)
        elif not name.endswith(".safetensors"):
            _ordinary(folder, name, flag)
    from trainers.adapter_files import shapes

    found = [shape for name in weights for shape in shapes(folder / name, flag).values()]
    numbers = sum(_product(shape) for shape in found)
    _check_config(config, f"{flag} {folder / CONFIG}", len(found))
    return ModelFiles(folder, config, len(found), numbers)


def _check_whole(folder: Path, flag: str, names: Sequence[str], weights: Sequence[str]) -> None:
    """Weights, their index and a tokenizer are there, and are no pointers of Git LFS."""
    if not weights:
        raise unfinished.no_weights(folder, _names(folder, flag, OTHERS), flag)
    if TOKENIZER not in names:
        raise unfinished.no_tokenizer(folder, flag)
    for name in (*weights, TOKENIZER):
        with untrusted.open_regular(_ordinary(folder, name, flag, None)) as file:
            if file.read(len(unfinished.POINTER)) == unfinished.POINTER:
                raise unfinished.pointer(folder / name, flag)
    if INDEX in names:
        _check_index(folder, flag, set(weights))
    elif WHOLE not in weights:
        raise unfinished.no_index(folder / INDEX, flag)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _names(folder: Path, flag: str, patterns: Sequence[str] = WANTED) -> list[str]:
    found = []
    for entry in folder.iterdir():
        found.append(entry.name)
        if len(found) > MOST_FILES:
            raise UsageError(f"{flag} {folder}: more than {MOST_FILES} files, which no model has")
    kinds = tuple(pattern.removeprefix("*") for pattern in patterns)
    return sorted(name for name in found if name.endswith(kinds) and not name.startswith("."))


def _ordinary(folder: Path, name: str, flag: str, most: int | None = MOST_TOKENIZER) -> Path:
    try:
        path = untrusted.part_of(folder, name)
        with untrusted.open_regular(path, most):
            return path
    except OSError as error:
        raise UsageError(f"{flag} {folder / name}: can't be read ({error.strerror})") from None
    except UsageError as error:
        raise UsageError(f"{flag} {error}") from None


def _object(folder: Path, name: str, flag: str, most: int = untrusted.MOST_SETTINGS) -> dict[str, Any]:
    path = _ordinary(folder, name, flag)
    try:
        tree = untrusted.read_json(path, most)
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict):
        raise UsageError(f"{flag} {path}: damaged, not a JSON object; download it again")
    return tree


def _check_index(folder: Path, flag: str, weights: set[str]) -> None:
    """Shards lie in the folder, under plain names."""
    placed = _object(folder, INDEX, flag).get("weight_map")
    shards = list(placed.values()) if isinstance(placed, dict) else [None]
    for shard in shards:
        if isinstance(shard, str) and _PLAIN.fullmatch(shard) and shard not in weights:
            raise UsageError(
                f"{flag} {folder / shard}: a file of the checkpoint is missing (a shard?): download the folder again"
            )
        if not isinstance(shard, str) or not _PLAIN.fullmatch(shard):
            raise UsageError(
                f"{flag} {folder / INDEX}: got {shard!r:.80}; accepted: names of the folder's .safetensors"
            )


def _check_config(config: Mapping[str, Any], where: str, tensors: int) -> None:
    for part in _parts(config):
        for key, value in part.items():
            if key in FORBIDDEN and value not in FORBIDDEN[key]:
                shown = " or ".join(str(item) for item in FORBIDDEN[key] if isinstance(item, str) and item)
                more = (
                    "; take the checkpoint that is not quantised (model.precision=nf4 does it here)"
                    if "quant" in key
                    else ""
                )
                raise UsageError(f"{where}: {key}: got {value!r:.80}; accepted: {shown or 'nothing'}{more}")
            if key == "model_type" and str(value).startswith("timm"):
                raise UsageError(f"{where}: model_type: got {value!r:.80}; accepted: models of transformers itself")
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 << 40:
                raise UsageError(f"{where}: {key:.80}: got {value!r:.40}; accepted: numbers that a model can have")
        layers = sum(_count(value) for key, value in part.items() if _LAYERS.fullmatch(key))
        experts = max((_count(value) for key, value in part.items() if _EXPERTS.fullmatch(key)), default=1)
        # Every layer has a tensor of its own; the sum allows for pairs of keys (encoder and decoder) and hints.
        if layers * max(1, experts) > 4 * tensors + 64:
            raise UsageError(f"{where}: asks for {layers} layers; its weights hold {tensors} tensors")


def _check_pictures(tree: Mapping[str, Any], where: str, model_type: str) -> None:
    """Sizes that a picture is brought to. Edges of Qwen2-VL and its successors are numbers of pixels."""
    edges: list[int] = []
    for part in _parts(tree):
        for key, value in part.items():
            if isinstance(value, int) and not isinstance(value, bool):
                pixels = model_type.startswith(IN_PIXELS) and key in PIXELS
                if not 0 <= value <= (MOST_PIXELS if pixels else MOST_EDGE):
                    raise UsageError(f"{where}: {key:.80}: got {value!r:.40}; accepted: at most {MOST_EDGE}")
                if key == "longest_edge":
                    edges.append(value)
    if edges and not model_type.startswith(IN_PIXELS) and max(edges) > MOST_TILES * min(edges):
        raise UsageError(f"{where}: cuts pictures of {max(edges)} pixels into tiles of {min(edges)}")


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _parts(tree: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    if depth > 20:
        raise UsageError("config.json: nested too deeply")
    if isinstance(tree, dict):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        if isinstance(item, dict | list):
            yield from _parts(item, depth + 1)


def check_size(files: ModelFiles, make: Callable[[], Any], flag: str) -> Any:
    """Build the model without memory, compare, and return it.

    What is not in the files would be made anew, as large as the configuration asks for.

    make: returns the model, all of whose tensors are put on the device `meta`. Buffers (positions, masks) are not in
    the files; they may be as large as the weights.
    """
    import torch

    with torch.device("meta"):
        empty = make()
    asked = sum(value.numel() for value in empty.parameters())
    beside = sum(value.numel() for value in empty.buffers())
    if asked > 2 * files.numbers + (1 << 20) or beside > files.numbers + (1 << 24):
        raise UsageError(
            f"{flag} {files.folder / CONFIG}: asks for a model of {asked + beside} numbers; its weights hold "
            f"{files.numbers}"
        )
    return empty


def read_weights(architecture: Any, folder: Path, source: str, flag: str, **wanted: Any) -> Any:
    """The model of a checked folder, in evaluation mode; UsageError where a weight is not in its files.

    architecture: a class of transformers. wanted: what else its `from_pretrained` is given.
    """
    given: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True, **wanted}
    hf, found = architecture.from_pretrained(str(folder), **given)
    if found["missing_keys"] or found["mismatched_keys"]:  # would be drawn at random
        lost = sorted({*found["missing_keys"], *found["mismatched_keys"]}, key=str)
        raise UsageError(f"{flag}: got {source!r}, whose files lack {len(lost)} weights, the first is {lost[0]!s:.120}")
    return hf.eval()


def check_vocabulary(hf: Any, tokenizer: Any, source: str, flag: str) -> None:
    """UsageError where the tokenizer has tokens that the model does not know."""
    rows, most = hf.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values(), default=0)
    if most >= rows:
        raise UsageError(f"{flag}: got {source!r}, whose tokenizer has a token {most}; its model knows {rows}")


# -- tokenizers ------------------------------------------------------------------------------------------------------


@dataclass
class TokenizerGuard:
    """A foreign tokenizer, tried in a child before it is used here: on a few texts when it is made, and on each text
    that it is going to see if it has parts that may take more than the text's own size."""

    content: bytes
    flag: str
    risky: bool
    seen: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path, flag: str) -> "TokenizerGuard":
        """Raises UsageError for a tokenizer that can't be read, takes too long or too much."""
        path = _ordinary(folder, TOKENIZER, flag)
        content = untrusted.read_bytes(path, MOST_TOKENIZER)
        tree = untrusted.parse_json(content)
        parts = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
        guard = cls(content, f"{flag} {path}", not all(_linear(tree.get(part)) for part in parts))
        guard._try(PROBE)
        return guard

    def vouch(self, texts: Sequence[str]) -> None:
        """Raise UsageError unless all texts can be tokenised within the limits."""
        new = [text for text in dict.fromkeys(texts) if text not in self.seen] if self.risky else []
        if new:
            self._try(new)
            self.seen.update(new)

    def _try(self, texts: Sequence[str]) -> None:
        key = (hash(self.content), tuple(texts))
        if key in _TRIED:
            return
        seconds = limited.SECONDS + len(texts) // 500
        try:
            limited.ask("tokenizer", {"texts": list(texts)}, self.content, seconds=seconds)
        except limited.Refused as error:
            raise UsageError(f"{self.flag}: {error}") from None
        if len(texts) == len(PROBE):
            _TRIED.add(key)


_TRIED: set[tuple[int, tuple[str, ...]]] = set()


def _linear(part: Any) -> bool:
    """Whether a part of a tokenizer takes time and room in proportion to its text, as far as its file tells."""
    if part is None:
        return True
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    inside = [item for value in part.values() if isinstance(value, list) for item in value if isinstance(item, dict)]
    if kind == "Replace":
        pattern, content = part.get("pattern"), part.get("content")
        wanted = pattern.get("String") if isinstance(pattern, dict) else None
        return isinstance(wanted, str) and isinstance(content, str) and 0 < len(wanted) >= len(content)
    if kind in ("Prepend", "Strip", "Split"):
        text = part.get("prepend") or part.get("content") or ""
        split = part.get("pattern")
        plain = split is None or (isinstance(split, dict) and set(split) == {"String"})
        return plain and isinstance(text, str) and len(text) <= 8
    if kind not in _LINEAR:
        return False
    return kind == "TemplateProcessing" or all(_linear(item) for item in inside if "type" in item)


# -- chat templates --------------------------------------------------------------------------------------------------


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
    import json

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


def may_fetch(asked: bool | None) -> bool:
    """Whether a hub id may be fetched: where the caller says so, else where the user did."""
    return online.allowed() if asked is None else asked
