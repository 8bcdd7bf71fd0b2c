"""Reducers: one example at a time, positional order, ties, and each method against a plain-loop oracle."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.fusion.isolation import audit_isolation
from dpaudit.config import ReducerConfig
from dpaudit.errors import UsageError
from tests.attacks.fusion_paths import token_path
from tests.tiny import random_units, save_tiny_llava
from trainers.reducers import Reduced, VisualTokens, make_reducer
from trainers.vlm import VisionLanguageModel

CONFIGS = [
    ReducerConfig(name="none"),
    ReducerConfig(name="random", keep=5),
    ReducerConfig(name="cls-topk", keep=5),
    ReducerConfig(name="visionzip", keep=5, fuse=3),
    ReducerConfig(name="visionzip", keep=7, fuse=9),
    ReducerConfig(name="tome", keep=5),
    ReducerConfig(name="tome", keep=15),
    ReducerConfig(name="divprune", keep=5),
]
WIDTH = {"none": 17, "random": 6, "cls-topk": 6, "visionzip": 9, "tome": 6, "divprune": 6}


def visual(rows: int, seed: int, *, patches: int = 16, ties: bool = False, cls: bool = True) -> VisualTokens:
    rng = np.random.default_rng(seed)
    importance = rng.integers(0, 3, (rows, patches)) if ties else rng.random((rows, patches))
    return VisualTokens(
        torch.tensor(rng.normal(size=(rows, patches, 6)), dtype=torch.float32),
        torch.tensor(rng.normal(size=(rows, 1, 6)), dtype=torch.float32) if cls else None,
        torch.tensor(importance, dtype=torch.float32),
        torch.tensor(rng.normal(size=(rows, patches, 4)), dtype=torch.float32),
    )


def same(whole: Reduced, parts: list[Reduced]) -> bool:
    """Bit for bit, in all that a reducer says."""
    ours = [whole.tokens, whole.kept] + ([] if whole.assignment is None else [whole.assignment])
    theirs = [torch.cat([part.tokens for part in parts]), torch.cat([part.kept for part in parts])]
    if whole.assignment is not None:
        theirs.append(torch.cat([part.assignment for part in parts if part.assignment is not None]))
    return all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.keep}-{config.fuse}")
@settings(max_examples=30, deadline=None)
@given(first=st.integers(1, 4), second=st.integers(1, 4), seed=st.integers(0, 10**6), ties=st.booleans())
def test_a_reducer_sees_one_example_at_a_time(
    config: ReducerConfig, first: int, second: int, seed: int, ties: bool
) -> None:
    reduce = make_reducer(config, patches=16, drop_cls=False)
    a, b = visual(first, seed, ties=ties), visual(second, seed + 1, ties=ties)
    together, alone = reduce(VisualTokens.join([a, b])), (reduce(a), reduce(b))
    assert same(together, [part[row : row + 1] for part in alone for row in range(len(part.kept))])
    assert bool((together.kept.diff(dim=1) > 0).all()), "dominant tokens keep their positional order"
    order = torch.randperm(first + second, generator=torch.Generator().manual_seed(seed))
    moved = reduce(VisualTokens.join([a, b])[order])
    assert same(moved, [together[place : place + 1] for place in order.tolist()]), "the order of examples matters"


@pytest.mark.parametrize("cls", [True, False])
def test_visionzip_equals_the_definition(cls: bool) -> None:
    keep, fuse, patches = 5, 3, 16
    given_tokens = visual(3, 7, cls=cls)
    reduced = make_reducer(ReducerConfig(name="visionzip", keep=keep, fuse=fuse), patches=patches, drop_cls=False)(
        given_tokens
    )
    for row in range(3):
        importance = given_tokens.importance[row].tolist()
        dominant = sorted(sorted(range(patches), key=lambda j: -importance[j])[:keep])
        rest = [j for j in range(patches) if j not in dominant]
        step = max(1, len(rest) // fuse)
        centres = [rest[index] for index in range(0, len(rest), step)][:fuse]
        clusters: dict[int, list[torch.Tensor]] = {centre: [] for centre in centres}
        for j in rest:
            if j in centres:
                continue
            similar = [
                torch.cosine_similarity(given_tokens.keys[row, j], given_tokens.keys[row, c], dim=0) for c in centres
            ]
            clusters[centres[int(torch.stack(similar).argmax())]].append(given_tokens.tokens[row, j])
        expected = [given_tokens.cls[row, 0]] if given_tokens.cls is not None else []
        expected += [given_tokens.tokens[row, j] for j in dominant]
        for centre, members in clusters.items():
            token = given_tokens.tokens[row, centre]
            expected.append(token + torch.stack(members).mean(dim=0) if members else token)
        torch.testing.assert_close(reduced.tokens[row], torch.stack(expected))
        assert reduced.kept[row].tolist() == dominant


def unit_vectors(values: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(values, dim=-1).double().numpy()


def merged_by_hand(tokens: np.ndarray, keys: np.ndarray, keep: int) -> tuple[list[int], list[list[int]], np.ndarray]:
    """ToMe in plain loops: positions left, the patches behind each of them, their weighted means."""
    groups = [([place], place) for place in range(len(tokens))]
    while len(groups) > keep:

        def mean(values: np.ndarray, members: list[int]) -> np.ndarray:
            return values[members].mean(axis=0)

        evens, odds = range(0, len(groups), 2), range(1, len(groups), 2)
        best = []
        for even in evens:
            ours = mean(keys, groups[even][0])
            likeness = []
            for odd in odds:
                other = mean(keys, groups[odd][0])
                likeness.append(float(ours @ other / np.linalg.norm(ours) / np.linalg.norm(other)))
            partner = int(np.argmax(likeness))
            best.append((likeness[partner], even, 2 * partner + 1))
        best.sort(key=lambda item: -item[0])
        for _, even, odd in best[: min(len(groups) // 2, len(groups) - keep)]:
            groups[odd] = (groups[odd][0] + groups[even][0], groups[odd][1])
            groups[even] = ([], -1)
        groups = [group for group in groups if group[0]]
    members = [sorted(group[0]) for group in groups]
    return [group[1] for group in groups], members, np.stack([tokens[part].mean(axis=0) for part in members])


@pytest.mark.parametrize("keep", [1, 3, 5, 8, 9, 15])
def test_tome_equals_the_definition(keep: int) -> None:
    """Size-weighted means of means are means over all the patches behind a token."""
    given_tokens = visual(4, 100 + keep)
    reduced = make_reducer(ReducerConfig(name="tome", keep=keep), patches=16, drop_cls=False)(given_tokens)
    assert reduced.assignment is not None and reduced.fused == 0
    for row in range(4):
        tokens, keys = (part[row].double().numpy() for part in (given_tokens.tokens, given_tokens.keys))
        places, members, means = merged_by_hand(tokens, keys, keep)
        assert reduced.kept[row].tolist() == places
        np.testing.assert_allclose(reduced.tokens[row, 1:].double().numpy(), means, rtol=1e-5, atol=1e-6)
        others = [place for place in range(16) if place not in places]
        expected = [next(index for index, part in enumerate(members) if place in part) for place in others]
        assert reduced.assignment[row].tolist() == expected


@pytest.mark.parametrize("keep", [1, 2, 4, 9])
def test_divprune_equals_the_definition_and_is_within_half_of_the_optimum(keep: int) -> None:
    given_tokens = visual(3, 200 + keep, patches=10)
    reduced = make_reducer(ReducerConfig(name="divprune", keep=keep), patches=10, drop_cls=False)(given_tokens)
    for row in range(3):
        points = unit_vectors(given_tokens.tokens[row])
        distance = 1 - points @ points.T
        first = int(np.argmax([min(distance[i, j] for j in range(10) if j != i) for i in range(10)]))
        chosen = [first]
        while len(chosen) < keep:
            rest = [i for i in range(10) if i not in chosen]
            chosen.append(max(rest, key=lambda i: min(distance[i, j] for j in chosen)))
        assert reduced.kept[row].tolist() == sorted(chosen)
        if keep > 1:
            chord = np.sqrt(2 * np.maximum(distance, 0))

            def smallest(places: tuple[int, ...], chord: np.ndarray = chord) -> float:
                return min(float(chord[i, j]) for i, j in combinations(places, 2))

            best = max(smallest(places) for places in combinations(range(10), keep))
            assert smallest(tuple(chosen)) >= best / 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.keep}-{config.fuse}")
def test_a_constant_picture_and_zero_tokens_have_the_same_shape(config: ReducerConfig) -> None:
    """All patches alike, or nothing at all in them: ties everywhere, no division by zero, nothing kept twice."""
    reduce = make_reducer(config, patches=16, drop_cls=False)
    ordinary = reduce(visual(1, 5))
    for value in (0.0, 1.0):
        flat = VisualTokens(
            torch.full((1, 16, 6), value),
            torch.ones(1, 1, 6),
            torch.full((1, 16), 1 / 16),
            torch.full((1, 16, 4), value),
        )
        reduced = reduce(flat)
        assert reduced.tokens.shape == ordinary.tokens.shape and bool(torch.isfinite(reduced.tokens).all())
        assert bool((reduced.kept.diff(dim=1) > 0).all())
        if config.name in ("cls-topk", "visionzip", "divprune"):
            assert reduced.kept[0].tolist() == list(range(config.keep)), "ties go to the earlier position"
    assert reduce(visual(0, 1)).tokens.shape[1:] == ordinary.tokens.shape[1:], "no pictures at all"


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_reducers_on_encoders_with_and_without_cls(tower: str, tmp_path: Path) -> None:
    """Shapes follow from the configuration alone; without CLS importance is the mean attention received."""
    model = VisionLanguageModel.load(str(save_tiny_llava(tmp_path, tower=tower)), device="cpu")
    pixels = [unit.pictures[0].pixels for unit in random_units(3)] + [np.zeros((32, 32, 3), np.uint8)]
    for config in CONFIGS:
        model.set_reducer(config)
        seen = model.visual_tokens(pixels)
        assert (seen.cls is None) == (tower == "siglip")
        torch.testing.assert_close(seen.importance.sum(dim=1) <= 1 + 1e-5, torch.ones(4, dtype=torch.bool))
        reduced = model.reduce(seen)
        keep, fuse = config.keep or 0, config.fuse or 0
        width = {**WIDTH, "visionzip": keep + fuse + 1, "tome": keep + 1}[config.name]
        assert reduced.tokens.shape[:2] == (4, width - (tower == "siglip"))
    attention = model._visual(model.family.prepare(pixels), 64)
    if tower == "siglip":
        whole = model.hf.model.vision_tower
        whole.set_attn_implementation("eager")
        with torch.no_grad():
            maps = whole(model._pixel_values(pixels), output_attentions=True).attentions[model.layers.importance]
        torch.testing.assert_close(attention.importance, maps.mean(dim=1).mean(dim=1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(attention.importance.sum(dim=1), torch.ones(4))


@pytest.mark.parametrize(("name", "tower"), [("tome", "clip"), ("divprune", "siglip")])
def test_the_isolation_audit_passes(name: str, tower: str, tmp_path: Path) -> None:
    """Exact replay, order, batch size and padding: nothing of another record moves at any stage."""
    tiny = save_tiny_llava(tmp_path, tower=tower)
    found = audit_isolation(token_path(tiny, ReducerConfig.model_validate({"name": name, "keep": 5})), random_units(2))
    assert found.leak is None, found.leak
    assert all(check.status == "pass" for check in found.checks)


def test_noise_reaches_the_fused_tokens_only() -> None:
    reduced = make_reducer(CONFIGS[3], patches=16, drop_cls=False)(visual(2, 3))
    noise = torch.ones(2, 3, 6)
    change = reduced.with_noise(noise) - reduced.tokens
    assert torch.equal(change[:, :6], torch.zeros(2, 6, 6))
    torch.testing.assert_close(change[:, 6:], noise)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ReducerConfig(name="cls-topk", keep=16), "reducer.keep"),
        (ReducerConfig(name="visionzip", keep=10, fuse=7), "reducer.fuse"),
    ],
)
def test_sizes_that_do_not_fit_name_the_field(config: ReducerConfig, field: str) -> None:
    with pytest.raises(UsageError, match=rf"^{field}: got"):
        make_reducer(config, patches=16, drop_cls=False)
