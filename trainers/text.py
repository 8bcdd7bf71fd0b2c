"""Causal language models without pictures, as audits of finished models see them: texts in, a loss a text out.

Any type that transformers loads by `AutoModelForCausalLM` and that is causal: `load` compares, on public tokens, that
what follows a token does not change what is said of it. Conversations are written by the checkpoint's own chat
template; what counts there are the assistant's words and the token that ends them, as in training on answers.
"""

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dpaudit import online, untrusted
from dpaudit.errors import UsageError
from trainers import adapter_files, model_files
from trainers.chat_templates import rendered_templates
from trainers.families import FAMILIES
from trainers.opened import told_as
from trainers.vlm import pick_device

LOGITS_AT_ONCE = 1 << 27  # numbers: half a gigabyte in float32
PROBE = 6  # public tokens before the places that must not matter
ANSWERS = "assistant"
ROLES = ("system", "user", ANSWERS)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Said:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Text:
    """A text, of which what stands behind its first `given` characters counts; or a conversation."""

    text: str = ""
    given: int = 0
    conversation: tuple[Said, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """ids: (T,). counts: (T,) whether a token is scored; the first never is, since nothing predicts it."""

    ids: npt.NDArray[np.int64]
    counts: npt.NDArray[np.bool_]


def is_text_model(model_type: str) -> bool:
    """Whether a model type takes text and no pictures."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TEXT
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as PICTURES

    return model_type in TEXT and model_type not in PICTURES and model_type not in FAMILIES


class CausalLanguageModel:
    """A text model with its tokenizer and, where there is one, its chat template."""

    def __init__(
        self, hf: Any, tokenizer: Any, *, device: torch.device, source: str, guard: model_files.TokenizerGuard
    ) -> None:
        self.hf = hf.to(device).eval()
        self.tokenizer, self.device, self.source, self.guard = tokenizer, device, source, guard
        self.template: str | None = getattr(tokenizer, "chat_template", None)

    @classmethod
    def load(cls, path: str, *, device: str = "auto", fetch: bool | None = None, flag: str) -> "CausalLanguageModel":
        """A folder or a hub id, in float32, checked like every foreign checkpoint (trainers.model_files).

        fetch: whether a hub id may be asked for over the network. flag: how an error names the model.
        """
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as CLASSES
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        folder = model_files.find(path, flag, model_files.may_fetch(fetch))
        with online.cut_off(), told_as(f"{flag}: got {path!r}, which can't be loaded"):
            with untrusted.bounded_work():
                model_type = model_files.model_type(folder, f"{flag}:")
                if not is_text_model(model_type):
                    raise UsageError(f"{flag}: {path} is of type {model_type:.60}; accepted: a causal language model")
                files = model_files.check(folder, f"{flag}:")
                config = CONFIG_MAPPING[model_type].from_dict(dict(files.config))
                model_files.check_size(files, lambda: CLASSES[type(config)]._from_config(config), f"{flag}:")
                guard = model_files.TokenizerGuard.of(folder, f"{flag}:")
                tokenizer = AutoTokenizer.from_pretrained(
                    str(folder), trust_remote_code=False, local_files_only=True, config=config
                )
            wanted = {"dtype": torch.float32, "config": config, "trust_remote_code": False}
            hf = model_files.read_weights(AutoModelForCausalLM, folder, path, flag, **wanted)
            model_files.check_vocabulary(hf, tokenizer, path, flag)
            model = cls(hf, tokenizer, device=pick_device(device), source=path, guard=guard)
            model._check_causal(flag)
            return model

    def load_adapter(self, folder: Path, flag: str) -> None:
        """Put a PEFT adapter on top of this base. flag: how an error names the adapter."""
        self.hf = adapter_files.load(self.hf, folder, flag).to(self.device).eval()

    @property
    def longest(self) -> int | None:
        """Tokens that the model was made for; None where its configuration names no length."""
        length = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        return int(length) if isinstance(length, int) and length > 0 else None

    @torch.no_grad()
    def _logits(self, rows: Sequence[npt.NDArray[np.int64]]) -> Tensor:
        """(B, T, vocabulary) of right-padded rows."""
        width = max(len(row) for row in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = torch.from_numpy(row), 1
        given = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        logits: Tensor = self.hf(**given, use_cache=False).logits
        return logits.float()

    def _check_causal(self, flag: str) -> None:
        """UsageError unless what follows a token, padding included, leaves its logits alone."""
        most = self.hf.get_input_embeddings().weight.shape[0]
        drawn = np.random.default_rng(0).integers(0, most, (2, 2 * PROBE))
        drawn[1, :PROBE] = drawn[0, :PROBE]
        seen = self._logits([drawn[0], drawn[1], drawn[0, :PROBE]])[:, :PROBE]
        if not bool(torch.isfinite(seen).all() and torch.isfinite(self._at_the_end(drawn[0])).all()):
            raise UsageError(f"{flag}: {self.source} gives no finite numbers for public tokens")
        allowed = 1e-3 * float(seen.std()) + 1e-5
        if float((seen - seen[:1]).abs().max()) > allowed:
            raise UsageError(f"{flag}: {self.source} is not causal: later tokens change what it says of earlier ones")

    @torch.no_grad()
    def _at_the_end(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """Logits of tokens at the last places of the context, where some rotary embeddings have other factors."""
        if "position_ids" not in inspect.signature(self.hf.forward).parameters or self.longest is None:
            return torch.zeros(0)
        places = torch.arange(len(ids), device=self.device) + max(0, self.longest - len(ids))
        given = torch.from_numpy(ids).to(self.device)[None]
        logits: Tensor = self.hf(input_ids=given, position_ids=places[None], use_cache=False).logits
        return logits

    # -- texts -----------------------------------------------------------------------------------------------------

    def tokens(self, texts: Sequence[Text]) -> list[Tokens]:
        """Each text as tokens, whole. Raises UsageError where a conversation has no template that it fits."""
        writer = Writer(self.tokenizer, self.template)
        writer.prepare(texts)
        written = [writer(text) for text in texts]
        self.guard.vouch([item.text for item in written])
        return [self._tokens(item) for item in written]

    def _tokens(self, written: "Written") -> Tokens:
        made = self.tokenizer(written.text, add_special_tokens=written.special, return_offsets_mapping=True)
        ids = np.asarray(made["input_ids"], dtype=np.int64)
        ends = made["offset_mapping"]
        counts = np.array([any(a < last and b > first for first, last in written.counts) for a, b in ends], dtype=bool)
        counts[:1] = False
        return Tokens(ids, counts)

    def losses(self, texts: Sequence[Tokens]) -> Floats:
        """(n,) mean over the tokens that count of the negative log-likelihood of each, in nats."""
        found = np.empty(len(texts))
        for batch in self._batches(texts):
            logits = self._logits([texts[index].ids for index in batch])
            for place, index in enumerate(batch):
                item = texts[index]
                wanted = torch.from_numpy(np.flatnonzero(item.counts)).to(self.device)
                targets = torch.from_numpy(item.ids).to(self.device)[wanted]
                found[index] = float(nn.functional.cross_entropy(logits[place, wanted - 1].double(), targets))
        return found

    def _batches(self, texts: Sequence[Tokens]) -> Iterator[list[int]]:
        """Places of texts of similar lengths, as many together as memory allows."""
        most = max(1, LOGITS_AT_ONCE // self.hf.get_input_embeddings().weight.shape[0])
        batch: list[int] = []
        for index in sorted(range(len(texts)), key=lambda item: len(texts[item].ids)):
            if batch and (len(batch) + 1) * len(texts[index].ids) > most:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


# -- conversations as text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """text: as the tokenizer gets it. counts: its characters that count, from and to. special: whether the tokenizer
    adds its own special tokens."""

    text: str
    counts: tuple[tuple[int, int], ...]
    special: bool


class Writer:
    """Writes conversations by a chat template, which is a foreign program: it runs in a child with limits, once for
    each sequence of roles, on marks instead of what was said."""

    def __init__(self, tokenizer: Any, template: Any) -> None:
        self.template = template.get("default") if isinstance(template, dict) else template
        self.special = tokenizer.special_tokens_map
        self.endings = sorted(
            {*tokenizer.all_special_tokens, *map(str, getattr(tokenizer, "added_tokens_decoder", {}).values())}
            - {str(tokenizer.bos_token)},
            key=len,
            reverse=True,
        )
        self.parts: dict[tuple[str, ...], list[str]] = {}

    def prepare(self, texts: Sequence[Text]) -> None:
        """Render what the conversations among these texts need."""
        wanted = {tuple(item.role for item in text.conversation): None for text in texts if text.conversation}
        shapes = [roles for roles in wanted if roles not in self.parts]
        if not shapes:
            return
        if not isinstance(self.template, str):
            accepted = "a chat template in --model or --base (chat_template.jinja), or records with a column text"
            raise UsageError(f"--records: holds messages, and the model has no chat template; accepted: {accepted}")
        asked = [
            [{"role": role, "content": f"{{said{place}}}"} for place, role in enumerate(roles)] for roles in shapes
        ]
        for roles, found in zip(shapes, rendered_templates(self.template, self.special, asked), strict=True):
            shown = ", ".join(roles[:4]) + (", …" if len(roles) > 4 else "")
            if found.error is not None:
                raise UsageError(f"model: its chat template fails on messages of {shown} ({found.error})")
            parts = re.split(r"\{said(\d+)\}", found.text)
            if sorted(map(int, parts[1::2])) != list(range(len(roles))):
                raise UsageError(f"model: its chat template does not show each message of {shown} once")
            self.parts[roles] = parts

    def __call__(self, text: Text) -> Written:
        """The text of a conversation; a plain text as it is."""
        if not text.conversation:
            return Written(text.text, ((text.given, len(text.text)),), special=True)
        parts = self.parts[tuple(item.role for item in text.conversation)]
        out, counts = parts[0], []
        for place, behind in zip(parts[1::2], parts[2::2], strict=True):
            said = text.conversation[int(place)]
            if said.role == ANSWERS:
                counts.append((len(out), len(out) + len(said.content) + self._ending(behind)))
            out += said.content + behind
        return Written(out, tuple(counts), special=False)

    def _ending(self, behind: str) -> int:
        """Characters up to the end of the special token that closes an answer; 0 where none does."""
        blank = len(behind) - len(behind.lstrip())
        closing = next((token for token in self.endings if token and behind[blank:].startswith(token)), None)
        return 0 if closing is None else blank + len(closing)


def template_in(folder: Path) -> str | None:
    """The chat template that lies in a folder, an adapter's too; None where there is none."""
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        part = untrusted.part_of(folder, name)
        if name.endswith(".jinja"):
            return untrusted.read_text(part, untrusted.MOST_CONFIGURATION)
        try:
            tree = untrusted.read_json(part, untrusted.MOST_SETTINGS)
        except ValueError:
            raise UsageError(f"{folder / name}: damaged, not a JSON object") from None
        found = tree.get("chat_template") if isinstance(tree, dict) else None
        if isinstance(found, str):
            return found
    return None
