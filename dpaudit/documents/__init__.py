"""The JSON documents that dpaudit writes and reads: one typed model per file under `release/`, one JSON Schema each.

People's scripts depend on these shapes, so a change raises `SCHEMA_VERSION`. Numbers that are not finite are the
strings `"inf"` and `"-inf"` (JSON has none); a missing number is `null`, never NaN. Unknown fields are an error when a
document is read: a document from another version should say so instead of being half understood.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dpaudit.documents.audit import (
    ABOUT,
    STEP_CONTRACT,
    TOKEN_PATH,
    WITHOUT_COINS,
    About,
    AttackRow,
    AuditDocument,
    ContractAudit,
    Extraction,
    GameDocument,
    GameEntry,
    Regeneration,
    RunInfo,
    Thumbnail,
)
from dpaudit.documents.base import (
    MOST_BYTES,
    SCHEMA_VERSION,
    Document,
    Number,
    Part,
)
from dpaudit.documents.claim import (
    Claim,
    ClaimDocument,
    CrossCheck,
    EpsilonAt,
    LedgerDocument,
    LedgerRow,
    LedgerStatus,
    Relation,
    Spent,
    Stage,
)
from dpaudit.documents.environment import (
    DoctorDocument,
    EnvironmentDocument,
    FeaturesDocument,
    GradientPathName,
)
from dpaudit.documents.games import (
    Assumes,
    BoundDocument,
    Check,
    CheckDocument,
    Control,
    FactorySource,
    RocPoint,
    ScoresDocument,
    ScoreSummary,
    Test,
    Validity,
    Verdict,
)
from dpaudit.documents.signature import (
    KeyDocument,
    SignatureDocument,
    Statement,
    VerificationDocument,
)
from dpaudit.documents.token_path import (
    Carried,
    FusionAudit,
    Leak,
    LeakStage,
    MaskLeak,
    Reconstruction,
    Region,
    ReleaseAudit,
    ReleasePair,
    Sensitivity,
    TruthCase,
)
from dpaudit.documents.utility import (
    BenchmarkDocument,
    Gap,
    Metric,
    TaskAbout,
)

__all__ = [
    "ABOUT",
    "DOCUMENTS",
    "MOST_BYTES",
    "SCHEMA_VERSION",
    "STEP_CONTRACT",
    "TOKEN_PATH",
    "WITHOUT_COINS",
    "About",
    "Assumes",
    "AttackRow",
    "AuditDocument",
    "BenchmarkDocument",
    "BoundDocument",
    "Carried",
    "Check",
    "CheckDocument",
    "Claim",
    "ClaimDocument",
    "ContractAudit",
    "Control",
    "CrossCheck",
    "DoctorDocument",
    "Document",
    "EnvironmentDocument",
    "EpsilonAt",
    "Extraction",
    "FactorySource",
    "FeaturesDocument",
    "FusionAudit",
    "GameDocument",
    "GameEntry",
    "Gap",
    "GradientPathName",
    "KeyDocument",
    "Leak",
    "LeakStage",
    "LedgerDocument",
    "LedgerRow",
    "LedgerStatus",
    "MaskLeak",
    "Metric",
    "Number",
    "Part",
    "Reconstruction",
    "Regeneration",
    "Region",
    "Relation",
    "ReleaseAudit",
    "ReleasePair",
    "RocPoint",
    "RunInfo",
    "ScoreSummary",
    "ScoresDocument",
    "Sensitivity",
    "SignatureDocument",
    "Spent",
    "Stage",
    "Statement",
    "TaskAbout",
    "Test",
    "Thumbnail",
    "TruthCase",
    "Validity",
    "Verdict",
    "VerificationDocument",
    "write_schemas",
]

DOCUMENTS: tuple[type[Document], ...] = (
    ClaimDocument,
    LedgerDocument,
    AuditDocument,
    GameDocument,
    ScoresDocument,
    BoundDocument,
    BenchmarkDocument,
    EnvironmentDocument,
    CheckDocument,
    DoctorDocument,
    SignatureDocument,
    VerificationDocument,
    KeyDocument,
    FeaturesDocument,
)


def write_schemas(folder: Path, kinds: Sequence[type[Document]] = DOCUMENTS) -> None:
    """Write one `KIND.json` per document; a test keeps the committed files in step with the code."""
    for document in kinds:
        text = json.dumps(document.json_schema(), indent=2, ensure_ascii=False) + "\n"
        (folder / f"{document.named()}.json").write_text(text, encoding="utf-8")
