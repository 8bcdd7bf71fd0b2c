"""Reducers: one example at a time, positional order, and VisionZip's merging against a plain-loop oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpaudit.config import ReducerConfig
from dpaudit.errors import UsageError
from trainers.reducers import VisualTokens, make_reducer

CONFIGS = [
    ReducerConfig(name="none"),
    ReducerConfig(name="random", keep=5),
    ReducerConfig(name="cls-topk", keep=5),
    ReducerConfig(name="visionzip", keep=5, fuse=3),
    ReducerConfig(name="visionzip", keep=7, fuse=9),
]


def visual(rows: int, seed: int, *, patches: int = 16, ties: bool = False, cls: bool = True) -> VisualTokens:
    rng = np.random.default_rng(seed)
    importance = rng.integers(0, 3, (rows, patches)) if ties else rng.random((rows, patches))
    return VisualTokens(
        torch.tensor(rng.normal(size=(rows, patches, 6)), dtype=torch.float32),
        torch.tensor(rng.normal(size=(rows, 1, 6)), dtype=torch.float32) if cls else None,
        torch.tensor(importance, dtype=torch.float32),
        torch.tensor(rng.normal(size=(rows, patches, 4)), dtype=torch.float32),
    )


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.keep}-{config.fuse}")
@settings(max_examples=30, deadline=None)
@given(first=st.integers(1, 4), second=st.integers(1, 4), seed=st.integers(0, 10**6), ties=st.booleans())
def test_a_reducer_sees_one_example_at_a_time(
    config: ReducerConfig, first: int, second: int, seed: int, ties: bool
) -> None:
    reduce = make_reducer(config, patches=16, drop_cls=False)
    a, b = visual(first, seed, ties=ties), visual(second, seed + 1, ties=ties)
    together, alone = reduce(VisualTokens.join([a, b])), (reduce(a), reduce(b))
    assert torch.equal(together.tokens, torch.cat([part.tokens for part in alone]))
    assert torch.equal(together.kept, torch.cat([part.kept for part in alone]))
    assert bool((together.kept.diff(dim=1) > 0).all()), "dominant tokens keep their positional order"


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
