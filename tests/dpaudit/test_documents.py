"""The JSON contract: committed schemas in step with the code, infinities as strings, no NaN, one line for bad files."""

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import dpaudit
from dpaudit import documents
from dpaudit.documents import (
    DOCUMENTS,
    AuditDocument,
    BenchmarkDocument,
    BoundDocument,
    Check,
    CheckDocument,
    Claim,
    ClaimDocument,
    ContractAudit,
    Control,
    DoctorDocument,
    Document,
    EnvironmentDocument,
    EpsilonAt,
    FeaturesDocument,
    FusionAudit,
    GameDocument,
    KeyDocument,
    LedgerDocument,
    LedgerRow,
    Metric,
    RocPoint,
    RunInfo,
    ScoresDocument,
    ScoreSummary,
    SignatureDocument,
    Spent,
    Test,
    Thumbnail,
    Validity,
    VerificationDocument,
)
from dpaudit.errors import UsageError

SCHEMAS = Path(dpaudit.__file__).parent / "schemas"
CHECK = Check(name="n", status="pass", measured="1", allowed="2", explanation="e")
CLAIM = Claim(
    epsilon=math.inf, delta=1e-5, relation="replace", unit="image", curve=(EpsilonAt(delta=1e-6, epsilon=math.inf),)
)
TEST = Test(
    name="canaries", statistic="loss", bound="steinke", assumes="none", selection="fixed", confidence=0.95,
    delta=1e-5, n=10, guesses=4, correct=4, epsilon_lower=-math.inf, ceiling=math.inf, p_value=0.5,
)  # fmt: skip
SUMMARY = ScoreSummary(
    name="s", n_in=1, n_out=1, edges=(0.0, 1.0), counts_in=(1,), counts_out=(1,), roc=(RocPoint(fpr=0, tpr=1),),
    auc=0.5, tpr_at_fpr={"0.1": RocPoint(fpr=0.1, tpr=0.2), "0.001": None},
)  # fmt: skip
CONTROL = Control(name="liveness", outcome="earned", measured="1 C", allowed="1 C", explanation="e")
ROW = LedgerRow(path="gradients", status="UNACCOUNTED", explanation="x", evidence="y")
METRIC = Metric(value=0.5, low=None, high=0.75, n=10)
EXAMPLES: list[Document] = [
    ClaimDocument(claim=CLAIM),
    ClaimDocument(claim=None, reasons=("non-private",)),
    LedgerDocument(
        coins_sha256=None, rows=(ROW,), spent=Spent(steps_started=1, steps_planned=2, epsilon=math.inf, delta=1e-5)
    ),
    AuditDocument(
        verdict="not refuted", reasons=("r",), claim=CLAIM, alternative="a", alpha=0.001, family_confidence=0.95,
        tests=(TEST,), validity=Validity(sound=True, checks=(CHECK,)), ledger=(ROW,),
        fusion=FusionAudit(training="accounted", release="not released", reducer="none", checks=(CHECK,)),
        contract=ContractAudit(verdict="pass", checks=(CHECK,)), scores=(SUMMARY,),
        gallery=(Thumbnail(caption="c", kind="k", png_base64="AA==", question="q", answer="a"),),
        run=RunInfo(name="r", method="dp-sgd", config_sha256="00"),
    ),
    GameDocument(
        game="white-box", number=1, previous_sha256=None, about="procedure", claim=CLAIM, coins_sha256="00",
        alpha=0.001, tests=(TEST,), controls=(CONTROL,), scores=(SUMMARY,),
    ),
    ScoresDocument(
        verdict="no claim", reasons=(), alpha=0.001, family_confidence=0.95, tests=(TEST,),
        validity=Validity(sound=False, checks=()),
    ),
    BoundDocument(method="m", epsilon_lower=0, ceiling=math.inf, confidence=0.95, delta=0, assumes="prior"),
    BenchmarkDocument(
        tasks={"digits": {"exact_match": METRIC}}, base=None, lmms_eval_version="0.7.3", prompt="p", batch_size=1,
        precision="float32", device="cpu", sample_sha256={"digits": "00"}, seconds=1.5,
    ),
    EnvironmentDocument(dpaudit="0", python="3", platform="Linux", device="cpu", packages={}),
    CheckDocument(verdict="fail", checks=(CHECK,)),
    DoctorDocument(healthy=True, checks=(CHECK,)),
    SignatureDocument(statement="{}", public_key="PEM", signature="AAAA"),
    VerificationDocument(valid=False, reasons=("the release is not signed",), key_sha256="0" * 64),
    KeyDocument(private_key="key", public_key="key.pub", key_sha256="0" * 64),
    FeaturesDocument(folder="features", deleted=False, settings=1, pictures=2, bytes=3),
]  # fmt: skip


def test_every_document_has_an_example_and_a_schema() -> None:
    assert {type(example) for example in EXAMPLES} == set(DOCUMENTS)
    assert {path.stem for path in SCHEMAS.iterdir()} >= {document.named() for document in DOCUMENTS}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.named())
def test_committed_schema_is_the_code_s(document: type[Document]) -> None:
    committed = json.loads((SCHEMAS / f"{document.named()}.json").read_text(encoding="utf-8"))
    assert committed == document.json_schema(), "run: make schemas"
    jsonschema.Draft202012Validator.check_schema(committed)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.kind)
def test_round_trip_and_schema(example: Document, tmp_path: Path) -> None:
    text = example.to_json()
    assert text.endswith("}\n") and "Infinity" not in text and "NaN" not in text
    tree = json.loads(text)
    assert tree["schema_version"] == documents.SCHEMA_VERSION
    schema = json.loads((SCHEMAS / f"{example.kind}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator(schema).validate(tree)
    (tmp_path / "d.json").write_text(text, encoding="utf-8")
    assert type(example).read(tmp_path / "d.json") == example


def _strict_numbers(name: str) -> None:
    raise AssertionError(f"{name} in JSON")


@settings(max_examples=60)
@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
def test_every_number_comes_back_as_it_was(lower: float, ceiling: float) -> None:
    one = BoundDocument(method="m", epsilon_lower=lower, ceiling=ceiling, confidence=0.9, delta=0.0, assumes="none")
    text = one.to_json()
    json.loads(text, parse_constant=_strict_numbers)
    assert BoundDocument.model_validate_json(text) == one


def test_the_strings_of_infinity() -> None:
    tree = json.loads(EXAMPLES[3].to_json())
    assert tree["tests"][0]["epsilon_lower"] == "-inf" and tree["tests"][0]["ceiling"] == "inf"
    assert tree["claim"]["epsilon"] == "inf" and tree["claim"]["curve"][0]["epsilon"] == "inf"


def test_no_document_holds_nan_or_an_infinite_plain_number() -> None:
    fields: dict[str, Any] = {
        "method": "m", "epsilon_lower": 0.0, "ceiling": 0.0, "confidence": 0.9, "delta": 0.0, "assumes": "none",
    }  # fmt: skip
    for field in ("epsilon_lower", "ceiling", "confidence", "delta"):
        with pytest.raises(ValidationError):
            BoundDocument(**{**fields, field: math.nan})
    with pytest.raises(ValidationError):
        BoundDocument(**{**fields, "delta": math.inf})


@pytest.mark.parametrize(
    "text, word",
    [
        ("", "bound"),
        ("{", "bound"),
        ("[]", "bound"),
        ("null", "bound"),
        ('{"schema_version": 9}', "schema_version"),
        ('{"schema_version": 1, "method": 3}', "method"),
        ('{"method": "m", "epsilon_lower": "infinite"}', "epsilon_lower"),
        ('{"surprise": 1}', "bound"),
        ("[" * 100_000, "bound"),
        ('{"delta": NaN}', "bound"),
    ],
)
def test_bad_files_give_one_line(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "bound.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        BoundDocument.read(path)
    message = str(caught.value)
    assert str(path) in message and word in message and "\n" not in message


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"method": "\xff"}')
    for path in (tmp_path, tmp_path / "missing.json", tmp_path / "latin.json"):
        with pytest.raises(UsageError, match="can't be read"):
            BoundDocument.read(path)


def test_unknown_fields_are_refused() -> None:
    tree = json.loads(EXAMPLES[5].to_json())
    with pytest.raises(ValidationError, match="surprise"):
        BoundDocument.model_validate({**tree, "surprise": 1})


@settings(max_examples=150, deadline=None)
@given(st.text() | st.binary().map(lambda raw: raw.decode("latin-1")), st.sampled_from(DOCUMENTS))
def test_any_text_is_a_document_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str, document: type[Document]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        document.read(path)
    except UsageError as error:
        assert "\n" not in str(error).replace(str(path), "")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_mutated_document_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Truncated or with flipped bytes: refused, or a document that validates; never another exception."""
    example = data.draw(st.sampled_from(EXAMPLES))
    raw = bytearray(example.to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    try:
        again = type(example).read(path)
    except UsageError as error:
        assert error.exit_code == 2
    else:
        json.loads(again.to_json(), parse_constant=_strict_numbers)
