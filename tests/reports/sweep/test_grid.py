"""Grids: what cells a YAML stands for, and one clear line for those that can't be."""

from pathlib import Path

import pytest
import yaml

from dpaudit.errors import UsageError
from reports.sweep.grid import Grid, make_plan, preset, presets, read_grid


def grid(tmp_path: Path, **tree: object) -> Grid:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    return read_grid(path)


def test_a_grid_is_the_product_of_its_values_for_every_configuration(tmp_path: Path) -> None:
    plan = make_plan(
        grid(
            tmp_path,
            settings={"data": {"limit": 20}, "training.epochs": 3},
            grid={"privacy.epsilon": [1, 8], "training.batch_size": [16, 32]},
            configurations=[
                {"name": "a", "settings": {"method": "dp-sgd"}},
                {"name": "b", "settings": {"method": "dual-priv"}, "against": "a"},
                {"name": "free", "settings": {"method": "non-private"}, "grid": {}},
            ],
            seeds=[3, 5],
        )
    )
    assert plan.name == "mine" and len(plan.points) == 9 and len(plan.cells) == 18
    assert [point.name for point in plan.points][:2] == ["a, epsilon 1, batch-size 16", "a, epsilon 1, batch-size 32"]
    assert plan.points[5].against == "a, epsilon 1, batch-size 32" and plan.points[8].against is None
    cell = plan.cells[0]
    assert (cell.config.privacy.epsilon, cell.config.training.batch_size, cell.config.seed) == (1.0, 16, 3)
    assert cell.config.data.limit == 20 and cell.config.training.epochs == 3
    assert len({cell.folder for cell in plan.cells}) == 18 and cell.folder.endswith(cell.config.sha256()[:8])
    assert [cell.seed for cell in plan.cells] == [3] * 9 + [5] * 9  # a whole table first, then the repeats
    plain = make_plan(grid(tmp_path, grid={"method": ["dp-sgd", "non-private"]}))
    assert [point.name for point in plain.points] == ["method dp-sgd", "method non-private"]


def test_overrides_reach_every_cell_and_change_its_folder(tmp_path: Path) -> None:
    made = grid(tmp_path, grid={"privacy.epsilon": [1, 8]})
    before, after = make_plan(made), make_plan(made, overrides=["data.limit=9", "model.lora.rank=2"], seeds=[0, 1])
    assert len(after.cells) == 4
    assert all(cell.config.data.limit == 9 and cell.config.model.lora.rank == 2 for cell in after.cells)
    assert not {cell.folder for cell in before.cells} & {cell.folder for cell in after.cells}


@pytest.mark.parametrize(
    ("tree", "overrides", "words"),
    [
        ({"grid": {"privacy.epsilon": [0]}}, (), "cell 'epsilon 0': privacy.epsilon"),
        ({"grid": {"privacy.epslon": [1]}}, (), "did you mean privacy.epsilon"),
        ({"grid": {"privacy.epsilon": 3}}, (), "grid.privacy.epsilon: got 3"),
        ({"grid": {"privacy.epsilon": []}}, (), "a list of values"),
        ({"grid": {"method": ["dp-sgd", "dp-sgd"]}}, (), "two are called"),
        ({"gird": {}}, (), "gird"),
        ({"configurations": [{"name": "x", "against": "y"}]}, (), "against of 'x'"),
        ({"configurations": [{"name": "x", "against": "x"}]}, (), "against of 'x'"),
        ({"configurations": [{"name": "x", "train": False, "settings": {"method": "dp-sgd"}}]}, (), "not trained"),
        ({"configurations": [{"settings": {}}]}, (), "configurations.0.name"),
        ({"seeds": []}, (), "seeds"),
        ({"seeds": [1, 1]}, (), "--seeds"),
        ({"seeds": ["a"]}, (), "seeds.0"),
        ({"settings": {"seed": 3}}, (), "settings.seed"),
        ({"grid": {"privacy.epsilon": [1, 3]}}, ("privacy.epsilon=2",), "values of its own"),
        ({"grid": {"privacy.epsilon": [1, 3]}}, ("privacy={epsilon: 2}",), "values of its own"),
        ({"grid": {"privacy.epsilon": [1, 3]}}, ("seed=2",), "--seeds 0,1,2"),
        ({"grid": {"privacy.epsilon": list(range(1, 10_002))}}, (), "at most 10000"),
    ],
)
def test_bad_grids_are_one_clear_line(
    tmp_path: Path, tree: dict[str, object], overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(grid(tmp_path, **tree), overrides=overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_preset_resolves_and_takes_overrides() -> None:
    assert presets() == ("dual-priv-ablation", "dual-priv-noiseless", "frontier", "iso-parameter")
    frontier = make_plan(read_grid(preset("frontier")))
    assert len(frontier.cells) == 3 * 7
    claimed = {(c.config.method, c.config.privacy.epsilon) for c in frontier.cells if c.config.method != "non-private"}
    assert claimed == {(method, eps) for method in ("dp-sgd", "dual-priv") for eps in (1.0, 3.0, 8.0)}
    pieces = make_plan(read_grid(preset("dual-priv-ablation")), overrides=["data.limit=50"])
    at_eight = {p.name.removesuffix(", epsilon 8"): p for p in pieces.points if "epsilon 8" in p.name}
    configs = {c.point.name.removesuffix(", epsilon 8"): c.config for c in pieces.cells if "epsilon 8" in c.point.name}
    whole = configs["dual-priv"]
    assert (whole.reducer.name, whole.reducer.noise, whole.pruning.keep) == ("visionzip", "mean", 0.8)

    def changed(name: str) -> dict[str, object]:
        own, full = configs[name].model_dump(), whole.model_dump()
        flat = {(s, k): v for s, part in own.items() if isinstance(part, dict) for k, v in part.items()}
        base = {(s, k): v for s, part in full.items() if isinstance(part, dict) for k, v in part.items()}
        return {f"{s}.{k}": v for (s, k), v in flat.items() if base[s, k] != v}

    assert changed("(1,1,1,0) no gradient pruning") == {"pruning.keep": 1.0}
    assert changed("(1,1,0,1) no fusion noise") == {"reducer.noise": "none"}
    assert changed("(1,1,C,1) fusion noise sigma C") == {"reducer.noise": "sum"}
    assert changed("assignment by tokens") == {"reducer.assign": "tokens"}
    assert changed("(1,0,1,1) no fusion") == {"reducer.name": "cls-topk", "reducer.noise": "none"}
    assert set(changed("(0,1,1,1) no token pruning")) == {"reducer.keep", "reducer.fuse"}
    chance, attention = configs["random selection, no fusion"], configs["(1,0,1,1) no fusion"]
    assert chance.reducer.keep == attention.reducer.keep and chance.reducer.name == "random"
    assert at_eight["random selection, no fusion"].against == "(1,0,1,1) no fusion, epsilon 8"
    assert configs["dp-zo"].method == "dp-zo" and {"rank 4, half the blocks", "rank 2, all blocks"} <= set(configs)
    noiseless = make_plan(read_grid(preset("dual-priv-noiseless")))
    silent = [cell.config.method for cell in noiseless.cells if not cell.config.claims and cell.seed == 0]
    assert silent == ["non-private", "dp-sgd", "dual-priv", "dp-zo"]
    iso = make_plan(read_grid(preset("iso-parameter")))
    for cell in iso.cells:
        assert cell.config.model.lora.alpha / cell.config.model.lora.rank == 4
    with pytest.raises(UsageError, match="--preset"):
        preset("frontir")
