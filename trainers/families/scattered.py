"""Every other type whose pictures become embeddings in the prompt: processor and model as they are.

`get_image_features` gives a picture's projected tokens; the processor says where they stand in the prompt; the decoder
sees one causal sequence, with positions one after the other or those of the model's own `get_rope_index`. What does not
work like that (cross-attention, features for several layers, layers without attention) is refused: `check` compares
with the model's own forward pass, on a public picture of noise and two questions, before anything else is done.

Reducers work on projected tokens, so only those that need no attention are offered (random, divprune).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dpaudit.errors import UsageError, rejected
from trainers.families.base import Family, Grid, Layers, Prepared, arrange
from trainers.prompts import ChatTemplate, Head, HeadRow, Packed, Prompter
from trainers.records import Pixels
from trainers.reducers import Reduced, VisualTokens

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
NOISE_SIDE = 64
NEVER = r"(?!)"  # a regular expression that nothing matches


class Scattered(Family):
    """Grid: the ids of the whole head, image tokens in their places, so that pictures of one layout go together.

    values of a picture: what its processor made, by name. packs: several questions share a sequence, as elsewhere.
    """

    architecture = "AutoModelForImageTextToText"
    projector = NEVER

    def __init__(self, hf: Any, processor: Any, source: str) -> None:
        super().__init__(hf, processor, source)
        self.model_type = str(hf.config.model_type)
        text = hf.config.get_text_config()
        others = set(getattr(text, "layer_types", None) or ()) - set(ATTENTION)
        if others or not hasattr(text, "max_position_embeddings"):
            what = f"layers of {', '.join(sorted(others))}" if others else "no length of context in its configuration"
            raise self._refused(what)
        if self._features is None or self._image_id is None:
            raise self._refused("no get_image_features or no image token: pictures do not become tokens of the prompt")
        names = [name for name, module in hf.named_modules() if module is self.language_model]
        self.language = rf".*{names[0]}\..*" if names else NEVER
        self.axes = 1 if self._rope is None else 3
        self.scaled = True  # logits, as the decoder's configuration says: some wrappers leave it out (see `check`)
        self._form: Prompter | None = None

    def _refused(self, why: str) -> UsageError:
        accepted = "a type with pictures as tokens in one causal sequence (docs/models.md lists what works)"
        return UsageError(
            f"model.path: {self.source} is of type {self.hf.config.model_type}: {why}; accepted: {accepted}"
        )

    @property
    def _image_id(self) -> int | None:
        for name in ("image_token_id", "image_token_index"):
            if getattr(self.hf.config, name, None) is not None:
                return int(getattr(self.hf.config, name))
        return None

    @property
    def _features(self) -> Any:
        places = (self.hf, getattr(self.hf, "model", None))
        return next(
            (found for found in (getattr(place, "get_image_features", None) for place in places) if found), None
        )

    @property
    def _rope(self) -> Any:
        """The model's own function of a prompt that gives positions of time, height and width, or None."""
        return getattr(getattr(self.hf, "model", self.hf), "get_rope_index", None)

    # -- the tower -------------------------------------------------------------------------------------------------

    @property
    def tower(self) -> nn.Module:
        inner = getattr(self.hf, "model", self.hf)
        names = ("vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder")
        return next((getattr(inner, name) for name in names if hasattr(inner, name)), nn.Identity())

    @property
    def depth(self) -> int:
        return 1

    @property
    def layer(self) -> int:
        return -1

    @property
    def patches(self) -> int | None:
        return None

    def check_layer(self, layer: int, *, attention: bool, field: str = "reducer.layer") -> None:
        if attention:
            accepted = "none, random or divprune: this type's tokens are reduced behind its projector"
            raise rejected("reducer.name", self.model_type, accepted)

    def prepare(self, pixels: Sequence[Pixels]) -> list[Prepared]:
        return [self._prepared(item) for item in pixels]

    def _prepared(self, pixels: Pixels) -> Prepared:
        prompter = self._prompter
        made = self.process(prompter.prompt("?"), [pixels], special=prompter.special)
        ids = made.pop("input_ids")[0].tolist()
        rest = prompter.question_ids("?")
        if not rest or ids[-len(rest) :] != rest:
            raise self._refused("its processor writes the prompt in a way that is not understood")
        head = ids[: -len(rest)]
        if self._image_id not in head:
            raise self._refused("its processor puts no image token into the prompt")
        values: Any = made
        if self._rope is None:
            return Prepared(values, tuple(head))
        places = self._places(made, [*head, *rest])[:, : len(head) + 1]
        self.axes = len(places)  # three, or four where the place in the text is one of its own
        return Prepared(values, (*head, *places[:, :-1].flatten().tolist(), int(places[0, -1])))

    def _places(self, made: dict[str, Tensor], ids: list[int]) -> Tensor:
        """(axes, T) positions of a prompt with one picture."""
        whole = torch.tensor([ids])
        kinds = made.get("mm_token_type_ids", torch.eq(whole, self._image_id or 0).int())
        takes = set(inspect.signature(self._rope).parameters)
        sides = {name: value for name, value in made.items() if name.endswith("grid_thw") and name in takes}
        places: Tensor = self._rope(input_ids=whole, mm_token_type_ids=kinds, **sides)[0]
        return places[:, 0]

    def _split(self, grid: Grid) -> tuple[tuple[int, ...], np.ndarray[Any, Any], int]:
        """(ids, (axes, H) positions, first position behind them) of a whole head."""
        if self.axes == 1:
            return grid, np.arange(len(grid), dtype=np.int64)[None], len(grid)
        length = len(grid) // (1 + self.axes)
        places = np.asarray(grid[length:-1], dtype=np.int64).reshape(self.axes, length)
        return grid[:length], places, grid[-1]

    @property
    def _prompter(self) -> Prompter:
        assert self._form is not None
        return self._form

    def process(self, text: str, pixels: Sequence[Pixels], *, special: bool) -> dict[str, Tensor]:
        """What the checkpoint's own processor makes of a prompt and pictures."""
        pictures = [Image.fromarray(item) for item in pixels]
        try:
            made = self.processor(text=[text], images=pictures, return_tensors="pt", add_special_tokens=special)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            why = " ".join(str(error).split())[:120]
            raise self._refused(
                f"its processor fails on a picture of {pixels[0].shape[1]}x{pixels[0].shape[0]} ({why})"
            ) from error
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    @torch.no_grad()
    def encode(self, pictures: Sequence[Prepared], layers: Layers) -> VisualTokens:
        function = self._features
        outer_and_inner = [function, getattr(getattr(self.hf, "model", None), "get_image_features", function)]
        takes = {name for place in outer_and_inner for name in inspect.signature(place).parameters}
        rows = []
        for picture in pictures:
            given = {
                name: value.to(self.hf.device, self.hf.dtype if value.is_floating_point() else None)
                for name, value in dict(picture.values).items()
                if name in takes
            }
            rows.append(_flat(function(**given)))
        wanted = sum(token == self._image_id for token in self._split(pictures[0].grid)[0])
        if any(len(row) != wanted for row in rows):
            raise self._refused(f"{len(rows[0])} features for {wanted} places of a picture")
        tokens = torch.stack(rows)
        nothing = torch.zeros(tokens.shape[:2], device=tokens.device)
        return VisualTokens(tokens, None, nothing, tokens)

    def project(self, tokens: Tensor) -> Tensor:
        return tokens

    # -- the prompt ------------------------------------------------------------------------------------------------

    def prompter(self, tokenizer: Any) -> Prompter:
        holder = self.processor if getattr(self.processor, "chat_template", None) else tokenizer
        if getattr(holder, "chat_template", None) is None:
            accepted = "a checkpoint with a chat template; put its chat_template.jinja into the folder"
            raise rejected("model.path", self.source, accepted)
        marks = [getattr(self.processor, name, None) for name in ("image_token", "boi_token", "start_image_token")]
        marks += [tokenizer.convert_ids_to_tokens(self._image_id), "<image>"]
        form: ChatTemplate | None = None
        for mark in dict.fromkeys(str(mark) for mark in marks if mark):
            try:
                form = ChatTemplate(tokenizer, mark, chat_template=holder.chat_template)
                break
            except UsageError as error:
                last = error
        if form is None:
            raise last
        begun = tokenizer.bos_token is not None and form.text.startswith(tokenizer.bos_token)
        token = int(tokenizer.convert_tokens_to_ids(form.image))
        self._form = Prompter(tokenizer, form, token, special=not begun)
        return self._form

    def head(self, prompter: Prompter, grid: Grid, reduced: Reduced, patches: int) -> list[HeadRow]:
        known, positions, behind = self._split(grid)
        whole = np.asarray(known, dtype=np.int64)
        places = np.flatnonzero(whole == self._image_id)
        rows = []
        for index in range(reduced.kept.shape[0]):
            kept = reduced.kept[index].cpu().numpy()
            columns, slot, _ = arrange(np.arange(len(whole)), places, kept, 0, 0)
            if self.axes == 1:
                rows.append(HeadRow(whole[columns], slot, positions[:, : len(columns)], len(columns)))
            else:  # a token that is kept stays where it is, and the text begins where it would without any reduction
                rows.append(HeadRow(whole[columns], slot, positions[:, columns], behind))
        return rows

    # -- the language model ----------------------------------------------------------------------------------------

    @property
    def language_model(self) -> Any:
        inner = getattr(self.hf, "model", self.hf)
        for name in ("language_model", "text_model"):
            if hasattr(inner, name):
                return getattr(inner, name)
        return self.hf.get_decoder()

    @property
    def _both_ways(self) -> bool:
        """Whether a picture's tokens see each other in both directions, as in Gemma 3."""
        return self.model_type.startswith(("gemma3", "shieldgemma"))

    def mask(self, packed: Packed, head: Head) -> Tensor:
        mask = super().mask(packed, head)
        if not self._both_ways:
            return mask
        width = head.slot.shape[1]
        mask[:, 0, :width, :width] |= _blocks(head.slot >= 0)
        return mask

    def prompt_mask(self, visible: Tensor, image: Tensor) -> Tensor:
        mask = super().prompt_mask(visible, image)
        return mask | _blocks(image)[:, None] if self._both_ways else mask

    def output(self, hidden: Tensor) -> Tensor:
        logits = super().output(hidden)
        if not self.scaled:
            return logits
        text = self.hf.config.get_text_config()
        scale = getattr(self.hf, "logit_scale", None) or getattr(text, "logit_scale", None)
        cap = getattr(text, "final_logit_softcapping", None)
        if getattr(text, "logits_scaling", None):
            logits = logits / text.logits_scaling
        logits = logits * scale if scale is not None else logits
        return logits if cap is None else torch.tanh(logits / cap) * cap


def _flat(found: Any) -> Tensor:
    """(N, W) from what `get_image_features` returns: a tensor, one a tile, or an output with either."""
    found = getattr(found, "pooler_output", found)
    parts = [found] if isinstance(found, Tensor) else list(found)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _blocks(image: Tensor) -> Tensor:
    """(B, T, T) True where both places lie in the same run of visual tokens. image: (B, T)."""
    starts = image & ~nn.functional.pad(image[:, :-1], (1, 0))
    number = starts.long().cumsum(dim=1)
    return image[:, :, None] & image[:, None, :] & (number[:, :, None] == number[:, None, :])


def check(model: Any) -> None:
    """Compare logits of two packed questions with the model's own forward pass; UsageError where they differ.

    The picture is noise and the questions are fixed: nothing private is touched.
    """
    from trainers.inputs import UnitInputs
    from trainers.records import Picture, Question, Unit

    family = model.family
    pixels = np.random.default_rng(0).integers(0, 256, (NOISE_SIDE, NOISE_SIDE + 16, 3), dtype=np.uint8)
    asked = (Question("What is this?", "a thing"), Question("Is it one?", "no"))
    rows = UnitInputs(model, [Unit("check", (Picture("check", pixels, asked),))]).select([0])
    with torch.no_grad():
        wanted, other = (_own_answers(model, item, asked) for item in (pixels, 255 - pixels))
        effect = float((wanted - other).abs().max())  # what the picture does: a comparison may not be blinder than this
        if effect == 0.0:
            raise family._refused("its answers do not depend on the picture, so nothing can be compared")
        allowed = max(1e-5, min(1e-3, 0.01 * effect)) if model.dtype == torch.float32 else 0.2
        for family.scaled in (True, False):
            try:
                mine = model.logits(rows.tokens, rows.packed).float().log_softmax(dim=-1)
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
                why = " ".join(str(error).split())[:100]
                raise family._refused(f"its decoder does not take a sequence of embeddings ({why})") from error
            gap = float((mine - wanted).abs().max())
            if gap < allowed:
                break
    if not gap < allowed:
        raise family._refused(f"its answers differ from its own forward pass by {gap:.2g} (log-probability)")


def _own_answers(model: Any, pixels: Pixels, asked: Sequence[Any]) -> Tensor:
    """Log-probabilities at the answers of questions about a picture, by the model's own forward pass."""
    family, prompter, found = model.family, model.prompter, []
    for question in asked:
        answer = prompter.encode(question.text, question.answer)[1]
        given = family.process(prompter.prompt(question.text), [pixels], special=prompter.special)
        found.append(_own_logits(family.hf, given, answer))
    return torch.cat(found).float().log_softmax(dim=-1)


def _own_logits(hf: Any, given: dict[str, Tensor], answer: Sequence[int]) -> Tensor:
    """(answer tokens, vocabulary) logits of the model's own forward pass."""
    length = given["input_ids"].shape[1]
    tail = torch.tensor([list(answer[:-1])], dtype=torch.int64)
    whole = {}
    for name, value in given.items():
        if value.shape == given["input_ids"].shape:  # one number a token: kinds of tokens are zero for text
            fill = tail if name == "input_ids" else torch.ones_like(tail) * (name == "attention_mask")
            value = torch.cat([value, fill.to(value.dtype)], dim=1)
        whole[name] = value.to(hf.device, hf.dtype if value.is_floating_point() else None)
    logits: Tensor = hf(**whole, use_cache=False).logits[0, length - 1 : length - 1 + len(answer)]
    return logits
