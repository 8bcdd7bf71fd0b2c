"""The gradient of one unit, written a second time and as plainly as can be: the oracle of benchmarks/exactness.py.

One picture at a time, one question at a time, transformers' own processors and forward pass, no packing, no padding, no
batch, one `backward()`; reducers as loops over single tokens. Shares nothing with the trainers but the weights.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

from dpaudit.config import ReducerConfig
from trainers.records import Pixels, Unit
from trainers.vlm import VisionLanguageModel

CHAT = {
    "llava": ("USER: <image>\n{} ASSISTANT:", " ", "</s>"),
    "idefics3": ("<|begin_of_text|>User:<image>{}<end_of_utterance>\nAssistant:", " ", "<end_of_utterance>"),
    "smolvlm": ("<|im_start|>User:<image>{}<end_of_utterance>\nAssistant:", " ", "<end_of_utterance>"),
    "paligemma": ("<image><s>{}\n", "", "</s>"),
    "qwen2_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>",
    ),
}
CHAT |= dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), CHAT["qwen2_vl"])
REDUCERS = ("none", "random", "cls-topk", "visionzip", "tome", "divprune")  # what this module knows


class Plain:
    """Losses and gradients of single units of a model (with its adapter), question by question."""

    def __init__(self, model: VisionLanguageModel, reducer: ReducerConfig) -> None:
        self.core: Any = model.core
        self.kind: str = self.core.config.model_type
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self.processor = model.family.processor
        self.reducer = reducer  # K, k and layers as numbers
        self.image_id = int(self.core.config.image_token_id)

    def gradient(self, unit: Unit, parameters: dict[str, torch.nn.Parameter]) -> tuple[dict[str, Tensor], float]:
        """Gradient and loss of a unit by one backward pass: mean over questions of the mean over answer tokens."""
        questions = [(picture.pixels, item) for picture in unit.pictures for item in picture.questions]
        for parameter in parameters.values():
            parameter.grad = None
        parts = [self.question(pixels, item.text, item.answer) for pixels, item in questions]
        loss = torch.stack(parts).mean()
        torch.autograd.backward(loss)
        found = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in parameters.items()
        }
        for parameter in parameters.values():
            parameter.grad = None
        return found, float(loss.detach())

    def question(self, pixels: Pixels, question: str, answer: str) -> Tensor:
        """Mean cross-entropy of one answer."""
        prompt, gap, end = CHAT[self.kind]
        prompt = getattr(self.core.config, "dpaudit_template", prompt).replace("{question}", "{}")
        end = self.tokenizer.eos_token if self.kind == "llava" else end
        before = self.ids(prompt.format(question), pixels)
        whole = self.ids(prompt.format(question) + gap + answer + end, pixels)
        count = len(whole) - len(before)
        assert whole[: len(before)] == before
        ids = torch.tensor([whole])
        if self.reducer.name == "none":
            logits = self.core(input_ids=ids, **self.pictures(pixels), **self.sides(ids, count)).logits
        else:
            logits = self.reduced(pixels, ids, count)
        return cross_entropy(_wide(logits[0, -count - 1 : -1]), torch.tensor(whole[-count:]))

    # -- prompts and inputs as transformers makes them -------------------------------------------------------------

    def ids(self, text: str, pixels: Pixels) -> list[int]:
        """Token ids of a prompt with the picture's places in it."""
        if self.kind in ("idefics3", "smolvlm"):
            from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

            side = self.core.config.vision_config
            places = (side.image_size // side.patch_size) ** 2 // self.core.config.scale_factor**2
            processor = Idefics3Processor(self.processor, self.tokenizer, image_seq_len=places)
            made = processor(text=[text], images=[[Image.fromarray(pixels)]])
            return list(made["input_ids"][0])
        places = self.places(pixels)
        marker = "<|image_pad|>" if self.kind.startswith("qwen") else "<image>"
        return list(self.tokenizer(text.replace(marker, marker * places), add_special_tokens=False)["input_ids"])

    def places(self, pixels: Pixels) -> int:
        """Visual tokens of a picture without any reduction."""
        if self.kind.startswith("qwen"):
            return int(self.pictures(pixels)["image_grid_thw"].prod()) // 4
        vision = self.core.config.vision_config
        patches = int(vision.image_size // vision.patch_size) ** 2
        has_cls = vision.model_type == "clip_vision_model"
        return patches + (has_cls and self.core.config.vision_feature_select_strategy == "full")

    def pictures(self, pixels: Pixels) -> dict[str, Tensor]:
        """The picture as the model's forward pass takes it."""
        image = Image.fromarray(pixels)
        if self.processor is None:  # the tiny LLaVA: pictures that have the tower's size already
            assert pixels.shape[0] == self.core.config.vision_config.image_size
            value = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / 127.5 - 1.0)
            return {"pixel_values": value[None].to(self.core.dtype)}
        nested = self.kind in ("idefics3", "smolvlm")
        made = self.processor([[image]] if nested else [image], return_tensors="pt")
        names = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
        given = {name: made[name] for name in names if name in made}
        return given | {"pixel_values": given["pixel_values"].to(self.core.dtype)}

    def sides(self, ids: Tensor, count: int) -> dict[str, Tensor]:
        """What else a family's forward pass wants to know of each token."""
        if self.kind == "paligemma":
            kinds = torch.zeros_like(ids)
            kinds[:, -count:] = 1
            return {"token_type_ids": kinds}
        if self.kind.startswith("qwen"):
            return {"mm_token_type_ids": (ids == self.image_id).int()}
        return {}

    # -- reducers, token by token ----------------------------------------------------------------------------------

    def reduced(self, pixels: Pixels, ids: Tensor, count: int) -> Tensor:
        """Logits with a reducer: embeddings put together by hand, one sequence."""
        with torch.no_grad():
            tokens, cls, importance, keys = self.look(pixels)
        if self.reducer.name == "tome":
            assert self.reducer.keep is not None
            tokens, kept = _merged(tokens, keys, self.reducer.keep)
            fused, members = [], []
        else:
            kept, fused, members = self.choose(tokens, importance, keys)
        rank = {place: index for index, place in enumerate(kept)}
        front = [] if cls is None else [cls]
        visual = self.project(
            torch.stack([*front, *[tokens[place] for place in kept], *fused])[None].to(self.core.dtype)
        )[0]
        words = self.core.get_input_embeddings()(ids[0])
        line: list[Tensor] = []
        origin: list[Any] = []  # a place of the picture, a list of places, or None for text
        place = -1
        images = (ids[0] == self.image_id).nonzero()[:, 0].tolist()
        shift = len(images) - len(tokens)  # LLaVA counts its CLS as a place
        for column, token in enumerate(ids[0].tolist()):
            if token != self.image_id:
                line.append(words[column])
                origin.append(None)
                continue
            place += 1
            if place == 0 and cls is not None:
                line.append(visual[0])
                origin.append(None)
            if place >= shift and place - shift in rank:
                line.append(visual[len(front) + rank[place - shift]])
                origin.append(place - shift)
            if column == images[-1]:
                for index, mine in enumerate(members):
                    line.append(visual[len(front) + len(kept) + index])
                    origin.append(mine)
        embeds = torch.stack(line)[None].to(self.core.dtype)
        given: dict[str, Any] = {}
        if self.kind == "paligemma":
            given["token_type_ids"] = torch.zeros(embeds.shape[:2], dtype=torch.int64)
            given["token_type_ids"][:, -count:] = 1
        if self.kind.startswith("qwen"):
            given["position_ids"] = self.rope(origin, pixels)
        if self.kind.startswith("qwen3"):
            chosen = torch.stack([*[tokens[place] for place in kept], *fused]).to(self.core.dtype)
            columns = [column for column, place in enumerate(origin) if place is not None]
            with self.deepstack(chosen, columns):
                return self.core(inputs_embeds=embeds, **given).logits  # type: ignore[no-any-return]
        return self.core(inputs_embeds=embeds, **given).logits  # type: ignore[no-any-return]

    @contextmanager
    def deepstack(self, chosen: Tensor, columns: list[int]) -> Iterator[None]:
        """Qwen3-VL's further features, added behind the decoder's first layers in the columns of visual tokens."""
        visual, handles = self.core.model.visual, []
        for number, merger in enumerate(visual.deepstack_merger_list):
            width = chosen.shape[1] // (1 + len(visual.deepstack_merger_list))
            extra = merger(chosen[:, (number + 1) * width : (number + 2) * width].reshape(-1, width // 4))

            def add(_module: Any, _args: Any, out: Any, extra: Tensor = extra) -> Any:
                rows = [torch.zeros_like(out[0, 0])] * out.shape[1]
                for column, row in zip(columns, extra, strict=True):
                    rows[column] = row
                return out + torch.stack(rows)

            handles.append(self.core.model.language_model.layers[number].register_forward_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def choose(
        self, tokens: Tensor, importance: Tensor, keys: Tensor
    ) -> tuple[list[int], list[Tensor], list[list[int]]]:
        """Kept places in order, fused tokens, and the places that went into each."""
        keep, fuse, count = self.reducer.keep, self.reducer.fuse, len(tokens)
        assert keep is not None and fuse is not None
        if self.reducer.name == "random":
            return sorted(int(place) for place in np.random.default_rng(0).permutation(count)[:keep]), [], []
        if self.reducer.name == "divprune":
            return _diverse(tokens, keep), [], []
        order = sorted(range(count), key=lambda place: (-float(importance[place]), place))
        kept = sorted(order[:keep])
        if self.reducer.name == "cls-topk":
            return kept, [], []
        assert self.reducer.name == "visionzip", self.reducer.name
        rest = [place for place in range(count) if place not in kept]
        centres = rest[:: max(1, len(rest) // fuse)][:fuse]
        groups: list[list[int]] = [[] for _ in centres]
        for place in rest:
            if place not in centres:
                like = tokens if self.reducer.assign == "tokens" else keys
                near = [float(torch.cosine_similarity(like[place], like[centre], dim=0)) for centre in centres]
                groups[int(np.argmax(near))].append(place)
        fused = [
            tokens[centre] + (torch.stack([tokens[place] for place in group]).mean(dim=0) if group else 0)
            for centre, group in zip(centres, groups, strict=True)
        ]
        return kept, fused, [[centre, *group] for centre, group in zip(centres, groups, strict=True)]

    def rope(self, origin: list[Any], pixels: Pixels) -> Tensor:
        """(3, 1, T) positions of Qwen2-VL, token by token."""
        height, width = (int(value) // 2 for value in self.pictures(pixels)["image_grid_thw"][0, 1:])
        begin = next(index for index, place in enumerate(origin) if place is not None)
        table: list[list[int]] = []
        behind = begin + max(height, width)
        for index, place in enumerate(origin):
            if place is None:
                here = index if index < begin else behind
                behind += index >= begin
                table.append([here] * 3)
            elif isinstance(place, int):
                table.append([begin, begin + place // width, begin + place % width])
            else:
                rows, columns = [item // width for item in place], [item % width for item in place]
                mean = [int(np.floor(sum(axis) / len(axis) + 0.5)) for axis in (rows, columns)]
                table.append([begin, begin + mean[0], begin + mean[1]])
        return torch.tensor(table).T[:, None]

    # -- towers, one picture at a time, attention weights written out ----------------------------------------------

    def look(self, pixels: Pixels) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(P, D) tokens before the projector, CLS or None, (P,) importance, (P, d) keys."""
        given = self.pictures(pixels)
        if self.kind.startswith("qwen"):
            return self._look_qwen(given)
        model = self.core.model
        tower = model.vision_model if self.kind in ("idefics3", "smolvlm") else model.vision_tower
        if self.kind not in ("idefics3", "smolvlm"):
            return self._look_plain(tower, given["pixel_values"])
        scale, parts = self.core.config.scale_factor, []
        for tile in given["pixel_values"][0]:
            tokens, _, importance, keys = self._look_plain(tower, tile[None])
            side = int(len(tokens) ** 0.5)
            for row in range(0, side, scale):
                for column in range(0, side, scale):
                    square = [(row + down) * side + column + right for down in range(scale) for right in range(scale)]
                    parts.append((tokens[square].flatten(), importance[square].mean(), keys[square].mean(dim=0)))
        stacked = [torch.stack(list(column)) for column in zip(*parts, strict=True)]
        return stacked[0], None, stacked[1], stacked[2]

    def _look_plain(self, tower: Any, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        llava = self.kind == "llava"
        own = self.core.config.vision_feature_layer if llava else -1
        features = own if self.reducer.feature_layer is None else self.reducer.feature_layer
        layer = (features if llava else -1) if self.reducer.layer is None else self.reducer.layer
        layer = layer if layer < 0 else layer - 1 - self.depth(tower)
        blocks = getattr(tower, "vision_model", tower).encoder.layers
        seen: list[Tensor] = []
        handle = blocks[layer].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        out = tower(values, **({"output_hidden_states": True} if llava else {}))
        handle.remove()
        hidden = _wide((out.hidden_states[features] if llava else out.last_hidden_state)[0])
        block, attention = blocks[layer], blocks[layer].self_attn
        normed = block.layer_norm1(seen[0])
        query, key = _wide(attention.q_proj(normed)[0]), _wide(attention.k_proj(normed)[0])
        weights, keys = _attend(query, key, attention.num_heads)
        if hidden.shape[0] % 2:  # odd: a CLS in front of the patches
            return hidden[1:], hidden[0], weights[0, 1:], keys[1:]
        return hidden, None, weights.mean(dim=0), keys

    def depth(self, tower: Any) -> int:
        """Encoder layers of a tower."""
        return len(getattr(tower, "vision_model", tower).encoder.layers)

    def _look_qwen(self, given: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        visual = self.core.model.visual
        layer = self.reducer.layer
        assert layer is not None
        layer = layer if layer < 0 else layer - 1 - len(visual.blocks)
        block, seen = visual.blocks[layer], []

        def remember(_module: Any, args: Any, kwargs: Any) -> None:
            seen.append((args[0], kwargs["position_embeddings"]))

        handles = [block.register_forward_pre_hook(remember, with_kwargs=True)]
        deep: list[Tensor] = []
        for index in getattr(visual, "deepstack_visual_indexes", ()):  # ascending in every checkpoint
            handles.append(visual.blocks[index].register_forward_hook(lambda *given: deep.append(given[-1])))
        hidden = visual(given["pixel_values"].to(self.core.dtype), grid_thw=given["image_grid_thw"]).last_hidden_state
        for handle in handles:
            handle.remove()
        entering, (cos, sin) = seen[0]
        heads = block.attn.num_heads
        query, key, _ = _wide(block.attn.qkv(block.norm1(entering))).chunk(3, dim=-1)
        hidden = _wide(hidden)
        size = query.shape[1] // heads
        turned = []
        for value in (query, key):
            pieces = []
            for head in range(heads):
                piece = value[:, head * size : (head + 1) * size]
                swapped = torch.cat([-piece[:, size // 2 :], piece[:, : size // 2]], dim=1)
                pieces.append(piece * cos + swapped * sin)
            turned.append(torch.cat(pieces, dim=1))
        weights, keys = _attend(turned[0], turned[1], heads)
        received = weights.mean(dim=0)
        squares = [list(range(at, at + 4)) for at in range(0, len(hidden), 4)]
        if self.kind == "qwen2_5_vl":  # the tower's order is by windows: back to reading order
            from transformers.vision_utils import get_vision_window_index

            vision = self.core.config.vision_config
            order, _ = get_vision_window_index(
                given["image_grid_thw"],
                spatial_merge_size=2,
                window_size=vision.window_size,
                patch_size=vision.patch_size,
            )
            back = {int(place): index for index, place in enumerate(order)}
            squares = [squares[back[place]] for place in range(len(squares))]
        layers = [hidden, *(_wide(item) for item in deep)]
        tokens = torch.stack([torch.cat([layer[square].flatten() for layer in layers]) for square in squares])
        importance = torch.stack([received[square].mean() for square in squares])
        return tokens, None, importance, torch.stack([keys[square].mean(dim=0) for square in squares])

    def project(self, tokens: Tensor) -> Tensor:
        """Projected tokens."""
        model = self.core.model
        if self.kind in ("idefics3", "smolvlm"):
            return model.connector.modality_projection(tokens)  # type: ignore[no-any-return]
        if self.kind.startswith("qwen"):
            if self.kind.startswith("qwen3"):  # behind the last layer's features stand those of the deepstack
                tokens = tokens[..., : tokens.shape[-1] // (1 + len(model.visual.deepstack_merger_list))]
            patches = tokens[0].unflatten(-1, (4, -1)).flatten(0, 1)
            return model.visual.merger(patches)[None]  # type: ignore[no-any-return]
        return model.multi_modal_projector(tokens)  # type: ignore[no-any-return]


def _attend(query: Tensor, key: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """(N, N) attention weights and (N, d) keys, both averaged over heads; query and key: (N, heads * d)."""
    size = query.shape[1] // heads
    weights, keys = [], []
    for head in range(heads):
        mine = slice(head * size, (head + 1) * size)
        weights.append(torch.softmax(query[:, mine] @ key[:, mine].T / size**0.5, dim=-1))
        keys.append(key[:, mine])
    return torch.stack(weights).mean(dim=0), torch.stack(keys).mean(dim=0)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value


def _diverse(tokens: Tensor, keep: int) -> list[int]:
    """DivPrune: the loneliest patch, then again and again the one farthest from its nearest kept one."""
    count = len(tokens)
    far = [
        [1 - float(torch.cosine_similarity(tokens[a], tokens[b], dim=0)) for b in range(count)] for a in range(count)
    ]
    chosen: list[int] = []
    while len(chosen) < keep:
        left = [place for place in range(count) if place not in chosen]
        others = chosen or range(count)
        nearest = {place: min(far[place][other] for other in others if other != place) for place in left}
        chosen.append(max(left, key=lambda place: (nearest[place], -place)))
    return sorted(chosen)


def _merged(tokens: Tensor, keys: Tensor, keep: int) -> tuple[Tensor, list[int]]:
    """ToMe: tokens by place, those that others joined replaced by the mean, and the places that are left."""
    patches = [(place, tokens[place], keys[place], 1) for place in range(len(tokens))]
    while len(patches) > keep:
        remove = min(len(patches) // 2, len(patches) - keep)
        pairs = []
        for early in range(0, len(patches), 2):
            near = [
                float(torch.cosine_similarity(patches[early][2], patches[late][2], dim=0))
                for late in range(1, len(patches), 2)
            ]
            pairs.append((-max(near), early, 2 * int(np.argmax(near)) + 1))
        joining = {early: late for _, early, late in sorted(pairs)[:remove]}
        left = []
        for index, (place, token, key, size) in enumerate(patches):
            if index in joining:
                continue
            mine = [(token, key, size)] + [patches[other][1:] for other, late in joining.items() if late == index]
            total = sum(item[2] for item in mine)
            means = [torch.stack([item[part] * item[2] for item in mine]).sum(dim=0) / total for part in (0, 1)]
            left.append((place, means[0], means[1], total))
        patches = left
    out = tokens.clone()
    for place, token, _, _ in patches:
        out[place] = token
    return out, [place for place, *_ in patches]
