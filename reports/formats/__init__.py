"""The same page for machines: JUnit XML, SARIF, a Markdown summary, and a disclosure record for registries."""

from reports.formats.disclosure import DisclosureDocument, disclosure
from reports.formats.junit import junit
from reports.formats.markdown import markdown
from reports.formats.sarif import sarif

__all__ = ["DisclosureDocument", "disclosure", "junit", "markdown", "sarif"]
