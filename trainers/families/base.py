"""What differs between families of vision-language models, behind one interface.

A family knows where its tower is, how a picture becomes tower inputs (tiles, dynamic resolution), how tokens are
projected, where they stand in the prompt, what may see what, and which modules an adapter may touch. Everything else
(reducers, packing, losses, gradients, generation) is written once, in `trainers.vlm`.

The tower is frozen and runs without gradients, and what it says of a picture is one row, however many tiles the picture
has: per-tile gradients, and so per-tile clipping, can't come about.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from dpaudit.config import ReducerConfig
from dpaudit.errors import rejected
from trainers.prompts import PADDING, TEXT, ChatTemplate, Head, HeadRow, Packed, Prompter, attention_mask
from trainers.records import Pixels
from trainers.reducers import Reduced, VisualTokens

Grid = tuple[int, ...]
WITHOUT_ATTENTION = ("none", "random", "divprune")  # reducers that look at neither attention nor keys


@dataclass(frozen=True)
class Prepared:
    """One picture as its tower takes it. grid: the layout of its tokens; pictures of one grid are encoded together."""

    values: Tensor
    grid: Grid


class Layers(NamedTuple):
    """Encoder layers as LLaVA counts them: n is hidden state n, the output of layer n; negative from the end."""

    importance: int  # attention and keys
    features: int


class Family(ABC):
    """One family around its transformers model, which stays the same object when PEFT wraps it.

    hf: the `…ForConditionalGeneration`. processor: the checkpoint's own picture preprocessing, or None.
    """

    model_type: str
    architecture: str  # name of the class in transformers
    packs: bool = True  # several questions behind one picture in one sequence
    axes: int = 1  # axes of a position
    first_position: int = 0
    language: str = r".*language_model\..*"  # modules that LoRA may touch, as a regular expression before the targets
    projector: str  # the projector's own linear layers, as a regular expression

    def __init__(self, hf: Any, processor: Any, source: str) -> None:
        self.hf, self.processor, self.source = hf, processor, source

    # -- the tower -------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision tower, frozen."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Number of encoder layers of the tower."""

    @property
    @abstractmethod
    def layer(self) -> int:
        """The layer of attention and keys where the configuration names none (negative: from the end)."""

    @property
    def feature_layer(self) -> int:
        """The layer whose features the checkpoint's projector was trained on."""
        return -1

    @property
    @abstractmethod
    def patches(self) -> int | None:
        """Visual tokens of a picture as a reducer sees them, CLS not counted; None where pictures differ."""

    @property
    def drop_cls(self) -> bool:
        """Whether the checkpoint leaves out the CLS token where nothing is reduced."""
        return False

    def layers(self, config: ReducerConfig) -> Layers:
        """The layers that a configuration asks for; UsageError for one that this tower can't offer.

        Features come from the one layer that the projector was trained on.
        """
        if config.feature_layer not in (None, self.feature_layer):
            accepted = (
                f"null: the projector of a {self.model_type} takes features of its own layer, {self.feature_layer}"
            )
            raise rejected("reducer.feature-layer", config.feature_layer, accepted)
        importance = self.layer if config.layer is None else config.layer
        self.check_layer(importance, attention=config.name not in WITHOUT_ATTENTION)
        return Layers(importance, self.feature_layer)

    def check_layer(self, layer: int, *, attention: bool, field: str = "reducer.layer") -> None:
        """Raise UsageError for a `reducer.layer` that this tower can't offer (or not to a reducer of attention)."""
        depth = self.depth
        if layer == 0 or not -depth <= layer <= depth:
            accepted = f"{-depth} to -1 or 1 to {depth}, as in LLaVA's vision_feature_layer ({depth} encoder layers)"
            raise rejected(field, layer, accepted)

    @abstractmethod
    def prepare(self, pixels: Sequence[Pixels]) -> list[Prepared]:
        """Pictures (uint8, (H, W, 3) each) as tower inputs on the CPU, each made from that picture alone."""

    @abstractmethod
    def encode(self, pictures: Sequence[Prepared], layers: Layers) -> VisualTokens:
        """Tokens of pictures of one grid, before the projector, with attention and keys."""

    # -- the prompt ------------------------------------------------------------------------------------------------

    @abstractmethod
    def prompter(self, tokenizer: Any) -> Prompter:
        """The family's prompt around a question."""

    def image_head(self, prompter: Prompter, grid: Grid, tokens: int) -> list[int]:
        """Ids of a whole head, the image token's id at each of the picture's `tokens` places."""
        return [*prompter.prefix, *[prompter.image_token_id] * tokens]

    def head(self, prompter: Prompter, grid: Grid, reduced: Reduced, patches: int) -> list[HeadRow]:
        """The head of each picture in `reduced`, whose tower gave `patches` tokens.

        Markers of tiles stay where they are; a token that was dropped leaves its place, CLS (or whatever else comes
        first) stands before the first place and fused tokens behind the last one.
        """
        whole = np.asarray(self.image_head(prompter, grid, patches), dtype=np.int64)
        places = np.flatnonzero(whole == prompter.image_token_id)
        kept = reduced.kept.cpu().numpy()
        front = reduced.tokens.shape[1] - kept.shape[1] - reduced.fused
        rows: list[HeadRow] = []
        same = _one_run(places)
        for index in range(kept.shape[0]):
            if index and same and self.axes == 1:  # only the count of tokens matters
                rows.append(rows[0])
                continue
            ids, slot, origin = arrange(whole, places, kept[index], front, reduced.fused)
            positions, start = self.positions(slot, origin, grid, reduced, index)
            rows.append(HeadRow(ids, slot, positions, start))
        return rows

    def positions(
        self, slot: npt.NDArray[np.int64], origin: npt.NDArray[np.int64], grid: Grid, reduced: Reduced, index: int
    ) -> tuple[npt.NDArray[np.int64], int]:
        """(axes, H) positions of a head and the first position behind it; one after the other by default.

        origin: (H,) the tower's own number of the token in each slot, -1 where there is none.
        """
        count = len(slot)
        return np.arange(count, dtype=np.int64)[None] + self.first_position, count + self.first_position

    # -- the language model ----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def language_model(self) -> Any:
        """The decoder without its output layer."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """(B, M, D) tokens into the language model's space, (B, M, W); each token by itself."""

    def embedded(self, words: Tensor) -> Tensor:
        """Embeddings of text as `decode` takes them, beside projected visual tokens."""
        return words

    def mask(self, packed: Packed, head: Head) -> Tensor:
        """(B, 1, T, T) boolean mask over [head | questions]: causal, each question apart from the others."""
        return attention_mask(packed.segment, head.slot.shape[1], head.slot == PADDING)

    def prompt_mask(self, visible: Tensor, image: Tensor) -> Tensor:
        """(B, 1, T, T) boolean mask of prompts without answers, for generation.

        visible: (B, T), False = padding. image: (B, T), True where a visual token stands.
        """
        total = visible.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=visible.device).tril()
        itself = torch.eye(total, dtype=torch.bool, device=visible.device)
        return ((causal & visible[:, None, :]) | itself).unsqueeze(1)

    def decode(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        """(B, T, W) last hidden states of the language model. positions: (A, B, T)."""
        hidden: Tensor = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions[0] if self.axes == 1 else positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    def output(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states."""
        logits: Tensor = self.hf.lm_head(hidden)
        return logits

    @property
    def max_positions(self) -> int:
        """Longest sequence that the language model was made for; a sliding window counts as its end."""
        text = self.hf.config.get_text_config()
        longest = int(text.max_position_embeddings)
        window = getattr(text, "sliding_window", None)
        if window is None or "sliding_attention" not in (getattr(text, "layer_types", None) or ()):
            return longest
        return min(longest, int(window))


def _one_run(places: npt.NDArray[np.int64]) -> bool:
    return len(places) > 0 and int(places[-1] - places[0]) == len(places) - 1


def arrange(
    whole: npt.NDArray[np.int64], places: npt.NDArray[np.int64], kept: npt.NDArray[np.int64], front: int, fused: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(ids, slot, origin) of a head after reduction.

    whole: (W,) ids with image tokens at `places`. kept: (K,) ascending numbers of places that keep their token, which
    is token front + rank; the first `front` tokens stand before the first place, the last `fused` behind the last one.
    """
    slot = np.full(len(whole), TEXT, dtype=np.int64)
    origin = np.full(len(whole), -1, dtype=np.int64)
    slot[places[kept]] = np.arange(len(kept)) + front
    origin[places[kept]] = kept
    stay = np.ones(len(whole), dtype=bool)
    stay[places] = False
    stay[places[kept]] = True
    first, behind = int(places[0]), int(places[-1]) + 1
    before = np.arange(front, dtype=np.int64)
    after = np.arange(fused, dtype=np.int64) + front + len(kept)

    def join(values: npt.NDArray[np.int64], early: npt.NDArray[np.int64], late: npt.NDArray[np.int64]) -> Any:
        middle = values[first:behind][stay[first:behind]]
        return np.concatenate([values[:first], early, middle, late, values[behind:]])

    nothing = np.full(front, -1, dtype=np.int64), np.full(fused, -1, dtype=np.int64)
    zero = np.zeros(front, dtype=np.int64), np.zeros(fused, dtype=np.int64)
    return join(whole, *zero), join(slot, before, after), join(origin, *nothing)


# -- pieces that families share ------------------------------------------------------------------------------------


def resize(pixels: Pixels, side: int) -> Pixels:
    """A square picture of `side` pixels; one that has that size already stays as it is."""
    if pixels.shape == (side, side, 3):
        return pixels
    picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.uint8)


def square_values(pixels: Sequence[Pixels], processor: Any, side: int) -> Tensor:
    """(B, 3, S, S) float32: the checkpoint's own preprocessing, or a plain resize to [-1, 1] without one."""
    if processor is not None:
        images = [Image.fromarray(item) for item in pixels]
        return torch.as_tensor(np.stack(processor(images, return_tensors="np")["pixel_values"]))
    stack = np.stack([resize(item, side) for item in pixels]).astype(np.float32)
    return torch.from_numpy(stack / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()


def chat_template(tokenizer: Any, image: str, source: str, *, as_text: bool = False) -> ChatTemplate:
    """The checkpoint's own prompt. Raises UsageError where it has none: a prompt that it was not trained with is no
    prompt."""
    if getattr(tokenizer, "chat_template", None) is None:
        accepted = "a checkpoint whose tokenizer has a chat template; put its chat_template.jinja into the folder"
        raise rejected("model.path", source, accepted)
    return ChatTemplate(tokenizer, image, as_text=as_text)
