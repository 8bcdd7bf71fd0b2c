"""Folders that are no whole checkpoint: what they seem to be, and what to do about it, as one line."""

from collections.abc import Sequence
from pathlib import Path

from dpaudit.errors import UsageError

POINTER = b"version https://git-lfs"


def instead(names: Sequence[str]) -> str:
    """What a folder that is no checkpoint seems to be, and what to do about it."""
    if "adapter_config.json" in names:
        return (
            "this is a PEFT adapter, not a model: give its base model, or merge it into it (merge_and_unload) and save"
        )
    if any(name.endswith(".gguf") for name in names):
        return "GGUF is not read; take the checkpoint with .safetensors files that it was made from"
    what = "" if names else "the folder is empty: "
    return f"{what}accepted: a whole checkpoint, e.g. hf download OWNER/NAME --local-dir DIR"


def no_weights(folder: Path, names: Sequence[str], flag: str) -> UsageError:
    """Nothing that may be read: pickles, GGUF or nothing at all."""
    text = f"{flag} {folder}: holds no .safetensors file"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        call = f"t.AutoModelForImageTextToText.from_pretrained('{folder}').save_pretrained('{folder}')"
        return UsageError(
            f"{text}; pickled weights are never opened; where you trust them, convert them: "
            f'python -c "import transformers as t; {call}"'
        )
    return UsageError(f"{text}; {instead(names)}")


def no_tokenizer(folder: Path, flag: str) -> UsageError:
    """A checkpoint without `tokenizer.json`, perhaps with a slow tokenizer."""
    call = f"t.AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
    return UsageError(
        f"{flag} {folder}: tokenizer.json is missing; download it, or convert a slow tokenizer: "
        f'python -c "import transformers as t; {call}"'
    )


def pointer(path: Path, flag: str) -> UsageError:
    """A repository cloned without its large files."""
    return UsageError(f"{flag} {path}: a pointer of Git LFS, not the file itself; get it: git lfs pull")


def no_index(path: Path, flag: str) -> UsageError:
    """Shards alone: nothing says which of them there should be."""
    return UsageError(f"{flag} {path}: is missing, which says where the weights are; download the folder again")
