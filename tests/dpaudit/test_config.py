"""The configuration: every bad value gives one line that names its field, and nothing gives a traceback."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dpaudit.config import METHOD_DEFAULTS, Method, RunConfig, parse_override, read_yaml, resolve
from dpaudit.errors import UsageError


def fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every leaf field by its outside name."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        outside = prefix + name.replace("_", "-")
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found.update(fields(field.annotation, f"{outside}."))
        else:
            found[outside] = field
    return found


def sections(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            outside = prefix + name.replace("_", "-")
            found += [outside, *sections(field.annotation, f"{outside}.")]
    return found


LEAVES = fields()
TEXT = {
    "data.name", "data.path", "data.train", "data.test", "data.train-images", "data.test-images", "data.unit",
    "data.subset", "data.post-prompt",
    "model.path",
}  # fmt: skip
# Values that no field of the name accepts, beside those that none of its type does.
BAD: dict[str, list[str]] = {
    "method": ["dpsgd", "DP-SGD", "null"],
    "seed": ["-1", "0.5", "9223372036854775808", "abc"],
    "data.reserve": ["-1", "1.5"],
    "data.limit": ["1", "0", "-3"],
    "data.frames": ["some", "3"],
    "data.background": ["plaid", "#12345"],
    "data.public-size": ["0", "-1"],
    "model.device": ["gpu", "cuda:", "cuda:x", "CPU"],
    "model.precision": ["float16", "bf16", "null"],
    "model.lora.rank": ["0", "-1", "2.5"],
    "model.lora.alpha": ["0", "-1", ".inf", ".nan"],
    "model.lora.targets": ["q_proj", "3", "[1]", "[[a]]"],
    "model.lora.projector": ["2", "maybe"],
    "model.lora.train": ["B", "a", "null"],
    "reducer.name": ["ToMe", "VisionZip", "null", "3"],
    "reducer.keep": ["0", "-1"],
    "reducer.fuse": ["-1"],
    "reducer.layer": ["last", "1.5"],
    "reducer.feature-layer": ["last", "-1.5"],
    "reducer.assign": ["query", "null"],
    "reducer.noise": ["sigma", "-1", ".nan", ".inf", "[]"],
    "privacy.epsilon": ["0", "-8", ".nan", "-.inf", "eight"],
    "privacy.delta": ["0", "1", "-1e-5", "1.5", ".nan"],
    "privacy.noise-multiplier": ["0", "-1", ".inf"],
    "privacy.max-grad-norm": ["0", "-1", ".nan", ".inf", "null"],
    "privacy.relation": ["add/remove", "swap", "null"],
    "privacy.noise": ["safe", "null"],
    "privacy.clipping": ["per-layer", "null"],
    "pruning.keep": ["0", "1.1", "-1", ".nan"],
    "pruning.by": ["norm", "null"],
    "pruning.granularity": ["block", "null"],
    "pruning.decay": ["1", "-0.1", ".nan"],
    "pruning.explore": ["-0.1", "1.1", ".nan"],
    "fusion.release": ["noise", "null"],
    "fusion.radius": ["0", "-1", ".inf"],
    "fusion.multiplier": ["0", "-1", ".nan"],
    "zeroth-order.noise": ["normal", "null"],
    "zeroth-order.directions": ["0", "-1", "1.5", "null"],
    "zeroth-order.perturbation": ["0", "-1e-3", ".inf", ".nan"],
    "training.epochs": ["0", "-1", ".inf"],
    "training.steps": ["0", "-1", "1.5"],
    "training.batch-size": ["0", "-1", "2.5", "null"],
    "training.sampling": ["Poisson", "full", "null"],
    "training.parallel": ["ddp", "null"],
    "training.optimizer": ["adam", "AdamW"],
    "training.schedule": ["step", "null"],
    "training.beta1": ["1", "-0.1", ".nan"],
    "training.beta2": ["1", "-0.1", "null"],
    "training.adam-epsilon": ["0", "-1e-8", ".inf"],
    "training.variance-floor": ["0", "-1", ".nan"],
    "training.momentum": ["1", "-0.1", "null"],
    "training.average": ["1", "-0.1", "yes"],
    "training.learning-rate": ["0", "-1", ".inf", "fast"],
    "training.weight-decay": ["-0.1", ".nan"],
    "training.warmup": ["-0.1", "1", "2"],
    "training.augmentations": ["0", "65", "1.5", "null"],
    "training.gradient-path": ["shadow", "null"],
    "training.rows-at-once": ["0", "-1", "many"],
    "training.draws": ["0", "-1", "many"],
    "training.memory": ["0", "-1", ".inf", "null"],
    "training.gradient-checkpointing": ["full", "null"],
    "training.feature-cache": ["yes", "disk", "null"],
    "training.checkpoint-every": ["0", "-1", "null"],
    "canaries.count": ["-1", "1.5", ".inf"],
    "canaries.kinds": ["noise", "[loud]", "[1]"],
    "planted.noise-scale": ["-0.1", ".nan", ".inf"],
}  # fmt: skip
FOR_ANY = ["{a: 1}", "[[]]", "2020-01-01", "true"]
CASES = [(name, value) for name in LEAVES for value in [*BAD.get(name, []), *FOR_ANY]]
CASES = [case for case in CASES if case != ("model.lora.projector", "true")]


def one_line(error: UsageError) -> str:
    message = str(error)
    assert "\n" not in message and len(message) < 600, message
    return message


def test_the_tables_of_this_file_know_every_field() -> None:
    assert set(BAD) | TEXT == set(LEAVES)


@pytest.mark.parametrize("name, value", CASES)
def test_a_bad_value_names_its_field(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({}, [f"{name}={value}"])
    message = one_line(caught.value)
    assert message.startswith(f"{name}: ") or message.startswith(f"{name}.0: "), message
    assert re.search("should|must|accepted", message), message


@pytest.mark.parametrize("name", sections())
@pytest.mark.parametrize("value", ["3", "null", "[]", "text", "true"])
def test_a_section_is_a_mapping(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=r"mapping|must not be") as caught:
        resolve({}, [f"{name}={value}"])
    assert one_line(caught.value).startswith(f"{name}: got")


@pytest.mark.parametrize("name", LEAVES)
def test_a_misspelt_field_is_refused_and_mended(name: str) -> None:
    with pytest.raises(UsageError, match="no such field") as caught:
        resolve({}, [f"{name}x=1"])
    assert name in one_line(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("epochs=3", "did you mean training.epochs?"),
        ("rank=4", "did you mean model.lora.rank?"),
        ("name=x", "did you mean data.name or reducer.name?"),
        ("trainings.epochs=1", "did you mean training?"),
        ("training.foo=1", "accepted in training: epochs, steps, batch-size,"),
        ("model.lora.foo=1", "accepted in model.lora: rank, alpha,"),
        ("foo=1", "accepted: method, seed, data, model,"),
    ],
)
def test_an_unknown_field_names_what_was_meant_or_what_there_is(given: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({}, [given])
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides, field",
    [
        (["privacy.epsilon=8", "privacy.noise-multiplier=1"], "privacy.epsilon"),
        (["privacy.epsilon=null"], "privacy.epsilon"),
        (["data.path=x"], "data"),
        (["data.path=x", "data.name=digits", "data.train=a", "data.test=b"], "data"),
        (["method=non-private", "planted.noise-scale=0.5"], "planted.noise-scale"),
        (["canaries.count=5", "canaries.kinds=[]"], "canaries.kinds"),
        (["reducer.name=random", "reducer.noise=sum"], "reducer.noise"),
        (["reducer.name=visionzip", "reducer.fuse=0"], "reducer.fuse"),
        (["reducer.name=visionzip", "reducer.noise=-1"], "reducer.noise"),
        (["method=non-private", "reducer.name=visionzip", "reducer.noise=mean"], "reducer.noise"),
    ],
)
def test_fields_that_contradict_each_other(overrides: list[str], field: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({}, overrides)
    assert one_line(caught.value).startswith(f"{field}: got")


@pytest.mark.parametrize("text", ["", "=", "=1", "a", ".=1", "a.=1", ".a=1", "a..b=1"])
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"key\.sub=value"):
        parse_override(text)


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ([], "mislabelled noise new-token"),
        (["data.name=digits"], "mislabelled noise new-token"),
        (["data.path=x", "data.train=a", "data.test=b"], "noise new-token"),
        (["data.name=owner/set"], "noise new-token"),
        (["data.path=x", "data.train=a", "data.test=b", "data.reserve=50"], "mislabelled noise new-token"),
        (["data.name=owner/set", "canaries.kinds=[mislabelled]"], "mislabelled"),
    ],
)
def test_only_records_held_back_are_mislabelled(overrides: list[str], kinds: str) -> None:
    assert resolve({}, overrides).canaries.kinds == tuple(kinds.split())


def test_overrides_are_yaml() -> None:
    assert parse_override("training.learning_rate=1e-5") == {"training": {"learning-rate": 1e-5}}
    assert parse_override("a.b=[x, 2]") == {"a": {"b": ["x", 2]}}
    assert parse_override("a=null") == {"a": None} and parse_override("a=") == {"a": None}
    assert parse_override("a=b=c") == {"a": "b=c"}


def test_later_wins_and_methods_bring_their_switches() -> None:
    config = resolve({"training": {"batch_size": 8}}, ["training.batch-size=16", "training.batch_size=32"])
    assert config.training.batch_size == 32
    dual = resolve({"method": "dual-priv"})
    assert (dual.reducer.name, dual.reducer.noise, dual.pruning.keep) == ("visionzip", "mean", 0.8)
    assert resolve({"method": "dual-priv"}, ["pruning.keep=1"]).pruning.keep == 1
    assert resolve({}).reducer.name == "none" and set(METHOD_DEFAULTS) == set(get_args(Method))
    assert resolve({}, ["privacy.noise-multiplier=1.5"]).privacy.epsilon is None


@pytest.mark.parametrize("method", METHOD_DEFAULTS)
def test_the_resolved_file_gives_the_same_run(tmp_path: Path, method: str) -> None:
    config = resolve({"method": method}, ["seed=7", "privacy.delta=1e-6", "data.unit=größe"])
    (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    again = resolve(read_yaml(tmp_path / "run.yaml"))
    assert again == config and again.sha256() == config.sha256()
    assert resolve({"method": method}).sha256() != config.sha256()


@pytest.mark.parametrize(
    "text, word",
    [
        ("- a\n- b\n", "mapping"),
        ("3", "mapping"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system [echo]", "not YAML"),
        ("a: &x [1]\nb: *x\n", "anchors"),
        ("data: &a {name: *a}\n", "anchors"),
        ("seed: 1\nseed: 2\n", "twice"),
        ("privacy: {epsilon: 8, epsilon: 80}\n", "twice"),
        ("a: 2020-13-45\n", "not YAML"),
        ("a: " + "[" * 1500, "nested"),
        ("a: " + "9" * 5000, "not YAML"),
        ("a: 0x" + "f" * 5000, "not YAML"),
        ("? [1, 2]\n: 3\n", "unhashable"),
        ("\x00", "not YAML"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve(read_yaml(path))
    assert word in one_line(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"method: \xff\xfe")
    for path in (tmp_path, tmp_path / "missing.yaml", tmp_path / "latin.yaml"):
        with pytest.raises(UsageError, match="--config") as caught:
            read_yaml(path)
        one_line(caught.value)
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}


SCALARS: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4) | st.dates()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3), max_leaves=6
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations with mostly real field names and arbitrary values."""
    tree: dict[Any, Any] = {}
    for name in draw(st.lists(st.sampled_from([*LEAVES, *sections()]), max_size=5)):
        *path, last = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[last] = draw(VALUES)
    tree.update(draw(st.dictionaries(SCALARS, VALUES, max_size=1)))
    return tree


@example({"\n": None})
@example({"": 1})
@settings(max_examples=300, deadline=None)
@given(trees())
def test_any_tree_is_a_run_or_one_line(tree: dict[str, Any]) -> None:
    try:
        config = resolve(tree)
    except UsageError as error:
        one_line(error)
    else:
        assert resolve(yaml.safe_load(config.to_yaml())) == config


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*LEAVES, *sections(), "x", ""]), st.text(max_size=20) | VALUES.map(str))
def test_any_override_is_a_run_or_one_line(name: str, value: str) -> None:
    try:
        resolve({}, [f"{name}={value}"])
    except UsageError as error:
        one_line(error)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="abc:-[]{}&*!|>?'\" \n#%@,0.", max_size=60).map(str.encode))
def test_any_file_is_a_run_or_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    try:
        resolve(read_yaml(path))
    except UsageError as error:
        one_line(error)
