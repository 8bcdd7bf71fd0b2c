"""Every family against transformers' own forward pass and generation, on pictures of several sizes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpaudit.config import LoraConfig, ReducerConfig
from dpaudit.errors import UsageError
from tests.tiny import random_units, save_tiny_llava
from tests.tiny_families import TINY, save_tiny_qwen2_vl
from tests.trainers.oracle import CHAT, Plain
from trainers.families.base import arrange
from trainers.ghost import Ghost
from trainers.gradients import Hooks, MicroBatch
from trainers.inputs import UnitInputs
from trainers.records import Picture, Unit
from trainers.reducers import Reduced, sized
from trainers.vlm import VisionLanguageModel

SIZES = [(32, 32), (32, 64), (64, 32), (48, 32)]
VISIONZIP = ReducerConfig(name="visionzip", keep=3, fuse=2, layer=-1)
Load = Callable[[str], VisionLanguageModel]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(tmp_path_factory.mktemp(name)) for name, save in TINY.items()}


@pytest.fixture
def load(folders: dict[str, Path]) -> Load:
    return lambda name: VisionLanguageModel.load(str(folders[name]), device="cpu")


def units(name: str, count: int = 3, *, pictures: int = 2) -> tuple[Unit, ...]:
    """Units with pictures of different sizes, hence of different numbers of tiles and tokens."""
    rng = np.random.default_rng(3)

    def resized(picture: Picture) -> Picture:
        height, width = (32, 32) if name.startswith("llava") else SIZES[rng.integers(len(SIZES))]
        return Picture(picture.id, rng.integers(0, 256, (height, width, 3), dtype=np.uint8), picture.questions)

    return tuple(
        Unit(unit.id, tuple(resized(picture) for picture in unit.pictures))
        for unit in random_units(count, pictures=pictures)
    )


def settings(model: VisionLanguageModel, **more: bool) -> LoraConfig:
    """Every linear layer of the decoder; experts are no linear layers."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    experts = "moe" in model.family.model_type
    return LoraConfig(rank=2, targets=attention if experts else LoraConfig().targets, **more)


def adapt(model: VisionLanguageModel) -> dict[str, nn.Parameter]:
    parameters = model.attach_lora(settings(model, projector=True), generator=np.random.default_rng(0))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return parameters


BY_TOKENS = VISIONZIP.model_copy(update={"layer": -3, "assign": "tokens"})


@pytest.mark.parametrize("reducer", [ReducerConfig(), VISIONZIP, BY_TOKENS], ids=["none", "visionzip", "tokens"])
@pytest.mark.parametrize("name", [name for name in TINY if name != "smolvlm"])
def test_per_unit_gradients_equal_transformers_one_question_at_a_time(
    load: Load, name: str, reducer: ReducerConfig
) -> None:
    """In float64, where rounding can't hide an error; benchmarks/exactness.py has the figures for float32."""
    model = load(name)
    model.hf.double()
    if "moe" in name:  # grouped products know no float64
        model.hf.set_experts_implementation("eager")
    model.set_reducer(reducer)
    parameters = adapt(model)
    chosen = units(name)
    rows = UnitInputs(model, chosen).select(range(len(chosen)))
    fast, losses = Hooks(model, parameters).per_unit(rows)
    slow, oracle = MicroBatch(model, parameters), Plain(model, reducer)
    truth = []
    for index, unit in enumerate(chosen):
        expected, loss = oracle.gradient(unit, parameters)
        alone, _ = slow.gradient(rows.unit(index))
        size = torch.sqrt(sum(value.square().sum() for value in expected.values()))
        truth.append((size, expected))
        assert float(size) > 0
        for mine in ({key: value[index] for key, value in fast.items()}, alone):
            gap = torch.sqrt(sum((mine[key] - expected[key]).square().sum() for key in expected))
            assert float(gap / size) < 1e-6
        assert loss == pytest.approx(float(losses[index]), rel=1e-6)
    clip = float(torch.stack([size for size, _ in truth]).median())
    ghost = Ghost(model, parameters)(rows, clip)
    for index, (size, _) in enumerate(truth):
        assert float(ghost.norms[index]) == pytest.approx(float(size), rel=1e-6)
    summed = {key: sum(min(1.0, clip / float(size)) * one[key] for size, one in truth) for key in parameters}
    gap = torch.sqrt(sum((ghost.gradient[key] - summed[key]).square().sum() for key in summed))
    assert float(gap) < 1e-6 * clip * len(truth)


@pytest.mark.parametrize("name", [name for name in TINY if name != "llava-siglip"])
def test_answers_are_those_of_transformers_and_do_not_depend_on_the_batch(load: Load, name: str) -> None:
    model = load(name)
    pictures = [picture for unit in units(name, 2) for picture in unit.pictures]
    pixels = [picture.pixels for picture in pictures]
    questions = ["what digit is this?", "is it even or odd?", "what?", "is it odd?"]
    answers = model.answer(pixels, questions, max_new_tokens=6)
    assert answers == model.answer(pixels, questions, batch_size=1, max_new_tokens=6)
    oracle = Plain(model, ReducerConfig())
    for shown, question, answer in zip(pixels, questions, answers, strict=True):
        ids = torch.tensor([oracle.ids(CHAT[oracle.kind][0].format(question), shown)])
        sides = oracle.sides(ids, 0) if oracle.kind != "paligemma" else {"token_type_ids": torch.zeros_like(ids)}
        given = {**oracle.pictures(shown), **sides}
        out = model.core.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **given)
        expected = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert answer == expected


@pytest.mark.parametrize("name", list(TINY))
def test_adapters_touch_the_language_model_and_the_projector_alone(load: Load, name: str) -> None:
    model = load(name)
    tower = {id(parameter) for parameter in model.family.tower.parameters()}
    chosen = settings(model)
    names = model.attach_lora(chosen, generator=np.random.default_rng(0))
    layers = model.core.config.get_text_config().num_hidden_layers
    assert len(names) == layers * len(chosen.targets) * 2 and all(
        "layers." in key and "vision" not in key for key in names
    )
    assert not any(id(parameter) in tower for parameter in names.values())
    model = load(name)
    more = model.attach_lora(settings(model, projector=True), generator=np.random.default_rng(0))
    extra = set(more) - set(names)
    assert extra and all(any(part in key for part in ("multi_modal_projector", "connector", "merger")) for key in extra)


def test_a_reducer_counts_the_tokens_of_a_whole_picture_not_of_a_tile(load: Load) -> None:
    model = load("idefics3")
    model.set_reducer(ReducerConfig(name="cls-topk", keep=6, layer=-1))
    small, large = np.zeros((32, 32, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)
    large[::2] = 255
    tokens = [len(item.tokens) for item in model.encoded([large, small])]
    assert tokens == [6, 6]
    markers = [int((item.head.slot == -1).sum()) for item in model.encoded([large, small])]
    assert markers[0] > 0, "tile markers stay"
    model.set_reducer(ReducerConfig(name="cls-topk", keep=20, layer=-1))
    with pytest.raises(UsageError, match=r"reducer\.keep: got 20; accepted: 1 to \d+"):
        model.encoded([small])


def test_a_small_picture_with_too_few_tokens_is_refused(load: Load) -> None:
    model = load("qwen2_vl")
    model.set_reducer(ReducerConfig(name="visionzip", keep=8, fuse=2, layer=-1))
    big, small = np.full((32, 32, 3), 9, np.uint8), np.full((16, 16, 3), 9, np.uint8)
    assert len(model.encoded([big])[0].tokens) == 10
    with pytest.raises(UsageError, match=r"reducer\.keep: got 8; accepted: 1 to 3"):
        model.encoded([big, small])


def test_windowed_attention_is_no_importance(load: Load) -> None:
    model = load("qwen2_5_vl")
    with pytest.raises(UsageError, match=r"reducer\.layer: got -2; accepted: -3, -1"):
        model.set_reducer(ReducerConfig(name="cls-topk", keep=3, layer=-2))
    model.set_reducer(ReducerConfig(name="random", keep=3, layer=-2))  # does not look at attention


def test_a_foreign_architecture_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    words = r"^model\.path: .* is of type llama, a text-only model; accepted: .* idefics3, llava"
    with pytest.raises(UsageError, match=words):
        VisionLanguageModel.load(str(tmp_path), device="cpu")


def test_settings_that_would_lose_a_patch_or_the_preprocessing_are_refused(tmp_path: Path) -> None:
    siglip = save_tiny_llava(tmp_path / "siglip", tower="siglip", strategy="default")
    with pytest.raises(UsageError, match="a SigLIP tower"):
        VisionLanguageModel.load(str(siglip), device="cpu")
    qwen = save_tiny_qwen2_vl(tmp_path / "qwen")
    (qwen / "preprocessor_config.json").unlink()
    with pytest.raises(UsageError, match=r"preprocessor_config\.json"):
        VisionLanguageModel.load(str(qwen), device="cpu")


def test_the_head_keeps_markers_and_order() -> None:
    whole = np.array([5, 3, 3, 6, 3, 3, 7])  # two tiles of two places, with a marker before, between and behind
    ids, slot, origin = arrange(whole, np.array([1, 2, 4, 5]), np.array([1, 2]), front=1, fused=1)
    assert slot.tolist() == [-1, 0, 1, -1, 2, 3, -1]
    assert origin.tolist() == [-1, -1, 1, -1, 2, -1, -1]
    assert ids[[0, 3, 6]].tolist() == [5, 6, 7]


def test_qwen_positions_of_kept_and_fused_tokens(load: Load) -> None:
    model = load("qwen2_vl")
    reduced = Reduced(torch.zeros(1, 3, 64), torch.tensor([[1]]), torch.tensor([[0, 0, 1, 1, 1]]), 2)
    (head,) = model.family.head(model.prompter, (4, 6), reduced, 6)  # 2 x 3 squares; 0 and 2 fused, 3, 4 and 5 fused
    begin = len(model.prompter.prefix)
    assert (head.positions[:, begin:] - begin).tolist() == [[0, 0, 0], [0, 0, 1], [1, 1, 1]]
    assert head.start == begin + 3


def test_pictures_are_encoded_alike_in_any_company(load: Load) -> None:
    """Tokens of a picture alone, and among others of other sizes."""
    model = load("idefics3")
    model.set_reducer(VISIONZIP)
    pixels = [picture.pixels for unit in units("idefics3", 4) for picture in unit.pictures]
    together = model.encoded(pixels)
    for shown, item in zip(pixels, together, strict=True):
        (alone,) = model.encoded([shown])
        torch.testing.assert_close(alone.tokens, item.tokens, rtol=1e-5, atol=1e-5)
        assert np.array_equal(alone.head.slot, item.head.slot)


def test_the_preprocessing_is_the_checkpoint_s_own(load: Load) -> None:
    model = load("idefics3")
    shown = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    (made,) = model.family.prepare([shown])
    expected = model.family.processor([[Image.fromarray(shown)]], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(made.values, expected) and made.grid == (2, 2)


def test_llava_has_a_layer_of_importance_and_one_of_features(load: Load) -> None:
    """The hidden states of the tower itself; the checkpoint's own layer unless the run names another."""
    model = load("llava")
    pixels = [unit.pictures[0].pixels for unit in random_units(3)]
    with torch.no_grad():
        states = model.hf.model.vision_tower(model._pixel_values(pixels), output_hidden_states=True).hidden_states

    def looked(**settings: int) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
        model.set_reducer(ReducerConfig(name="visionzip", keep=3, fuse=2, **settings))  # type: ignore[arg-type]
        seen = model.visual_tokens(pixels)
        return tuple(model.layers), seen.tokens, seen.importance  # type: ignore[return-value]

    layers, tokens, importance = looked()
    assert layers == (-2, -2) and torch.equal(tokens, states[-2][:, 1:])
    layers, same, other = looked(layer=-1)
    assert layers == (-1, -2) and torch.equal(same, tokens) and not torch.allclose(other, importance)
    layers, moved, there = looked(feature_layer=3)
    assert layers == (3, 3) and torch.equal(moved, states[3][:, 1:]) and torch.equal(there, other)
    layers, both, _ = looked(feature_layer=1, layer=-1)
    assert layers == (-1, 1) and torch.equal(both, states[1][:, 1:])
    model.set_reducer(ReducerConfig(feature_layer=1))
    assert torch.equal(model.visual_tokens(pixels).tokens, states[1][:, 1:]), "also where nothing is reduced"
    for bad in (0, 4, -4):
        with pytest.raises(UsageError, match=r"reducer\.feature-layer: got .*; accepted: -3 to -1"):
            looked(feature_layer=bad)
    other_family = load("qwen2_vl")
    other_family.set_reducer(ReducerConfig(name="cls-topk", keep=3, feature_layer=-1))
    with pytest.raises(UsageError, match=r"reducer\.feature-layer: got -2; accepted: null"):
        other_family.set_reducer(ReducerConfig(name="cls-topk", keep=3, feature_layer=-2))


def test_dominant_and_contextual_tokens_follow_the_checkpoint(load: Load) -> None:
    assert [sized(ReducerConfig(), patches).keep for patches in (576, 729, 256, 64, 4, None)] == [54, 68, 24, 6, 1, 54]
    assert [sized(ReducerConfig(), patches).fuse for patches in (576, 729, 256, 64, 4, None)] == [10, 13, 4, 1, 1, 10]
    assert sized(ReducerConfig(keep=16, fuse=0), 576) == ReducerConfig(keep=16, fuse=0)
    model = load("llava")  # 16 patches
    model.set_reducer(ReducerConfig(name="visionzip"))
    assert (model.reducer_config.keep, model.reducer_config.fuse) == (2, 1)
    assert model.encoded([np.zeros((32, 32, 3), np.uint8)])[0].tokens.shape[0] == 1 + 2 + 1
