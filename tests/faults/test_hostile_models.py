"""Checkpoints whose settings pass every check and whose model fails, or is absurd: one line, exit code 2.

Whole commands. A model of pictures, one of tiles with a processor of its own, and one of text.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.faults import hostile_files as hands
from tests.faults.hostile_files import Damage, audit_words, content, settings
from tests.faults.scenarios import SETTINGS, write_data
from tests.faults.test_hostile_files import place, refused, run, world
from tests.tiny_text import save_tiny_text, secrets

__all__ = ["place", "world"]  # fixtures

CONFIG, TOKENIZER, GENERATION = "base/config.json", "base/tokenizer_config.json", "base/generation_config.json"
PICTURES, PROCESSOR = "tiles/preprocessor_config.json", "tiles/processor_config.json"
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
}  # fmt: skip
FAILS, NONE, UNLOADED = "fails on a picture of noise", "gives no finite numbers", "can't be loaded"


def rope(**changes: object) -> Damage:
    return settings(CONFIG, text_config__rope_parameters={**LONG, **changes})


FORWARD: dict[str, tuple[Damage, str]] = {
    "rotary factors of another length": (rope(short_factor=[1.0] * 3), UNLOADED),
    "long rotary factors of another length": (rope(long_factor=[1.0] * 3), FAILS),
    "a million rotary factors": (rope(long_factor=[1.0] * 10**6), "more than 50000 values"),
    "forty thousand rotary factors": (rope(long_factor=[1.0] * 40_000), FAILS),
    "rotary factors that are no numbers": (rope(long_factor=[math.nan] * 4), NONE),
    "rotary factors of nothing": (rope(short_factor=[0.0] * 4), NONE),
    "rotary base of nothing": (settings(CONFIG, text_config__rope_parameters={"rope_type": "default", "rope_theta": 0}),
                               NONE),
    "heads that do not divide": (settings(CONFIG, text_config__num_key_value_heads=3), "another shape than its"),
    "heads of nothing": (settings(CONFIG, text_config__num_key_value_heads=0), UNLOADED),
    "epsilon that is no number": (settings(CONFIG, text_config__rms_norm_eps=math.nan), NONE),
    "epsilon of the tower": (settings(CONFIG, vision_config__layer_norm_eps=math.nan), NONE),
    "negative epsilon": (settings(CONFIG, text_config__rms_norm_eps=-1e9), NONE),
    "picture token outside the vocabulary": (settings(CONFIG, image_token_index=9999), "does not know <image>"),
    "patches that do not fit": (settings(CONFIG, vision_config__patch_size=7), "another shape than its"),
    "patches of nothing": (settings(CONFIG, vision_config__patch_size=0), UNLOADED),
    "pictures of another size": (settings(CONFIG, vision_config__image_size=31), "another shape than its"),
    "layers of another kind": (settings(CONFIG, text_config__layer_types=["sliding_attention"] * 2), FAILS),
    "padding outside the vocabulary": (settings(CONFIG, text_config__pad_token_id=99999), UNLOADED),
    "no such layer of the tower": (settings(CONFIG, vision_feature_layer=99), "got 99"),
    "a prompt of a megabyte": (settings(CONFIG, dpaudit_template="<image>" + "a" * (1 << 20) + "{question}"),
                               "1048593 characters; accepted: at most 8192"),
    "a prompt that repeats": (settings(CONFIG, dpaudit_template="<image>" + "{question}" * 800), "one {question}"),
    "names of 300,000 classes": (settings(CONFIG, id2label={str(at): "x" for at in range(300_000)}),
                                 "more than 50000 values"),
    "300,000 keys": (settings(CONFIG, **{f"text_config__k{at}": 1 for at in range(300_000)}), "more than 50000 values"),
    "tilings without end": (settings(CONFIG, image_grid_pinpoints=[[1 << 40, 1]]), "image_grid_pinpoints"),
}  # fmt: skip

FILES: dict[str, tuple[Damage, str]] = {
    "tokenizer: 50,000 special tokens": (
        settings(TOKENIZER, added_tokens_decoder={
            str(400 + at): {"content": f"<x{at}>", "lstrip": False, "rstrip": False, "normalized": False,
                            "single_word": False, "special": True} for at in range(50_000)}),
        "more than 200000 values"),
    "tokenizer: tokens without rows": (settings(TOKENIZER, extra_special_tokens=["<e>"]), "has a token 309"),
    "tokenizer: a class of a list": (settings(TOKENIZER, tokenizer_class=["x"]), UNLOADED),
    "tokenizer: a length of text": (settings(TOKENIZER, model_max_length="x"), UNLOADED),
    "tokenizer: an end that is a number": (settings(TOKENIZER, eos_token=5), UNLOADED),
    "tokenizer: split marks": (settings(TOKENIZER, split_special_tokens=True), "does not know <image>"),
    "tokenizer: a list": (content(TOKENIZER, b"[]"), "damaged, not a JSON object"),
    "generation: an end that is text": (settings(GENERATION, eos_token_id="x"), FAILS),
    "generation: an end beyond all": (settings(GENERATION, eos_token_id=[10**30]), FAILS),
    "generation: another cache": (settings(GENERATION, cache_implementation="evil"), UNLOADED),
    "generation: a watermark": (settings(GENERATION, watermarking_config={"a": 1}), UNLOADED),
    "generation: 300,000 keys": (settings(GENERATION, **{f"k{at}": 1 for at in range(300_000)}), "more than 200000"),
    "generation: a number": (content(GENERATION, b"7"), "damaged, not a JSON object"),
}  # fmt: skip

TILES: dict[str, tuple[Damage, str]] = {
    "edges": (settings(PICTURES, size={"height": 8000, "width": 8000}), "cuts pictures of 8000 pixels into tiles"),
    "edges that are no whole numbers": (settings(PICTURES, size={"longest_edge": 1e9}), "longest_edge: got 1000000000"),
    "edges below nothing": (settings(PICTURES, size={"longest_edge": -3.5}), "longest_edge: got -3.5"),
    "no edges": (settings(PICTURES, size={}), "picture processor can't be made"),
    "mean that is no number": (settings(PICTURES, image_mean=[math.nan] * 3), NONE),
    "mean of one colour": (settings(PICTURES, image_mean=[0.5]), "does not fit its tower"),
    "deviation of nothing": (settings(PICTURES, image_std=[0, 0, 0]), NONE),
    "scale beyond all": (settings(PICTURES, rescale_factor=1e308), NONE),
    "unknown filter": (settings(PICTURES, resample=99), "does not fit its tower"),
    "processor within": (content(PROCESSOR, json.dumps({"image_processor": {"image_processor_type": "Evil"}}).encode()),
                         "picture processor can't be made"),
    "tokens of a picture": (content(PROCESSOR, b'{"image_seq_len": 1000000000}'), "image_seq_len: got"),
    "processor of a list": (content(PROCESSOR, b"[1]"), "damaged, not a JSON object"),
    "scale of the connector": (settings("tiles/config.json", scale_factor=3), "another shape than its"),
    "connector of nothing": (settings("tiles/config.json", scale_factor=0), UNLOADED),
}  # fmt: skip


@pytest.mark.parametrize("name", [*FORWARD, *FILES])
def test_a_model_that_fails_or_is_absurd_is_refused(place: Path, name: str) -> None:
    damage, message = (FORWARD | FILES)[name]
    damage(place)
    refused(audit_words(place), place, message)


@pytest.mark.parametrize("name", TILES)
def test_preprocessing_that_fails_or_is_absurd_is_refused(place: Path, name: str) -> None:
    damage, message = TILES[name]
    damage(place)
    refused(audit_words(place, base="tiles", model="tiles"), place, message)


TRAINED = (
    "long rotary factors of another length", "epsilon that is no number", "layers of another kind",
    "names of 300,000 classes", "a prompt that repeats",
)  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_nothing_is_trained_on_it_and_no_run_of_it_is_audited(place: Path, name: str) -> None:
    damage, message = FORWARD[name]
    damage(place)
    write_data(place / "data")
    data = [f"data.path={place / 'data'}", "data.train=train.jsonl", "data.test=test.jsonl"]
    words = ["train", f"model.path={place / 'base'}", *data, *SETTINGS, "--out", str(place / "new")]
    refused(words, place, message)
    assert not (place / "new/private/noise.key").exists()
    made = hands.run_folder(place, str(place / "base"))
    refused(["audit", str(made), "--fusion"], place, message)


TEXT: dict[str, tuple[dict[str, object], str]] = {
    "long rotary factors": ({"rope_parameters": {**LONG, "long_factor": [1.0] * 3}}, UNLOADED),
    "activation": ({"hidden_act": "evil"}, UNLOADED),
    "epsilon": ({"rms_norm_eps": math.nan}, "no finite numbers"),
    "heads": ({"num_key_value_heads": 3}, "another shape than its"),
    "padding": ({"pad_token_id": 99999}, UNLOADED),
    "many keys": ({f"k{at}": 1 for at in range(60_000)}, "more than 50000 values"),
}


@pytest.mark.parametrize("name", TEXT)
def test_a_text_model_that_fails_is_refused(place: Path, name: str) -> None:
    save_tiny_text(place / "text")
    shutil.copytree(place / "text", place / "trained")
    frame = pd.DataFrame({"id": [f"r{at}" for at in range(20)], "text": secrets(20)})
    frame.to_csv(place / "texts.csv", index=False)
    frame.assign(member=np.arange(20) % 2)[["id", "member"]].to_csv(place / "coins.csv", index=False)
    changed = audit_words(place, base="text", model="trained", records="texts.csv")
    ended = run(changed, place)
    assert ended.code == 2 and "exactly as --base does" in ended.line, "the control: it is read and scored"
    settings("text/config.json", **TEXT[name][0])(place)
    refused(changed, place, TEXT[name][1])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_an_adapter_that_is_no_number_is_refused(place: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    path = place / "adapter/adapter_model.safetensors"
    save_file({name: tensor * 0 + value for name, tensor in load_file(path).items()}, path)
    refused(audit_words(place), place, "is not a finite number")
