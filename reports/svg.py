"""Matplotlib figures as small inline SVG that follows the page's colours.

Matplotlib writes one style attribute per element, ids that collide when several figures share a page, and fixed
colours. Here every distinct style becomes a class of one shared style sheet (so that the page's CSP can forbid inline
styles), ids get the figure's name as a prefix, and the palette below becomes CSS variables (so that figures turn dark
with the page). The same figure gives the same bytes.
"""

import io
import re
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Stand-ins that matplotlib draws with -> variables of templates/style.css. The values are unlikely on purpose: they
# name a role, and the real colours (Okabe-Ito, one set for light and one for dark) live in the style sheet.
PALETTE = {
    "ink": "#010203",
    "soft": "#040506",
    "grid": "#070809",
    "paper": "#0a0b0c",
    "in": "#0d0e0f",
    "out": "#101112",
    "s1": "#131415",
    "s2": "#161718",
    "s3": "#191a1b",
    "s4": "#1c1d1e",
    "s5": "#1f2021",
    "s6": "#222324",
}
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dpaudit",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
    "axes.edgecolor": PALETTE["soft"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": PALETTE["grid"],
    "grid.linewidth": 0.6,
    "text.color": PALETTE["ink"],
    "text.parse_math": False,
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}
_KEPT = {"clip-path", "class", "d", "x", "y", "width", "height", "transform", "href", "viewBox", "id", "cx", "cy", "r"}
_NUMBER = re.compile(r"-?\d+\.\d+")


@dataclass
class StyleSheet:
    """Distinct declarations -> class names, in order of first use."""

    classes: dict[str, str] = field(default_factory=dict)

    def name(self, declarations: str) -> str:
        return self.classes.setdefault(declarations, f"v{len(self.classes)}")

    def css(self) -> str:
        return "\n".join(f".{name}{{{text}}}" for text, name in self.classes.items())


def inline_svg(figure: Figure, *, key: str, title: str, description: str, styles: StyleSheet) -> Markup:
    """`figure` as an accessible `<svg role="img">` for a page; `key` must be unique on that page."""
    buffer = io.StringIO()
    with rc_context({**SETTINGS, "svg.hashsalt": key}):
        FigureCanvasSVG(figure).print_svg(  # type: ignore[no-untyped-call]
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    root = ElementTree.fromstring(buffer.getvalue())
    used = set(re.findall(r"#([\w.-]+)", buffer.getvalue()))
    body = "".join(_markup(child, key, used, styles) for child in root)
    width, height = (float(number) for number in str(root.get("viewBox")).split()[2:])
    return Markup(
        f'<svg role="img" class="figure" aria-labelledby="{key}-t {key}-d" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">'
        f'<title id="{key}-t">{escape(title)}</title><desc id="{key}-d">{escape(description)}</desc>{body}</svg>'
    )


def _markup(element: ElementTree.Element, key: str, used: set[str], styles: StyleSheet) -> str:
    tag = element.tag.rpartition("}")[2]
    if tag in ("metadata", "style", "title", "desc"):
        return ""
    inner = "".join(_markup(child, key, used, styles) for child in element)
    if tag == "defs" and not inner:
        return ""
    text = escape((element.text or "").strip()) if tag in ("text", "tspan") else ""
    attributes = _attributes(element, tag, key, used, styles)
    if tag == "g" and not attributes:
        return inner
    if tag == "g" and not inner:
        return ""
    return f"<{tag}{attributes}>{text}{inner}</{tag}>" if inner or text else f"<{tag}{attributes}/>"


def _attributes(element: ElementTree.Element, tag: str, key: str, used: set[str], styles: StyleSheet) -> str:
    parts = []
    for name, value in element.attrib.items():
        name = name.rpartition("}")[2]
        if name == "style":
            declarations = _declarations(value)
            if declarations:
                parts.append(f'class="{styles.name(declarations)}"')
            continue
        if name not in _KEPT or (name == "id" and value not in used) or value.startswith("rotate(-0 "):
            continue
        if name == "id":
            value = f"{key}-{value}"
        elif name == "href":
            value = f"#{key}-{value.removeprefix('#')}"
        elif name == "clip-path":
            value = value.replace("url(#", f"url(#{key}-")
        else:
            value = _NUMBER.sub(lambda match: f"{float(match.group()):.1f}".removesuffix(".0"), value)
            value = " ".join(value.split())
            if name == "d" and not re.search("[CQSTA]", value):
                value = value.replace(" L ", " ")  # pairs after M are lines: the same path in fewer bytes
        parts.append(f'{name}="{escape(value)}"')
    return "".join(f" {part}" for part in parts)


def _declarations(style: str) -> str:
    """A style attribute as sorted declarations: page font, palette as variables, matplotlib's defaults dropped."""
    kept = []
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if not name or name in ("stroke-linejoin", "stroke-linecap", "stroke-dashoffset", "font-family"):
            continue
        if name == "font":
            size = re.search(r"([\d.]+)px", value)
            name, value = "font-size", f"{size.group(1)}px" if size else "10px"
        for role, stand_in in PALETTE.items():
            value = value.replace(stand_in, f"var(--{role})")
        kept.append(f"{name}:{value}")
    return ";".join(sorted(kept))
