"""The model card of a run: `release/model/README.md`, as the Hugging Face hub reads it.

One part of the card is dpaudit's and stands between two marks: claim, verdict with the control that earned it, data,
accuracy and how to load, in the sentences of the page and from the same documents. What stands outside the marks, the
metadata above all, belongs to the owner and is written once. Nothing in dpaudit's part depends on where the run lies or
on a signature, which covers the card like every other file.
"""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from dpaudit import __version__, atomic, untrusted
from dpaudit.config import RunConfig
from dpaudit.errors import DpauditError, UsageError
from dpaudit.runs import MODEL_CARD, RunFolder
from reports import prose, utility
from reports.formats.disclosure import OWNER
from reports.formats.markdown import escape
from reports.glance import Glance, evidence_rows, glances
from reports.inputs import RunReport, load_runs
from reports.text import clean
from reports.vouched import SIGNATURE

PLACE = f"model/{MODEL_CARD}"
MOST = 1 << 18  # bytes of a card
BEGIN = "<!-- dpaudit {version}: written from the documents of the run; edits above the end mark are lost -->"
END = "<!-- dpaudit: end -->"
_BLOCK = re.compile(r"<!-- dpaudit ([^\s:]{1,40}): written from [^\n]*-->\n.*?\n<!-- dpaudit: end -->", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*")
LICENCE = "# license: for the owner to choose, an identifier of https://huggingface.co/docs/hub/repositories-licenses"


def card(run: RunReport, earlier: str | None = None) -> str:
    """The whole card; `earlier` gives what is the owner's in it. UsageError where its marks are gone."""
    own = _block(run)
    if earlier is None:
        open_items = ", ".join(name.replace("_", " ") for name in OWNER)
        return f"{_metadata(run)}\n\n{own}\n\n## From the owner\n\nTo be filled in: licence, {open_items}.\n"
    if len(_BLOCK.findall(earlier)) != 1:
        raise UsageError(
            f"{PLACE}: has not one part between the marks of dpaudit; accepted: the card as dpaudit wrote it, with "
            "text of your own outside of the marks, or no card"
        )
    return _BLOCK.sub(lambda _: own, earlier)


def renew(path: Path, log: Callable[[str], None] = lambda _: None) -> None:
    """Bring the card of the finished run in `path` up to date; says why where it leaves it as it is.

    Also says where a signature does not fit any more: whoever calls this has just written into the release.
    """
    run = RunFolder(path)
    try:
        with run.lock():
            if not run.finished:
                return
            (loaded,) = load_runs([path])
            _write(run.model / MODEL_CARD, loaded)
    except DpauditError as error:
        log(f"{path}: the model card was not renewed: {error}")
    if (run.release / SIGNATURE).exists():
        log(f"{path}: release/{SIGNATURE} is of the files as they were; sign again: dpaudit sign {path}")


def _write(place: Path, run: RunReport) -> None:
    earlier = read(place)
    made = card(run, earlier)
    if made != earlier:
        atomic.write_text(place, made)


def read(place: Path) -> str | None:
    """A card as it is; None where there is none. UsageError where it can't be read."""
    if not place.exists():
        return None
    try:
        return untrusted.read_text(place, MOST)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{PLACE}: can't be read ({type(error).__name__}); accepted: UTF-8 text") from error


def problem(folder: Path, run: RunReport) -> str | None:
    """What is wrong with the card of a release: dpaudit's part says something else than the documents give.

    A part by another version is not compared, since the wording may have changed. None also where there is no card.
    """
    text = read(folder / PLACE) if (folder / "config.yaml").exists() else None
    if text is None:
        return None
    found = list(_BLOCK.finditer(text))
    if len(found) == 1 and (found[0][1] != __version__ or found[0][0] == _block(run)):
        return None
    how = f"dpaudit report RUN --format card -o RUN/release/{PLACE}"
    return f"{PLACE} does not say what the documents give; renew it: {how}"


def _metadata(run: RunReport) -> str:
    """YAML front matter: what is known; the licence is the owner's."""
    base = run.config.model.path if run.config is not None else None
    tree: dict[str, object] = {"library_name": "peft", "pipeline_tag": "image-text-to-text"}
    if base is not None and _HUB_ID.fullmatch(base):
        tree = {"base_model": base, **tree}
    tree["tags"] = [
        word for word in ("lora", "differential-privacy", "dpaudit", run.method) if _FILE_NAME.fullmatch(word)
    ]
    data = run.config.data.name if run.config is not None else None
    if data is not None and _HUB_ID.fullmatch(data):
        tree["datasets"] = [data]
    note = "" if "base_model" in tree else "# base_model: not a model of the hub; see below\n"
    return f"---\n{yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)}{note}{LICENCE}\n---"


def _block(run: RunReport) -> str:
    table = next(iter(utility.tables([run])), None)
    (shown,) = glances([run], table)
    parts = [
        BEGIN.format(version=__version__),
        f"# LoRA adapter of {escape(_base_name(run.config))}, fine-tuned with {escape(run.method)}",
        *_claim(run, shown),
        *_verdict(run, shown),
        *_data(run),
        *_accuracy(table, shown),
        *_loading(run),
        f"_{prose.LIMIT}_",
        END,
    ]
    return "\n\n".join(parts[:-1]) + f"\n{parts[-1]}"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {escape(line, 900)}" for line in lines)


def _claim(run: RunReport, shown: Glance) -> list[str]:
    said = [escape(text, 2000) for text in prose.claim_paragraphs(run)]
    parts = ["## Privacy claim", *said]
    if run.claim is not None:
        parts += [_bullets([f"Protected: {line}" for line in shown.protects])]
        parts += ["Not covered:", _bullets(prose.not_covered(run))]
    return parts


def _verdict(run: RunReport, shown: Glance) -> list[str]:
    word = run.verdict.upper() if run.verdict is not None else "NOT AUDITED"
    parts = ["## Verdict of the audit", f"**{word}.** {escape(shown.lead, 400)}"]
    lines = [f"Tested: {line}" for line in shown.tested] if run.audit is not None else []
    lines += [f"Reason: {clean(reason, 600)}" for reason in (run.audit.reasons if run.audit is not None else ())]
    lines += [f"{row.text}: eps {row.short}" for row in evidence_rows(run) if row.kind != "claim"]
    lines += [f"Conclusion: {line}" for line in shown.conclude] if run.audit is not None else []
    parts += [_bullets(lines)] if lines else []
    return [*parts, _who_vouches(run)]


def _who_vouches(run: RunReport) -> str:
    audited = next((file.sha256 for file in run.files if file.name == "audit.json"), None)
    where = f"`../audit.json` (SHA-256 `{audited}`)" if audited is not None else "none yet: `dpaudit audit RUN`"
    return (
        f"Audit: {where}. Who vouches: this card is a statement of the owner. Where `../{SIGNATURE}` lies beside it, "
        f"`dpaudit verify RUN --key SIGNER.pub` says whose key signed these files. Publish the folder above this one "
        "(`release/`) with the model, so that others can check."
    )


def _data(run: RunReport) -> list[str]:
    if run.config is None:
        return []
    data = run.config.data
    if data.path is not None:
        source = f"a local data set “{clean(data.path, 80)}” ({clean(data.train or '', 80)})"
    elif data.name in (None, "digits"):
        source = "the handwritten digits that dpaudit ships"
    else:
        source = f"“{clean(data.name or '', 80)}” of the Hugging Face hub"
    lines = [f"Fine-tuned on {source}."]
    if run.claim is not None and run.claim.candidates is not None:
        lines.append(f"{run.claim.candidates:,} candidate records, canaries included; this number is public.")
    if run.config.canaries.count:
        lines.append(f"{run.config.canaries.count} canaries were candidates; about half of them were trained on.")
    if run.claim_document is not None and not run.claim_document.releasable:
        lines.append("Not for release: " + " ".join(clean(reason, 300) for reason in run.claim_document.reasons))
    return ["## Data", _bullets(lines)]


def _accuracy(table: utility.TaskTable | None, shown: Glance) -> list[str]:
    first, *others = shown.accuracy
    if table is not None:
        first = f"{clean(table.task, 80)}, {table.headline.replace('_', ' ')}: {first}"
    return ["## Accuracy", _bullets([first, *others])]


def _base_name(config: RunConfig | None) -> str:
    base = config.model.path if config is not None else None
    return "the compact reference model of dpaudit" if base is None else clean(base, 120)


def _loading(run: RunReport) -> list[str]:
    """Python that runs, with the base where it can be named."""
    if run.config is None:
        return []
    base = run.config.model.path
    named = "from trainers.vlm import REFERENCE\n\nBASE = str(REFERENCE)"
    if base is not None:
        named = f'BASE = "{base if _FILE_NAME.fullmatch(base) else "BASE"}"  # the checkpoint it was fine-tuned from'
    dtype = "" if run.config.model.precision == "float32" else f', dtype="{run.config.model.precision}"'
    parts = [
        "## How to load",
        "With PEFT (all visual tokens):",
        f"```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForImageTextToText\n{named}\n"
        'ADAPTER = "release/model"  # this folder, or its name on the hub\n'
        f"base = AutoModelForImageTextToText.from_pretrained(BASE{dtype})\n"
        "model = PeftModel.from_pretrained(base, ADAPTER).eval()\n```",
    ]
    return [*parts, _tokens(run.config), "```python\n" + "\n".join(_with_dpaudit(run.config)) + "\n```"]


def _with_dpaudit(config: RunConfig) -> list[str]:
    """The lines that load the adapter and ask a question, with the tokens that it was trained on."""
    reducer = config.reducer
    ask = [
        'picture = np.asarray(Image.open("picture.png").convert("RGB"))',
        'print(vlm.answer([picture], ["Question?"]))',
    ]
    first = ["from pathlib import Path", "", "import numpy as np", "from PIL import Image", ""]
    if config.fusion.release != "none":  # clipping and shrinking of tokens belong to the model
        loading = ["from dpaudit.runs import RunFolder", "from trainers.run import load_model", ""]
        return [*first, *loading, 'vlm = load_model(RunFolder.open(Path("RUN")))', *ask]
    given = "" if config.model.precision == "float32" else f', precision="{config.model.precision}"'
    if reducer.name == "none":
        loading = ["from trainers.vlm import VisionLanguageModel", "", f"vlm = VisionLanguageModel.load(BASE{given})"]
    else:
        loading = [
            "from dpaudit.config import ReducerConfig",
            "from trainers.vlm import VisionLanguageModel",
            "",
            f"vlm = VisionLanguageModel.load(BASE{given})",
            f'vlm.set_reducer(ReducerConfig(name="{reducer.name}", keep={reducer.keep}, fuse={reducer.fuse}, '
            f"layer={reducer.layer}))",
        ]
    return [*first, *loading, "vlm.load_adapter(Path(ADAPTER))", *ask]


def _tokens(config: RunConfig) -> str:
    reducer = config.reducer
    if reducer.name == "none":
        return "It was trained on all visual tokens. With dpaudit, which also builds the prompt:"
    return (
        f"It was trained on reduced visual tokens ({reducer.name}, {reducer.keep} kept, {reducer.fuse} fused), so its "
        "answers differ when it sees all of them. To reduce tokens as in training:"
    )
