"""The page in a real browser: nothing leaves it, nothing is missing, nothing breaks out of its text."""

import json
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from reports.html import render
from reports.subjects import load_page
from tests.reports.browser import Page, find_chromium, open_browser
from tests.reports.fixtures import write_run, write_three
from tests.reports.hostile import HOSTILE, write_hostile_run
from tests.reports.sweep.fakes import write_sweep
from tests.reports.test_subjects import write_documents

CHROMIUM = find_chromium()
LOUD = "NO CHROMIUM: the report was NOT opened in a browser; install it with: apt-get install chromium"
if CHROMIUM is None:
    warnings.warn(LOUD, stacklevel=1)
AXE = sorted((Path(sys.prefix) / "npm").glob("axe-core-*/axe.min.js"))
NO_AXE = "NO AXE-CORE: accessibility was NOT checked by it; fetch it with: make npm"
if not AXE:
    warnings.warn(NO_AXE, stacklevel=1)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason=LOUD)]

WIDTHS = (375, 800, 1280)
# Texts of one drawing that cover each other by more than a hair, as "a | b" (what a reader would call an overlap).
OVERLAPS = """[...document.querySelectorAll('svg.figure')].flatMap(svg => {
  const t = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
  const bad = [];
  for (let i = 0; i < t.length; i++) for (let j = 0; j < i; j++) {
    const a = t[i][1], b = t[j][1];
    const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (w > 1 && h > 3) bad.push(t[i][0] + ' | ' + t[j][0]);
  }
  return bad; })"""
CUT = """[...document.querySelectorAll('svg.figure')].flatMap(svg => {
  const s = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()])
    .filter(([x, r]) => r.left < s.left - 2 || r.right > s.right + 2 || r.top < s.top - 2 || r.bottom > s.bottom + 2)
    .map(([x, r]) => x); })"""
CONTRAST = """(() => {
  const lum = c => { const v = c.map(x => { x /= 255; return x <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4; });
    return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const rgb = s => s.match(/[\\d.]+/g).map(Number);
  const back = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  const bad = [];
  const tags = 'p,li,td,th,dd,dt,h1,h2,h3,h4,small,span,a,summary,figcaption,caption';
  for (const e of document.querySelectorAll(tags)) {
    if (!e.textContent.trim() || !e.getClientRects().length) continue;
    const a = lum(rgb(getComputedStyle(e).color).slice(0, 3)), b = lum(back(e));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) bad.push(ratio.toFixed(2) + ' ' + e.tagName + ' ' + e.textContent.slice(0, 40));
  } return bad; })()"""


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    assert CHROMIUM is not None
    with open_browser(CHROMIUM) as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    path = folder / "report.html"
    path.write_text(render(load_page(write_three(folder / "runs")), title="Privacy audit report")[0])
    return path


def complaints(page: Page, start: int) -> list[str]:
    """Console messages, errors, CSP violations and requests other than the page itself."""
    found = []
    for event in page.events[start:]:
        method, params = event.get("method", ""), event.get("params", {})
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Audits.issueAdded"):
            found.append(f"{method} {json.dumps(params)[:300]}")
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith(("file:", "data:")):
            found.append(f"request {params['request']['url'][:200]}")
    return found


@pytest.mark.parametrize("scripts", [True, False])
def test_opens_without_a_word_and_without_a_request(page: Page, report: Path, scripts: bool) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
    start = len(page.events)
    page.view(1280)
    page.open(report)
    assert complaints(page, start) == []
    files = [
        event["params"]["request"]["url"]
        for event in page.events[start:]
        if event.get("method") == "Network.requestWillBeSent" and event["params"]["request"]["url"].startswith("file:")
    ]
    assert files == [report.resolve().as_uri()]
    assert page.evaluate("document.querySelectorAll('main section').length") == 11  # no curves without private parts
    page.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_instruments_see_faults(page: Page, report: Path, tmp_path: Path) -> None:
    """What the other tests rely on being empty is not empty on a page with faults."""
    faults = (
        "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x.png'><p id='pale'>pale words</p>"
        "<svg class='figure' viewBox='0 0 300 200'><text x='9' y='50'>one text</text><text x='12' y='52'>two</text>"
        "<text x='280' y='90'>cut off at the side</text></svg>"
    )
    path = tmp_path / "faulty.html"
    path.write_text(report.read_text().replace("<main>", f"<main>{faults}"))
    page.view(1280)
    start = len(page.events)
    page.open(path)
    seen = complaints(page, start)
    assert any("script-src" in text or "default-src" in text for text in seen) and any("img" in text for text in seen)
    assert page.evaluate("document.title") == "Privacy audit report"  # the page's own policy stopped the script
    assert len(page.evaluate(OVERLAPS)) == 1 and page.evaluate(CUT) == ["cut off at the side"]
    page.evaluate("document.getElementById('pale').style.color = '#bbbbbb'")
    assert len(page.evaluate(CONTRAST)) == 1
    path.write_text(path.read_text().replace("Content-Security-Policy", "X-None"))
    start = len(page.events)
    page.open(path)
    assert any(text.startswith("request http://127.0.0.1:9/") for text in complaints(page, start))
    assert page.evaluate("document.title") == "owned"


def test_every_figure_is_drawn_in_every_view(page: Page, report: Path) -> None:
    for width in WIDTHS:
        for dark in (False, True):
            page.view(width, dark=dark)
            page.open(report)
            boxes = page.evaluate(
                "[...document.querySelectorAll('svg.figure')].map(s => {const b = s.getBoundingClientRect();"
                "return [b.width, b.height, s.querySelectorAll('path,rect,use,line,circle,text').length]})"
            )
            # ledger diagrams and axes; evidence of two claims; trade-off, ROC and histogram of two games; frontier
            assert len(boxes) == 3 + 3 + 2 + 3 * 2 * 3 + 1
            assert all(w > 200 and h > 60 and shapes > 5 for w, h, shapes in boxes), (width, dark, boxes)
            assert page.evaluate("document.documentElement.scrollWidth") <= width  # no sideways scrolling of the page
            assert page.evaluate(OVERLAPS) == [] and page.evaluate(CUT) == [], width


def test_text_has_contrast_and_curves_have_colour_in_both_schemes(page: Page, report: Path) -> None:
    colours = []
    for dark in (False, True):
        page.view(1280, dark=dark)
        page.open(report)
        assert page.evaluate(CONTRAST) == []
        colours.append(
            page.evaluate(
                "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
                "...[...document.querySelectorAll('#audit svg.figure path')].map(p => getComputedStyle(p).stroke)]"
            )
        )
    light, dark_ones = colours
    assert light[0] == "rgb(255, 255, 255)" and dark_ones[0] != light[0] and dark_ones[1] != light[1]
    drawn = [(a, b) for a, b in zip(light[2:], dark_ones[2:], strict=True) if a != "none"]
    assert drawn and all(a != b for a, b in drawn)


def test_structure_for_screen_readers(page: Page, report: Path) -> None:
    page.view(1280)
    page.open(report)
    assert page.evaluate("document.documentElement.lang") == "en"
    for landmark in ("header", "nav", "main", "footer"):
        assert page.evaluate(f"document.querySelectorAll('{landmark}').length") == 1
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope]'))")
    assert page.evaluate("[...document.images].every(i => i.alt && i.naturalWidth > 0)")
    named = "s.getAttribute('aria-labelledby').split(' ').every(i => document.getElementById(i).textContent.length > 5)"
    assert page.evaluate(f"[...document.querySelectorAll('svg[role=img]')].every(s => {named})")
    assert page.evaluate(
        "(() => {const ids = [...document.querySelectorAll('[id]')].map(e => e.id);"
        "return ids.length === new Set(ids).size && [...document.querySelectorAll('a[href^=\"#\"]')]"
        ".every(a => document.getElementById(a.hash.slice(1)))})()"
    )
    assert page.evaluate(
        "[...document.querySelectorAll('use')].every(u => document.querySelector(u.getAttribute('href')))"
    )


def test_prints_light_and_whole(page: Page, report: Path) -> None:
    page.view(1280, dark=True)
    page.open(report)
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    pdf = page.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)["data"]
    assert len(pdf) > 100_000
    page.call("Emulation.setEmulatedMedia", media="")


def test_hostile_text_stays_text(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_hostile_run(tmp_path, "<img src=x onerror=alert(1)> \"'&")
    other = write_run(tmp_path, "dp-sgd")
    path = tmp_path / "hostile.html"
    title = HOSTILE[1]
    path.write_text(render(load_page([run, other]), title=title)[0], encoding="utf-8")
    start = len(page.events)
    for width in (1280, 375):
        page.view(width)
        page.open(path)
        assert complaints(page, start) == []
        assert page.evaluate("document.title").startswith("</script><img src=x")
        assert page.evaluate("document.scripts.length") == 2
        assert (
            page.evaluate("document.querySelectorAll('[onerror],[onload],[style],main style,iframe,object').length")
            == 0
        )
        assert page.evaluate("[...document.images].every(i => i.src.startsWith('data:image/png;base64,'))")
        assert page.evaluate("document.querySelectorAll('main section').length") == 11
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    monkeypatch.setattr("reports.html.SIZE_WANTED", 2_000_000)  # with its documents, which the text above makes large
    path.write_text(render(load_page([run]), title=title)[0], encoding="utf-8")
    page.open(path)
    embedded = json.loads(page.evaluate("document.getElementById('dpaudit-report').textContent"))
    said = {row["path"] for row in embedded["runs"][0]["documents"]["ledger"]["rows"]}
    assert said == set(HOSTILE)  # the machine-readable copy is exact


@pytest.mark.parametrize("with_audit", [True, False])
def test_missing_documents_are_stated(page: Page, tmp_path: Path, with_audit: bool) -> None:
    run = write_run(tmp_path, "dp-sgd", with_audit=with_audit, with_benchmark=not with_audit)
    path = tmp_path / "report.html"
    path.write_text(render(load_page([run]), title="One run")[0])
    start = len(page.events)
    page.view(800)
    page.open(path)
    assert complaints(page, start) == []
    text = page.evaluate("document.body.innerText")
    assert ("not been audited" in text) != with_audit
    assert ("No accuracy has been measured" in text) == with_audit


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, a sweep and bare documents on one page."""
    folder = tmp_path_factory.mktemp("everything")
    write_sweep(folder / "sweep")
    subjects = [*write_three(folder / "runs"), folder / "sweep", *write_documents(folder / "documents")]
    path = folder / "report.html"
    path.write_text(render(load_page(subjects), title="Everything", changes=(), against="old.html")[0])
    return path


@pytest.mark.skipif(not AXE, reason=NO_AXE)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (375, False)])
def test_axe_finds_nothing(page: Page, everything: Path, width: int, dark: bool) -> None:
    page.view(width, dark=dark)
    page.open(everything)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.evaluate(AXE[-1].read_text(encoding="utf-8") + "; 1")
    found = page.wait_for("axe.run(document, {resultTypes: ['violations']})")
    assert [(item["id"], node["html"][:160]) for item in found["violations"] for node in item["nodes"][:3]] == []
    # the instrument itself works: a picture without a text and a pale text are found
    page.evaluate(
        "document.querySelector('main').insertAdjacentHTML('afterbegin', '<img src=data:,><div role=button></div>')"
    )
    found = page.wait_for("axe.run(document, {resultTypes: ['violations']})")
    assert {"image-alt", "aria-command-name"} <= {item["id"] for item in found["violations"]}


@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_of_everything_fits(page: Page, everything: Path, width: int) -> None:
    start = len(page.events)
    for dark in (False, True):
        page.view(width, dark=dark)
        page.open(everything)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(OVERLAPS) == [] and page.evaluate(CUT) == []
        assert page.evaluate(CONTRAST) == []
    assert complaints(page, start) == []


def test_tables_sort_by_number_and_keyboard_where_there_is_javascript(page: Page, everything: Path) -> None:
    page.view(1280)
    page.open(everything)
    table = "document.querySelector('#glance [aria-label^=Sweep] table')"
    column = f"[...{table}.tBodies[0].rows].map(r => r.cells[4].firstChild.textContent.trim())"
    press = f"{table}.tHead.rows[0].cells[4].querySelector('button').click()"
    before = page.evaluate(column)
    page.evaluate(press)
    rising = [float(text.split()[0]) for text in page.evaluate(column)]
    assert rising == sorted(rising) and len(rising) == len(before)
    assert page.evaluate(f"{table}.tHead.rows[0].cells[4].getAttribute('aria-sort')") == "ascending"
    page.evaluate(press)
    assert [float(text.split()[0]) for text in page.evaluate(column)] == sorted(rising, reverse=True)
    assert page.evaluate(f"{table}.querySelectorAll('[aria-sort]').length") == 1
    assert page.evaluate("[...document.querySelectorAll('th button')].every(b => b.tabIndex === 0 && b.textContent)")


def test_without_javascript_nothing_is_missing_but_the_sorting(page: Page, everything: Path) -> None:
    texts = []
    for scripts in (True, False):
        page.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        page.view(1280)
        page.open(everything)
        texts.append(page.evaluate("document.querySelector('main').innerText.replace(/\\s+/g, ' ')"))
        assert (page.evaluate("document.querySelectorAll('th button').length") > 0) == scripts
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert texts[0] == texts[1]
