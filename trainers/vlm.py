"""A vision-language model, real or compact, as the trainer and the attacks see it.

Four steps, each usable alone: `visual_tokens` (tower, one layer), a reducer (trainers.reducers), `losses` (projector
and language model over packed questions, one number a row) and `answer` (greedy generation). The tower is frozen, so
its tokens can be computed once. What differs between architectures is in `trainers.families`.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dpaudit import online
from dpaudit.config import LoraConfig, ReducerConfig
from dpaudit.errors import EnvironmentFailure
from trainers import lora, model_files, probe
from trainers import precision as precisions
from trainers.families import Family, Grid
from trainers.families.attention import widened
from trainers.families.base import Prepared
from trainers.generation import Encoded as Encoded
from trainers.generation import greedy, join
from trainers.opened import REFERENCE as REFERENCE
from trainers.opened import Opened, family_class, open_checkpoint, told_as
from trainers.precision import Precision
from trainers.prompts import IGNORE, TEXT, Head, HeadRow, Packed, stack_heads
from trainers.records import Image, Pixels, Question, in_batches, pixels_sha256
from trainers.reducers import Reduced, Reducer, VisualTokens, make_reducer, sized

SPARE = "<|spare_{}|>"
Checkpointing = Literal["none", "reentrant", "non-reentrant"]


def pick_device(name: str) -> torch.device:
    """'auto' takes CUDA, then MPS, then the CPU; a device that is asked for and missing is an error."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentFailure(f"model.device: got {name!r}, but torch sees no CUDA device; accepted here: cpu, auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise EnvironmentFailure("model.device: got 'mps', but torch sees no MPS device; accepted here: cpu, auto")
    return torch.device(name)


class VisionLanguageModel:
    """A model of one of the supported families with its tokenizer and picture preprocessing."""

    def __init__(
        self,
        hf: Any,
        tokenizer: Any,
        *,
        device: torch.device,
        source: str,
        processor: Any = None,
        guard: model_files.TokenizerGuard | None = None,
    ) -> None:
        self.hf = hf.to(device).eval()
        for parameter in self.hf.parameters():
            parameter.requires_grad_(False)
        self.tokenizer = tokenizer
        self.guard = guard
        self.device = device
        self.source = source
        self.family: Family = family_class(hf.config.model_type, source)(self.hf, processor, source)
        self.layers = self.family.layers(ReducerConfig())
        self.drop_cls = self.family.drop_cls
        self.prompter = self.family.prompter(tokenizer)
        self.checkpointing: Checkpointing = "none"
        self.precision: Precision = "float32" if hf.dtype == torch.float32 else "bfloat16"
        self.trained = "both"
        self.too_long: list[int] = []
        self.warnings: tuple[str, ...] = ()
        self.reducer_config = ReducerConfig()
        self.reducer: Reducer = self._make_reducer(ReducerConfig(), self.family.patches)

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | None = None,
        *,
        device: str = "auto",
        precision: Precision = "float32",
        fetch: bool | None = None,
        flag: str = "model.path",
        opened: Opened | None = None,
    ) -> "VisionLanguageModel":
        """The reference model (path None), a folder, or a hub id. Never runs code that a checkpoint brings along.

        precision: of the frozen weights and of what is computed with them (trainers.precision). fetch: whether a hub id
        may be asked for over the network (None: where the user said so, dpaudit.online); without it the local cache
        must hold it. flag: how an error names the model.
        """
        made = opened or open_checkpoint(path, fetch=fetch, flag=flag)
        path, flag = made.source, made.flag
        with online.cut_off(), told_as(f"{flag}: got {path!r}, which can't be loaded"):
            where = pick_device(device)
            wanted = precisions.settings(made, precision, where)
            hf = model_files.read_weights(made.architecture, made.folder, str(path), flag, **wanted)
            model = cls(
                precisions.unpacked(hf),
                made.tokenizer,
                device=where,
                source=path or "reference",
                processor=made.processor,
                guard=made.guard,
            )
            model.warnings, model.precision = made.warnings, precision
            if path is not None:
                probe.check(model, flag)
            return model

    def set_reducer(self, config: ReducerConfig) -> None:
        """Choose the reducer used by `answer` and by callers of `self.reducer`; raises UsageError on bad sizes.

        `self.reducer_config` is then the configuration with the numbers that it left to the checkpoint.
        """
        layers = self.family.layers(config)
        config = sized(config, self.family.patches)
        self.reducer = self._make_reducer(config, self.family.patches)
        self.layers = layers
        named = {"layer": layers.importance, "feature_layer": layers.features}
        self.reducer_config = config.model_copy(update=named)

    def _make_reducer(self, config: ReducerConfig, patches: int | None) -> Reducer:
        return make_reducer(config, patches=sys.maxsize if patches is None else patches, drop_cls=self.drop_cls)

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Any:
        """The transformers model, with or without a PEFT wrapper around it."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    @property
    def dtype(self) -> torch.dtype:
        """What the frozen weights are computed in, and kept in unless they are quantised."""
        dtype: torch.dtype = self.family.hf.dtype
        return dtype

    @property
    def patches(self) -> int:
        """Visual tokens of a picture before the reducer, CLS not counted; 0 where pictures differ."""
        return self.family.patches or 0

    @property
    def max_positions(self) -> int:
        """Longest sequence that the language model was made for."""
        return self.family.max_positions

    def spare_tokens(self, count: int) -> list[str]:
        """At most `count` single tokens that ordinary text does not use, for new-token canaries.

        The reference tokenizer reserves 256. For other models: the last ordinary vocabulary entries that survive a
        round trip through text; a public choice, made without looking at any data.
        """
        vocabulary = self.tokenizer.get_vocab()
        if SPARE.format(0) in vocabulary:
            return [token for token in map(SPARE.format, range(count)) if token in vocabulary]
        special = set(self.tokenizer.all_special_ids)
        found: list[str] = []
        for index in sorted(vocabulary.values(), reverse=True):
            if index in special:
                continue
            text = self.tokenizer.decode([index])
            if text.strip() and self.tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"] == [index]:
                found.append(text.strip())
            if len(found) == count:
                break
        return found

    def vouch(self, asked: Iterable[tuple[str | Question, int]], *, answers: bool = False) -> None:
        """Raise UsageError where a foreign tokenizer takes too long or too much on one of these questions.

        asked: each with its number of pictures. answers: with their own answers.
        """
        if self.guard is not None and self.guard.risky:
            self.guard.vouch(self.prompter.texts(asked, answers=answers))

    # -- pictures --------------------------------------------------------------------------------------------------

    def _pixel_values(self, pixels: Sequence[Pixels]) -> Tensor:
        """Tower inputs of pictures of one grid, (B, …)."""
        return torch.stack([picture.values for picture in self.family.prepare(pixels)])

    @torch.no_grad()
    def visual_tokens(self, pixels: Sequence[Pixels], *, batch_size: int = 64) -> VisualTokens:
        """Encode pictures (uint8, (H, W, 3) each) of one grid with the frozen tower; see VisualTokens for shapes.

        Only the attention of `layers.importance` is computed, from queries and keys, so its kernels stay fast.
        """
        groups = self._by_grid(pixels)
        if len(groups) > 1:
            raise ValueError("pictures with different numbers of visual tokens; encode them with `encoded`")
        return self._visual(next(iter(groups.values()))[1], batch_size)

    def _by_grid(self, pixels: Sequence[Image]) -> dict[Grid, tuple[list[int], list[Prepared]]]:
        groups: dict[Grid, tuple[list[int], list[Prepared]]] = {}
        prepared = (picture for batch in in_batches(pixels) for picture in self.family.prepare(batch))
        for index, picture in enumerate(prepared):
            places, pictures = groups.setdefault(picture.grid, ([], []))
            places.append(index)
            pictures.append(picture)
        return groups

    def _visual(self, pictures: Sequence[Prepared], batch_size: int) -> VisualTokens:
        starts = range(0, len(pictures), batch_size)
        return VisualTokens.join([self.family.encode(pictures[at : at + batch_size], self.layers) for at in starts])

    @torch.no_grad()
    def encoded(self, pixels: Sequence[Image], *, batch_size: int = 64) -> list[Encoded]:
        """Pictures of any size through tower and reducer, in their order.

        Pictures of one grid share a batch. Raises UsageError when a picture has too few tokens for the reducer.
        """
        found: dict[int, Encoded] = {}
        for grid, (places, pictures) in self._by_grid(pixels).items():
            visual = self._visual(pictures, batch_size)
            patches = visual.tokens.shape[1]
            if self.family.patches is None:
                self._make_reducer(self.reducer_config, patches)  # do K and k fit these pictures?
            reduced = self.reduce(visual)
            heads = self.family.head(self.prompter, grid, reduced, patches)
            for place, tokens, head in zip(places, reduced.tokens, heads, strict=True):
                found[place] = Encoded(tokens.to(self.dtype), reduced.fused, head)
        return [found[place] for place in range(len(pixels))]

    def reduce(self, visual: VisualTokens) -> Reduced:
        """Apply the chosen reducer."""
        return self.reducer(visual)

    # -- questions -------------------------------------------------------------------------------------------------

    def logits(self, tokens: Tensor, packed: Packed) -> Tensor:
        """(targets, vocabulary) logits at the positions of `packed` that have a target, in row-major order.

        tokens: (B, M, D) visual tokens after the reducer, before the projector.
        """
        family = self.family
        head = packed.head if packed.head is not None else self._plain_head(packed.rows, tokens.shape[1])
        front = self.front(tokens, head)
        embeds = torch.cat([front, self.embed(packed.input_ids).to(front.dtype)], dim=1)
        text = (packed.offset + head.start[:, None]).expand(family.axes, -1, -1)
        positions = torch.cat([head.positions, text], dim=2)
        if self.checkpointing == "reentrant" and torch.is_grad_enabled() and not embeds.requires_grad:
            embeds = embeds.detach().requires_grad_(True)  # without a gradient at its input it records no graph
        with self._recomputing():
            hidden = family.decode(embeds, family.mask(packed, head), positions)[:, front.shape[1] :]
        return family.output(hidden[packed.targets != IGNORE])

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of text tokens."""
        return self.family.embedded(self.core.get_input_embeddings()(ids))

    def front(self, tokens: Tensor, head: Head) -> Tensor:
        """(B, H, W) embeddings of the head, with the projected visual tokens in their slots."""
        visual = self.family.project(tokens.to(self.dtype))
        place = head.slot.clamp(min=0).unsqueeze(-1).expand(-1, -1, visual.shape[-1])
        words = self.embed(torch.where(head.slot == TEXT, head.ids, self.prompter.pad_id)).to(visual.dtype)
        return torch.where((head.slot >= 0).unsqueeze(-1), visual.gather(1, place), words)

    def _plain_head(self, rows: int, tokens: int) -> Head:
        """The template's beginning, then all visual tokens: the head where none was computed."""
        prefix = self.prompter.prefix
        count = len(prefix) + tokens
        ids = np.asarray([*prefix, *[self.prompter.pad_id] * tokens], dtype=np.int64)
        slot = np.asarray([*[TEXT] * len(prefix), *range(tokens)], dtype=np.int64)
        row = HeadRow(ids, slot, np.arange(count, dtype=np.int64)[None], count)
        if self.family.axes != 1 or self.family.first_position or not self.patches:
            raise ValueError(f"{self.family.model_type}: rows need heads; build them with trainers.inputs.UnitInputs")
        return stack_heads([row] * rows).to(self.device)

    def losses(self, tokens: Tensor, packed: Packed) -> Tensor:
        """(B,) one loss a row: the mean over its questions of the mean over that question's own answer tokens."""
        wanted = packed.targets != IGNORE
        cross_entropy = nn.functional.cross_entropy(
            widened(self.logits(tokens, packed)), packed.targets[wanted], reduction="none"
        )
        owner = wanted.nonzero()[:, 0]
        weighted = cross_entropy * packed.weights[wanted]
        return torch.zeros(packed.rows, dtype=weighted.dtype, device=self.device).index_add(0, owner, weighted)

    def shown(self, encoded: Sequence[Encoded]) -> Encoded:
        """The pictures of one question, encoded each by itself, as one."""
        if len(encoded) == 1:
            return encoded[0]
        between = self.prompter.between(len(encoded))
        return join(encoded, len(self.prompter.prefix), between, self.family.first_position)

    @torch.no_grad()
    def answer(
        self,
        pixels: Sequence[Image | tuple[Image, ...]],
        questions: Sequence[str | Question],
        *,
        batch_size: int = 128,
        max_new_tokens: int = 12,
    ) -> list[str]:
        """Greedy answers, one a (picture or pictures, question) pair; the result does not depend on the batch size.

        Pictures are reduced as in training, without fusion noise. Equal pictures are encoded once. A question that the
        model's context can't hold gets no answer (empty text); `too_long` names these questions until the next call.
        """
        if len(pixels) != len(questions):
            raise ValueError(f"{len(pixels)} pictures for {len(questions)} questions")
        sets = [item if isinstance(item, tuple) else (item,) for item in pixels]
        self.vouch([(item, len(shown)) for item, shown in zip(questions, sets, strict=True)])
        place, unique = _deduplicate([item for shown in sets for item in shown])
        single = [item for at in range(0, len(unique), 256) for item in self.encoded(unique[at : at + 256])]
        ends = np.cumsum([len(shown) for shown in sets], dtype=np.int64)
        which = [tuple(place[end - len(shown) : end].tolist()) for end, shown in zip(ends, sets, strict=True)]
        joined = {item: self.shown([single[index] for index in item]) for item in dict.fromkeys(which)}
        ids = [self.prompter.question_ids(item, len(shown)) for item, shown in zip(questions, sets, strict=True)]
        longest = self.max_positions
        self.too_long = [
            index for index, item in enumerate(ids) if len(joined[which[index]].head.slot) + len(item) >= longest
        ]
        fits = sorted(set(range(len(ids))) - set(self.too_long))
        order = sorted(fits, key=lambda item: len(ids[item]))  # similar lengths together: little padding
        answers = [""] * len(ids)
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            pictures = [joined[which[item]] for item in chosen]
            texts = greedy(self, pictures, [ids[item] for item in chosen], max_new_tokens)
            for item, text in zip(chosen, texts, strict=True):
                answers[item] = text
        return answers

    # -- adapters --------------------------------------------------------------------------------------------------

    def attach_lora(self, config: LoraConfig, *, generator: np.random.Generator) -> dict[str, nn.Parameter]:
        """Inject LoRA into the language model (and projector if asked); the trainable parameters by name.

        The A matrices are drawn from `generator`, the B matrices are zero, so the model starts as the base. Adapters
        are float32 whatever the model computes in: master weights, gradients, clipping and noise lose nothing.
        """
        self.hf = lora.attach(self.hf, self.family, config, generator)
        self.trained = config.train
        return lora.trained(self.hf)

    def load_adapter(self, folder: Path, flag: str = "adapter", *, trained: str = "both") -> None:
        """Put a released PEFT adapter on top of this base. flag: how an error names it. trained: model.lora.train."""
        self.trained = trained
        self.hf = lora.load(self.hf, folder, flag).to(self.device).eval()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, made trainable: for attacks that need gradients of a released model."""
        return lora.made_trainable(self.hf, self.trained)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's own layout (safetensors)."""
        self.hf.save_pretrained(str(folder), safe_serialization=True)

    # -- memory ----------------------------------------------------------------------------------------------------

    def set_checkpointing(self, mode: Checkpointing) -> None:
        """Keep only the inputs of the decoder's layers for the backward pass and compute the rest again there."""
        self.checkpointing = mode
        if mode != "none":
            settings = {"use_reentrant": mode == "reentrant"}
            self.family.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """transformers checkpoints only layers in training mode; dropout and the like stay off below them."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        on = self.checkpointing != "none" and torch.is_grad_enabled()
        modules = self.family.language_model.modules() if on else ()
        layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


short_name = lora.short_name


def _deduplicate(pixels: Sequence[Image]) -> tuple[npt.NDArray[np.int64], list[Image]]:
    seen: dict[str, int] = {}
    unique: list[Image] = []
    index = np.empty(len(pixels), dtype=np.int64)
    for row, item in enumerate(pixels):
        digest = pixels_sha256(item)
        if digest not in seen:
            seen[digest] = len(unique)
            unique.append(item)
        index[row] = seen[digest]
    return index, unique
