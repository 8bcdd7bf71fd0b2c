"""Write the JSON Schema of every document that a command prints: `python -m dpaudit.cli.schemas`.

Documents that belong to one command live with it; only the command line may import them all.
"""

from pathlib import Path

import dpaudit
from attacks.bugs.benchmark import BugsDocument
from dpaudit import documents
from dpaudit.analysis.plan import PlanDocument
from reports.embedded import ReportDocument
from reports.formats import DisclosureDocument
from reports.sweep.document import SweepDocument

ALL: tuple[type[documents.Document], ...] = (
    *documents.DOCUMENTS,
    PlanDocument,
    ReportDocument,
    SweepDocument,
    DisclosureDocument,
    BugsDocument,
)
FOLDER = Path(dpaudit.__file__).parent / "schemas"

if __name__ == "__main__":
    documents.write_schemas(FOLDER, ALL)
