"""Is a picture's encoding worth keeping? Time to encode it, to write its tokens, and to read and check them again.

    python benchmarks/feature_cache.py        # writes benchmarks/results/feature_cache.json; a few minutes on one core

One CPU thread, random weights, pictures of noise: the reference tower, and towers of the size of CLIP-B/32 and of
CLIP-L/14 at 336 pixels (LLaVA-1.5's). The reason for the size from which training.feature-cache=auto keeps features.
Reading includes the hash of the tower's weights, once for all pictures.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dpaudit import atomic
from dpaudit.config import ReducerConfig
from trainers.features import Features, tower_parameters
from trainers.vlm import VisionLanguageModel

RESULTS = Path(__file__).parent / "results" / "feature_cache.json"
TOWERS: dict[str, dict[str, int] | None] = {
    "reference": None,
    "CLIP-B/32 at 224": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                         "num_attention_heads": 12, "image_size": 224, "patch_size": 32},
    "CLIP-L/14 at 336": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                         "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
}  # fmt: skip
PICTURES = {"reference": 1000, "CLIP-B/32 at 224": 64, "CLIP-L/14 at 336": 8}


def build(vision: dict[str, int] | None) -> VisionLanguageModel:
    """The reference model, or one with another tower in front of a tiny language model."""
    reference = VisionLanguageModel.load(device="cpu")
    if vision is None:
        return reference
    text = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=1000
    )
    token = int(reference.core.config.image_token_id)
    config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=text, image_token_index=token)
    hf = LlavaForConditionalGeneration(config)
    return VisionLanguageModel(hf, reference.tokenizer, device=torch.device("cpu"), source="random")


def measure(name: str, reducer: str) -> dict[str, Any]:
    """Milliseconds a picture."""
    model = build(TOWERS[name])
    model.set_reducer(ReducerConfig(name=reducer, keep=min(54, model.patches // 4), fuse=8))  # type: ignore[arg-type]
    side = int(model.core.config.vision_config.image_size)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(PICTURES[name])]
    model.encoded(pixels[:2])
    began = time.perf_counter()
    model.encoded(pixels)
    encode = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        fill = Features(place)
        began = time.perf_counter()
        fill.encoded(model, pixels)
        write = time.perf_counter() - began
        began = time.perf_counter()
        again = Features(place)
        found = again.encoded(model, pixels)
        read = time.perf_counter() - began
        assert again.encoded_now == 0
        size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
    assert len(found) == len(pixels)
    each = 1000 / len(pixels)
    return {
        "tower": name,
        "parameters": tower_parameters(model),
        "reducer": reducer,
        "pictures": len(pixels),
        "encode_ms": round(encode * each, 3),
        "encode_and_write_ms": round(write * each, 3),
        "read_and_check_ms": round(read * each, 3),
        "kilobytes": round(size / len(pixels) / 1000, 1),
    }


def main() -> None:
    """Every tower with full and with reduced tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in TOWERS:
        for reducer in ("none", "visionzip"):
            rows.append(measure(name, reducer))
            print(rows[-1], flush=True)
    atomic.write_text(options.out, json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
