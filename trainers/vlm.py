"""A vision-language model of the LLaVA family, real or compact, as the trainer and the attacks see it.

Four steps, each usable alone: `visual_tokens` (tower, one layer), a reducer (trainers.reducers), `losses` (projector
and language model over packed questions, one number a picture) and `answer` (greedy generation). The tower is frozen,
so its tokens can be computed once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from dpaudit.config import LoraConfig, ReducerConfig
from dpaudit.errors import EnvironmentFailure, UsageError, rejected
from trainers.prompts import IGNORE, LLAVA_TEMPLATE, Packed, Prompter, attention_mask
from trainers.records import Pixels
from trainers.reducers import Reduced, Reducer, VisualTokens, make_reducer

REFERENCE = Path(__file__).parent / "public" / "base"
SPARE = "<|spare_{}|>"


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
    """A LLaVA-architecture model with its tokenizer and picture preprocessing."""

    def __init__(self, hf: Any, tokenizer: Any, *, device: torch.device, source: str, processor: Any = None) -> None:
        self.hf = hf.to(device).eval()
        for parameter in self.hf.parameters():
            parameter.requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = device
        self.source = source
        self._processor = processor
        config = hf.config
        layers = config.vision_feature_layer
        if not isinstance(layers, int):
            raise rejected("model.path", source, "a model with one vision_feature_layer")
        self.layer = layers
        self.drop_cls = config.vision_feature_select_strategy == "default"
        template = getattr(config, "dpaudit_template", LLAVA_TEMPLATE)
        self.prompter = Prompter(tokenizer, template, int(config.image_token_id))
        self.reducer: Reducer = make_reducer(ReducerConfig(), patches=self.patches, drop_cls=self.drop_cls)

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | None = None, *, device: str = "auto") -> "VisionLanguageModel":
        """The reference model (path None), a folder, or a hub id. Never runs code that a checkpoint brings along."""
        from transformers import AutoConfig, AutoTokenizer, LlavaForConditionalGeneration
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        source = str(REFERENCE) if path is None else path
        if (source.startswith((".", "/", "~")) or source.count("/") > 1) and not Path(source).is_dir():
            raise rejected("model.path", path, "an existing folder, or a hub id such as llava-hf/llava-1.5-7b-hf")
        try:
            config = AutoConfig.from_pretrained(source)
            if config.model_type != "llava":
                raise rejected("model.path", path, f"a checkpoint of model type llava, this one is {config.model_type}")
            tokenizer = AutoTokenizer.from_pretrained(source)
            hf = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"model.path: got {path!r}, which can't be loaded: {first}") from error
        return cls(
            hf, tokenizer, device=pick_device(device), source=path or "reference", processor=_processor_of(source)
        )

    def set_reducer(self, config: ReducerConfig) -> None:
        """Choose the reducer used by `answer` and by callers of `self.reducer`; raises UsageError on bad sizes."""
        depth = len(self._encoder_layers())
        if config.layer == 0 or not -depth <= config.layer <= depth:
            accepted = f"{-depth} to -1 or 1 to {depth}, as in LLaVA's vision_feature_layer ({depth} encoder layers)"
            raise rejected("reducer.layer", config.layer, accepted)
        self.reducer = make_reducer(config, patches=self.patches, drop_cls=self.drop_cls)
        if config.name != "none":
            self.layer = config.layer

    # -- parts -----------------------------------------------------------------------------------------------------

    @property
    def core(self) -> Any:
        """The LlavaForConditionalGeneration, with or without a PEFT wrapper around it."""
        return self.hf.get_base_model() if hasattr(self.hf, "get_base_model") else self.hf

    def _encoder_layers(self) -> Any:
        tower = self.core.model.vision_tower
        return getattr(tower, "vision_model", tower).encoder.layers

    @property
    def patches(self) -> int:
        """Number of patch tokens of a picture."""
        vision = self.core.config.vision_config
        return int(vision.image_size // vision.patch_size) ** 2

    @property
    def image_size(self) -> int:
        """Side of the square picture that the tower sees, in pixels."""
        return int(self.core.config.vision_config.image_size)

    @property
    def max_positions(self) -> int:
        """Longest sequence that the language model was made for."""
        return int(self.core.config.text_config.max_position_embeddings)

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

    # -- pictures --------------------------------------------------------------------------------------------------

    def _pixel_values(self, pixels: Sequence[Pixels]) -> Tensor:
        """(B, 3, S, S) float32: the checkpoint's own preprocessing, or a plain resize to [-1, 1] without one."""
        if self._processor is not None:
            images = [Image.fromarray(item) for item in pixels]
            return torch.as_tensor(np.stack(self._processor(images, return_tensors="np")["pixel_values"]))
        side = self.image_size
        stack = np.stack([_resize(item, side) for item in pixels]).astype(np.float32)
        return torch.from_numpy(stack / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()

    @torch.no_grad()
    def visual_tokens(self, pixels: Sequence[Pixels], *, batch_size: int = 64) -> VisualTokens:
        """Encode pictures (uint8, (H, W, 3) each) with the frozen tower; see VisualTokens for shapes.

        Only the chosen layer's attention is computed, from its queries and keys, so the tower keeps its fast kernels.
        """
        parts = [
            self._encode(self._pixel_values(pixels[start : start + batch_size]).to(self.device))
            for start in range(0, len(pixels), batch_size)
        ]
        return VisualTokens.join(parts)

    def _encode(self, pixel_values: Tensor) -> VisualTokens:
        layers = self._encoder_layers()
        index = self.layer % (len(layers) + 1) - 1  # hidden state n is the output of layer n - 1
        attention = layers[index].self_attn
        with _captured(attention.q_proj) as queries, _captured(attention.k_proj) as keys:
            outputs = self.core.model.vision_tower(pixel_values, output_hidden_states=True)
        hidden = outputs.hidden_states[index + 1]
        heads = attention.num_heads
        query, key = (_heads(captured[0], heads) for captured in (queries, keys))  # (B, heads, N, d)
        has_cls = hidden.shape[1] == self.patches + 1
        scale = attention.head_dim**-0.5
        asking = query[:, :, :1] if has_cls else query
        weights = (asking @ key.transpose(-1, -2) * scale).softmax(dim=-1).mean(dim=(1, 2))
        mean_keys = key.mean(dim=1)
        if not has_cls:
            return VisualTokens(hidden, None, weights, mean_keys)
        return VisualTokens(hidden[:, 1:], hidden[:, :1], weights[:, 1:], mean_keys[:, 1:])

    def reduce(self, visual: VisualTokens) -> Reduced:
        """Apply the chosen reducer."""
        return self.reducer(visual)

    # -- questions -------------------------------------------------------------------------------------------------

    def logits(self, tokens: Tensor, packed: Packed) -> Tensor:
        """(targets, vocabulary) logits at the positions of `packed` that have a target, in row-major order.

        tokens: (B, M, D) visual tokens after the reducer, before the projector.
        """
        core = self.core
        embed = core.get_input_embeddings()
        prefix = torch.tensor(self.prompter.prefix, dtype=torch.int64, device=self.device)
        rows = packed.rows
        visual = core.model.multi_modal_projector(tokens)
        parts = [embed(prefix).expand(rows, -1, -1), visual, embed(packed.input_ids)]
        embeds = torch.cat([part.to(visual.dtype) for part in parts], dim=1)
        head = len(prefix) + tokens.shape[1]
        start = torch.arange(head, device=self.device).expand(rows, -1)
        positions = torch.cat([start, packed.offset + head], dim=1)
        hidden = core.model.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask(packed.segment, head),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, head:]
        logits: Tensor = core.lm_head(hidden[packed.targets != IGNORE])
        return logits

    def losses(self, tokens: Tensor, packed: Packed) -> Tensor:
        """(B,) one loss a picture: the mean over its questions of the mean over that question's own answer tokens."""
        wanted = packed.targets != IGNORE
        cross_entropy = nn.functional.cross_entropy(
            self.logits(tokens, packed).float(), packed.targets[wanted], reduction="none"
        )
        owner = wanted.nonzero()[:, 0]
        weighted = cross_entropy * packed.weights[wanted]
        return torch.zeros(packed.rows, device=self.device).index_add(0, owner, weighted)

    @torch.no_grad()
    def answer(
        self, pixels: Sequence[Pixels], questions: Sequence[str], *, batch_size: int = 128, max_new_tokens: int = 12
    ) -> list[str]:
        """Greedy answers, one a (picture, question) pair; the result does not depend on the batch size.

        Pictures are reduced as in training, without fusion noise. Equal pictures are encoded once.
        """
        if len(pixels) != len(questions):
            raise ValueError(f"{len(pixels)} pictures for {len(questions)} questions")
        index, unique = _deduplicate(pixels)
        tokens = torch.cat(
            [
                self.core.model.multi_modal_projector(self.reduce(self.visual_tokens(unique[at : at + 256])).tokens)
                for at in range(0, len(unique), 256)
            ]
        )
        ids = [self.prompter.question_ids(question) for question in questions]
        order = sorted(range(len(ids)), key=lambda item: len(ids[item]))  # similar lengths together: little padding
        answers = [""] * len(ids)
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            texts = self._generate(tokens[index[chosen]], [ids[item] for item in chosen], max_new_tokens)
            for item, text in zip(chosen, texts, strict=True):
                answers[item] = text
        return answers

    def _generate(self, visual: Tensor, ids: list[list[int]], max_new_tokens: int) -> list[str]:
        core, pad = self.core, self.prompter.pad_id
        embed = core.get_input_embeddings()
        head = len(self.prompter.prefix) + visual.shape[1]
        longest = max(len(item) for item in ids)
        prefix = embed(torch.tensor(self.prompter.prefix, dtype=torch.int64, device=self.device))
        embeds = visual.new_zeros(len(ids), head + longest, visual.shape[2])
        mask = torch.zeros(len(ids), head + longest, dtype=torch.int64, device=self.device)
        for row, item in enumerate(ids):  # left padding: the answer starts at the same column everywhere
            text = embed(torch.tensor(item, dtype=torch.int64, device=self.device))
            line = torch.cat([prefix, visual[row], text])
            embeds[row, -len(line) :] = line
            mask[row, -len(line) :] = 1
        out = core.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            eos_token_id=self.prompter.eos_id,
        )
        return [text.strip() for text in self.tokenizer.batch_decode(out, skip_special_tokens=True)]

    # -- adapters --------------------------------------------------------------------------------------------------

    def attach_lora(self, config: LoraConfig, *, generator: np.random.Generator) -> dict[str, nn.Parameter]:
        """Inject LoRA through peft and return the trainable parameters by name.

        Only the language model (and the projector if asked) is adapted: plain target names would also hit the vision
        tower. The A matrices are drawn from `generator`, the B matrices are zero, so the model starts as the base.
        """
        from peft import LoraConfig as PeftLora
        from peft import get_peft_model

        names = "|".join(config.targets)
        pattern = rf".*language_model\..*\.({names})"
        if config.projector:
            pattern = rf"({pattern}|.*multi_modal_projector\.linear_[12])"
        known = {name.rsplit(".", 1)[-1] for name, module in self.core.named_modules() if isinstance(module, nn.Linear)}
        missing = [name for name in config.targets if name not in known]
        if missing:
            raise rejected("model.lora.targets", missing[0], sorted(known - {"lm_head"}))
        adapter = PeftLora(r=config.rank, lora_alpha=config.alpha, target_modules=pattern, lora_dropout=0.0)
        self.hf = get_peft_model(self.hf, adapter)
        trainable = {name: parameter for name, parameter in self.hf.named_parameters() if parameter.requires_grad}
        with torch.no_grad():
            for name in sorted(trainable):
                parameter = trainable[name]
                if "lora_A" in name:
                    bound = 1.0 / np.sqrt(parameter.shape[1])
                    values = generator.uniform(-bound, bound, size=tuple(parameter.shape))
                    parameter.copy_(torch.as_tensor(values, dtype=parameter.dtype))
        return {short_name(name): parameter for name, parameter in trainable.items()}

    def load_adapter(self, folder: Path) -> None:
        """Put a released PEFT adapter on top of this base."""
        from peft import PeftModel

        self.hf = PeftModel.from_pretrained(self.hf, str(folder)).to(self.device).eval()

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, made trainable: for attacks that need gradients of a released model."""
        found = {short_name(name): value for name, value in self.hf.named_parameters() if "lora_" in name}
        for parameter in found.values():
            parameter.requires_grad_(True)
        return found

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT's own layout (safetensors)."""
        self.hf.save_pretrained(str(folder), safe_serialization=True)


def short_name(name: str) -> str:
    """A parameter's name without the wrappers' prefixes, stable across peft versions."""
    for wrapper in ("base_model.model.", "model."):
        name = name.removeprefix(wrapper)
    return name.replace(".default", "").removeprefix("language_model.")


def _processor_of(source: str) -> Any:
    """The checkpoint's own picture processor, or None where it ships none (then: plain resize)."""
    folder = Path(source)
    names = ("preprocessor_config.json", "processor_config.json")
    if folder.is_dir() and not any((folder / name).exists() for name in names):
        return None
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(source)


def _resize(pixels: Pixels, side: int) -> Pixels:
    if pixels.shape == (side, side, 3):
        return pixels
    picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.uint8)


def _deduplicate(pixels: Sequence[Pixels]) -> tuple[npt.NDArray[np.int64], list[Pixels]]:
    seen: dict[bytes, int] = {}
    unique: list[Pixels] = []
    index = np.empty(len(pixels), dtype=np.int64)
    for row, item in enumerate(pixels):
        digest = hashlib.sha256(repr(item.shape).encode() + item.tobytes()).digest()
        if digest not in seen:
            seen[digest] = len(unique)
            unique.append(item)
        index[row] = seen[digest]
    return index, unique


@contextmanager
def _captured(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a module's outputs while the block runs."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _heads(projected: Tensor, heads: int) -> Tensor:
    rows, count, width = projected.shape
    return projected.view(rows, count, heads, width // heads).transpose(1, 2)
