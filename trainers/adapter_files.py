"""PEFT adapters that somebody else wrote: which settings are taken over, and loading without PEFT's own loader.

PEFT's loader does what `adapter_config.json` says: it fetches other adapters by their ids (XLORA), imports a module by
name (megatron_core), falls back to a pickle (adapter_model.bin), changes the base weights (init_lora_weights: pissa)
and runs regular expressions of the file over all names of modules, which may take for ever. So the file is read here:
keys by an allow-list, plain LoRA alone, and which modules are adapted follows from the names of the tensors. Patterns
are tried in a child with limits, and must name those modules too: PEFT would leave out the others.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpaudit import online, untrusted
from dpaudit.errors import UsageError
from trainers import limited

SETTINGS, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MOST_SETTINGS = 1 << 20  # bytes
MOST_RANK = 1 << 14
MOST_NUMBER = 1e12  # of a scale

_PREFIX = "base_model.model."
_WORDS = re.compile(r"[\w.]{1,200}")
# Names of modules in checkpoints of transformers before 5, and where they are now; the first that exists is taken.
_RENAMED = (
    ("", ""), ("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"),
    ("model.", "model.language_model."), ("model.text_model.", "model.text_model."), ("", "model."),
)  # fmt: skip


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_RANK


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST_NUMBER


def _pattern(value: Any, of: Callable[[Any], bool]) -> bool:
    """Names of modules -> numbers. PEFT reads the names as patterns, so they are plain words."""
    if value is None:
        return True
    entries = value.items() if isinstance(value, dict) and len(value) <= 4096 else ()
    return isinstance(value, dict) and all(_WORDS.fullmatch(name) and of(item) for name, item in entries)


def _names(value: Any) -> bool:
    listed = isinstance(value, list) and len(value) <= 1024
    return value is None or (listed and all(isinstance(item, str) and _WORDS.fullmatch(item) for item in value))


# What is taken over: the check, and what is accepted.
TAKEN: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_whole, f"a whole number from 1 to {MOST_RANK}"),
    "lora_alpha": (lambda value: _number(value) and value > 0, "a number above 0"),
    "rank_pattern": (lambda value: _pattern(value, _whole), "names of modules with whole numbers"),
    "alpha_pattern": (lambda value: _pattern(value, _number), "names of modules with numbers"),
    "use_rslora": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "fan_in_fan_out": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "lora_bias": (lambda value: value is None or isinstance(value, bool), "true or false"),
    "bias": (lambda value: value in (None, "none", "all", "lora_only"), "none, all or lora_only"),
    "modules_to_save": (_names, "a list of names of modules"),
}
# What is only checked: it says how the adapter was trained or started, in values that change nothing when it is used.
CHECKED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "peft_type": (lambda value: value == "LORA", "LORA"),
    "init_lora_weights": (
        lambda value: value is None or isinstance(value, bool) or value == "gaussian",
        "true, false or gaussian (other starts change the base weights; convert the adapter to plain LoRA)",
    ),
}
# Where the adapter lies: must agree with the names of its tensors.
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
# What is not looked at: text for people, and settings of training.
INERT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config",
})  # fmt: skip


def check(folder: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """Raise UsageError, one line that begins with `flag`, unless `folder` holds a whole adapter that can be loaded.

    Returns the shape of every tensor. Nothing but the settings and the header of the weights is read.
    """
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            pickled = f" ({PICKLED} is a pickle, which dpaudit never opens)" if (folder / PICKLED).exists() else ""
            raise UsageError(f"{flag} {folder}: an unfinished adapter, {name} is missing{pickled}")
    given = settings(folder, flag)
    found = shapes(folder / WEIGHTS, flag)
    widest = max(
        (shape[0] for name, shape in found.items() if re.search(r"\.lora_(embedding_)?A", name) and shape), default=0
    )
    named = max([given["r"], *given.get("rank_pattern", {}).values()])
    if named > max(widest, 1):
        raise UsageError(f"{flag} {folder}: {SETTINGS} names a rank of {named}, the widest of its tensors has {widest}")
    return found


def shapes(path: Path, flag: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors of a file in a folder that was handed over; UsageError where it is damaged."""
    try:
        found = untrusted.tensor_shapes(untrusted.part_of(path.parent, path.name))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{flag} {path}: damaged or unfinished ({' '.join(str(error).split()):.80}); copy it again"
        ) from None
    return {name: shape for name, (_, shape) in found.items()}


def settings(folder: Path, flag: str) -> dict[str, Any]:
    """The settings that are taken over, checked; see the module's docstring."""
    path = folder / SETTINGS
    try:
        tree = untrusted.read_json(untrusted.part_of(folder, SETTINGS), MOST_SETTINGS)
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict):
        raise UsageError(f"{flag} {path}: damaged, not a JSON object")
    for name, (accepts, accepted) in {**CHECKED, **TAKEN}.items():
        if (name in tree or name in ("peft_type", "r")) and not accepts(tree.get(name)):
            value = "nothing" if name not in tree else repr(tree[name])
            raise UsageError(f"{flag} {path}: {name}: got {value:.80}; accepted: {accepted}")
    for name, value in tree.items():
        known = name in INERT or name in TAKEN or name in CHECKED or name in PLACES
        if not known and value not in (None, False, {}, [], ""):
            accepted = "null (of adapters only plain LoRA is loaded)"
            raise UsageError(f"{flag} {path}: {name!r:.60}: got {value!r:.80}; accepted: {accepted}")
    return {name: tree[name] for name in (*TAKEN, *PLACES) if tree.get(name) is not None}


def load(hf: Any, folder: Path, flag: str) -> Any:
    """`hf` inside a PEFT model with the adapter of `folder` on top, frozen, in float32.

    Raises UsageError when a tensor has no place, or another shape than its place.
    """
    with online.cut_off():  # it imports bitsandbytes where that is installed (trainers.precision)
        from peft import LoraConfig as PeftLora
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    shaped = check(folder, flag)
    places = _places(hf, shaped)
    lost = sorted(name for name, place in places.items() if place is None)
    if lost or not shaped:
        raise _misfit(flag, folder, f"it has no place for {len(lost)} of {len(shaped)} tensors", lost)
    read = settings(folder, flag)
    given = {name: value for name, value in read.items() if name in TAKEN}
    targets = sorted({_module(place) for place in places.values() if place is not None and "lora_" in place})
    if not targets:
        raise _misfit(flag, folder, "it holds no LoRA matrix", [])
    _agree(read, targets, f"{flag} {folder / SETTINGS}")
    problem = _wrong_shape(hf, {place: shaped[name] for name, place in places.items() if place is not None}, read)
    if problem is not None:
        raise _misfit(flag, folder, problem, [])
    try:
        with warnings.catch_warnings():  # peft asks transformers for a name that it calls deprecated
            warnings.simplefilter("ignore")
            wrapped = get_peft_model(hf, PeftLora(**given, target_modules=targets, inference_mode=True))
        tensors = untrusted.read_tensors(untrusted.part_of(folder, WEIGHTS))
        named = {f"{_PREFIX}{places[name]}": tensor for name, tensor in tensors.items()}
        set_peft_model_state_dict(wrapped, named)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch lists every mismatch on a line of its own after a headline.
        told = next((line for line in lines if "size mismatch" in line), lines[0] if lines else type(error).__name__)
        raise _misfit(flag, folder, told[:160], []) from None
    loaded = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(wrapped).items()}
    wrong = sorted(name for name, place in places.items() if loaded.get(f"{_PREFIX}{place}") != shaped[name]) + sorted(
        set(loaded) - {f"{_PREFIX}{place}" for place in places.values()}
    )
    if wrong:
        raise _misfit(flag, folder, f"{len(wrong)} of its {len(shaped)} tensors and places differ", wrong)
    return wrapped


def _wrong_shape(hf: Any, placed: Mapping[str, tuple[int, ...]], read: Mapping[str, Any]) -> str | None:
    """What is wrong with the matrices' shapes, if anything, before anything of their size is made.

    PEFT makes matrices of the rank that the settings name in every module, so that rank must be the one of the file.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D  # a linear layer with its weight the other way round, as in GPT-2

    modules = dict(hf.named_modules())
    whole = sum(value.numel() for value in hf.parameters())
    if sum(math.prod(shape) for shape in placed.values()) > 2 * whole + (1 << 20):
        return "its tensors are larger than the base itself"
    for place, shape in placed.items():
        kind = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", place)
        if kind is None:
            continue
        owner, rank = modules[kind[1]], _rank(kind[1], read)
        if isinstance(owner, nn.Linear):
            sizes = owner.in_features, owner.out_features
        elif isinstance(owner, Conv1D):
            sizes = owner.nx, owner.nf
        elif isinstance(owner, nn.Embedding):
            sizes = owner.num_embeddings, owner.embedding_dim
        else:
            return f"it adapts {kind[1]:.120}, a {type(owner).__name__}; accepted: linear layers and embeddings"
        wanted = (rank, sizes[0]) if kind[3] == "A" else (sizes[1], rank)
        if shape != wanted:
            return f"size mismatch for {place:.120}: {shape} in the file, {wanted} by its settings and base"
    return None


def _rank(module: str, read: Mapping[str, Any]) -> int:
    """The rank that PEFT gives to a module: of the first entry of rank_pattern that its name ends in, or r."""
    for ending, rank in read.get("rank_pattern", {}).items():
        if module == ending or module.endswith(f".{ending}"):
            return int(rank)
    return int(read["r"])


def _agree(read: Mapping[str, Any], targets: list[str], where: str) -> None:
    """Raise UsageError unless PEFT, by what the settings say of places, would adapt every module that has tensors."""
    left = set(targets) - _matched(read.get("target_modules"), targets, f"{where}: target_modules")
    taken = _matched(read.get("exclude_modules", []), targets, f"{where}: exclude_modules")
    layers = read.get("layers_to_transform")
    if layers is not None:
        listed = layers if isinstance(layers, list) else [layers]
        found = {target: re.search(r"\.(\d+)\.", target) for target in targets}
        taken |= {target for target, hit in found.items() if hit is None or int(hit.group(1)) not in listed}
    if left | taken:
        first = min(left | taken)
        raise UsageError(f"{where}: leaves out modules that its weights have tensors for, the first is {first:.120}")


def _matched(given: Any, targets: list[str], where: str) -> set[str]:
    """Those of `targets` that PEFT would take for a list of names, or a regular expression."""
    if given == "all-linear":
        return set(targets)
    if isinstance(given, list) and len(given) <= 10_000 and all(isinstance(name, str) for name in given):
        named = set(given)
        ends = {target: target.split(".") for target in targets}
        return {
            target for target, parts in ends.items() if any(".".join(parts[at:]) in named for at in range(len(parts)))
        }
    if not isinstance(given, str):
        raise UsageError(f"{where}: got {given!r:.80}; accepted: a list of names of modules, or a pattern")
    try:
        return set(limited.matching(given, tuple(targets)))
    except limited.Refused as error:
        raise UsageError(f"{where}: got {given!r:.80}, a pattern that {error}") from None


def _misfit(flag: str, folder: Path, problem: str, names: list[str]) -> UsageError:
    first = f" ({names[0]!r:.120})" if names else ""
    return UsageError(f"{flag} {folder}: does not fit its base: {problem}{first}")


def _module(place: str) -> str:
    return re.split(r"\.lora_", place, maxsplit=1)[0]


def _places(hf: Any, names: Mapping[str, object]) -> dict[str, str | None]:
    """Each tensor's name without PEFT's prefix, as the modules are called in this version of transformers."""
    modules = {name for name, _ in hf.named_modules()}
    found: dict[str, str | None] = {}
    for name in names:
        found[name] = None
        if not name.startswith(_PREFIX):
            continue
        rest = name.removeprefix(_PREFIX)
        for old, new in _RENAMED:
            place = new + rest.removeprefix(old)
            owner = _module(place) if ".lora_" in place else place.rpartition(".")[0]
            if rest.startswith(old) and owner in modules:
                found[name] = place
                break
    return found
