"""Every document of every command has its schema in the package, in step with the code."""

import json

import jsonschema
import pytest

from dpaudit.cli.schemas import ALL, FOLDER
from dpaudit.documents import Document


@pytest.mark.parametrize("document", ALL, ids=lambda document: document.named())
def test_the_committed_schema_is_the_code_s(document: type[Document]) -> None:
    committed = json.loads((FOLDER / f"{document.named()}.json").read_text(encoding="utf-8"))
    assert committed == document.json_schema(), "run make schemas"
    jsonschema.Draft202012Validator.check_schema(committed)


def test_kinds_are_named_once_and_no_schema_is_left_over() -> None:
    kinds = [document.named() for document in ALL]
    assert sorted(kinds) == sorted({path.stem for path in FOLDER.glob("*.json")})
