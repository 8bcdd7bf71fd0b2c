"""Run folders as a real demo leaves them, built from the typed documents: a page must look right on these."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from attacks.fusion.verdicts import OWN, run_ledger
from dpaudit import checksums, verdict
from dpaudit.config import RunConfig, resolve
from dpaudit.documents import (
    AuditDocument,
    BenchmarkDocument,
    Check,
    CheckDocument,
    Claim,
    ClaimDocument,
    Control,
    EnvironmentDocument,
    EpsilonAt,
    FusionAudit,
    GameDocument,
    LedgerDocument,
    LedgerRow,
    MaskLeak,
    Metric,
    Reconstruction,
    ReleaseAudit,
    ReleasePair,
    RocPoint,
    RunInfo,
    ScoreSummary,
    Sensitivity,
    Spent,
    Test,
    Thumbnail,
    TruthCase,
    Validity,
)

COINS = "5f" * 32
KINDS = ("digit", "is-it", "parity", "greater", "where")
UNIT = "image (with all its questions)"


def claim(epsilon: float = 8.0) -> Claim:
    return Claim(
        epsilon=epsilon,
        delta=1e-5,
        relation="add-remove",
        unit=UNIT,
        noise_multiplier=1.519,
        max_grad_norm=1.0,
        sampling="poisson",
        sample_rate=256 / 1653,
        steps=194,
        expected_batch_size=256.0,
        candidates=1653,
        accountant="dp-accounting 0.6.0 PLD",
        curve=tuple(EpsilonAt(delta=d, epsilon=e) for d, e in ((1e-3, 5.78), (1e-4, 6.96), (1e-5, 8.0), (1e-6, 8.96))),
    )


def config(method: str) -> RunConfig:
    return resolve({"method": method, "canaries": {"count": 300}, "seed": 7, "training": {"epochs": 30.0}})


def ledger_rows(method: str) -> tuple[LedgerRow, ...]:
    if method == "non-private":
        return (
            LedgerRow(
                path="gradients",
                stage="gradients",
                status="UNACCOUNTED",
                explanation="Gradients of private records change the weights without noise.",
                evidence="method=non-private adds no noise",
            ),
        )
    rows = [
        LedgerRow(
            path="gradients",
            stage="gradients",
            status="accounted",
            explanation="Each image's gradient is clipped, summed and noised before anything else sees it.",
            evidence="Gaussian, sigma 1.519, C 1, Poisson q 0.1549, 194 steps: eps 8 at delta 1e-05",
        ),
        LedgerRow(
            path="answer vocabulary",
            stage="preprocessing",
            status="post-processing",
            explanation="The tokenizer is public; nothing is derived from private answers.",
            evidence="byte-level vocabulary shipped with the package",
        ),
    ]
    if method == "dual-priv":
        rows.insert(
            1,
            LedgerRow(
                path="token fusion",
                stage="token reduction",
                status="per-example preprocessing",
                explanation="Tokens of an image are pruned and fused from that image alone, before clipping.",
                evidence="isolation test: 0 of 6 stages moved when another record changed",
            ),
        )
        rows.insert(
            2,
            LedgerRow(
                path="gradient pruning",
                stage="gradient pruning",
                status="post-processing",
                explanation="Blocks are chosen by the noisy gradient.",
                evidence="80 % of 28 blocks are kept, by magnitude of the released gradient",
            ),
        )
    return tuple(rows)


def score_summary(name: str, gap: float, *, n: int = 150, seed: int = 0) -> ScoreSummary:
    generator = np.random.default_rng(seed)
    inside = generator.normal(gap, 1.0, n)
    outside = generator.normal(0.0, 1.0, n)
    edges = np.linspace(-4.0, 4.0 + gap, 25)
    roc = [RocPoint(fpr=0.0, tpr=0.0, tpr_low=0.0, tpr_high=0.1)]
    for threshold in np.sort(np.concatenate([inside, outside]))[::-2]:
        fpr, tpr = float((outside >= threshold).mean()), float((inside >= threshold).mean())
        roc.append(RocPoint(fpr=fpr, tpr=tpr, tpr_low=max(0.0, tpr - 0.11), tpr_high=min(1.0, tpr + 0.11)))
    auc = float((inside[:, None] > outside[None, :]).mean())
    return ScoreSummary(
        name=name,
        n_in=n,
        n_out=n,
        edges=tuple(float(edge) for edge in edges),
        counts_in=tuple(int(c) for c in np.histogram(inside, edges)[0]),
        counts_out=tuple(int(c) for c in np.histogram(outside, edges)[0]),
        roc=tuple(roc),
        auc=auc,
        auc_low=max(0.0, auc - 0.06),
        auc_high=min(1.0, auc + 0.06),
        tpr_at_fpr={"0.1": roc[len(roc) // 5], "0.01": RocPoint(fpr=0.01, tpr=0.02), "0.001": None},
    )


def sensitivity() -> tuple[Sensitivity, ...]:
    shared = {"max_grad_norm": 1.0, "bound": 1.0, "comparisons": 96, "how": "a saturated picture"}
    return (
        Sensitivity.model_validate({**shared, "relation": "add-remove", "largest": 1.0, "holds": True}),
        Sensitivity.model_validate({**shared, "relation": "zero-out", "largest": 1.31, "holds": False}),
    )


def cases() -> tuple[TruthCase, ...]:
    rows = (
        (OWN, True, "per-example preprocessing", None),
        ("tokens published with the paper's noise", False, None, "UNACCOUNTED"),
    )
    return tuple(
        TruthCase.model_validate(
            {"case": c, "applies": a, "training": t, "release": r, "decided_by": "isolation test", "evidence": "0 of 6"}
        )
        for c, a, t, r in rows
    )


def released() -> ReleaseAudit:
    pair = ReleasePair(
        name="two pictures of the run",
        what="fused tokens, noise sigma C / B",
        distance=3.2,
        std=0.5,
        mu=6.4,
        epsilon=41.2,
        draws=2000,
        mu_low=6.2,
        mu_high=6.6,
    )
    shared = {"released": "all tokens", "std": 0.0, "pictures": 64}
    quality = {"psnr": 17.3, "psnr_low": 16.9, "psnr_high": 17.7, "ssim": 0.61, "ssim_low": 0.58, "ssim_high": 0.64}
    return ReleaseAudit(
        delta=1e-5,
        tokens=25,
        noiseless=17,
        epsilon=float("inf"),
        statement="CLS and dominant tokens carry no noise, so eps is infinite.",
        pairs=(pair,),
        masks=MaskLeak(neighbours=64, flipped=40, low=0.5, high=0.74, pairs=100, different=100, identified=61),
        reconstructions=(Reconstruction.model_validate({**shared, **quality, "decoder": "ridge"}),),
        strip_png_base64=thumbnails()[0].png_base64,
        strip_caption="Public pictures and what was rebuilt of them.",
    )


def claim_test(**changes: object) -> Test:
    """The test of the claim in the canary game: it decides, and no control has earned it any power."""
    fields: dict[str, object] = {
        "name": "canaries: all kinds",
        "statistic": "loss of the base model minus loss",
        "bound": "f-dp",
        "assumes": "claimed-mechanism",
        "selection": "fixed: 60 top, 60 bottom",
        "confidence": 0.95,
        "delta": 1e-5,
        "n": 300,
        "guesses": 120,
        "correct": 66,
        "epsilon_lower": None,
        "ceiling": None,
        "p_value": 0.43,
        "statement": "chance of as many correct guesses if the claim holds",
        "e_value": 0.4,
        "share": 0.45,
    }
    return Test.model_validate(fields | changes)


def canary_game(method: str, **changes: object) -> GameDocument:
    """The canaries of the run's own weights."""
    caught = method == "non-private"
    bound = 3.41 if caught else 0.0 if method == "dp-sgd" else 0.12
    tests = [
        Test(
            name="canaries: all kinds",
            statistic="loss of the base model minus loss",
            bound="steinke",
            assumes="none",
            selection="fixed: 60 top, 60 bottom",
            confidence=0.95,
            delta=1e-5,
            n=300,
            guesses=120,
            correct=120 if caught else 66,
            epsilon_lower=bound,
            ceiling=3.41 if caught else 3.66,
            p_value=None,
        )
    ]
    if not caught:
        tests.append(claim_test())
    for kind in ("mislabelled", "noise", "new-token"):
        tests.append(
            Test(
                name=f"canaries: {kind}",
                statistic="loss of the base model minus loss",
                bound="steinke",
                assumes="none",
                selection="fixed: 20 top, 20 bottom",
                confidence=0.95,
                delta=1e-5,
                n=100,
                guesses=40,
                correct=38 if caught else 22,
                epsilon_lower=1.6 if caught else 0.0,
                ceiling=2.54,
                p_value=None if caught else 0.43,
                statement=None if caught else "chance of as many correct guesses if eps = 8 holds",
                decides=False,
            )
        )
    checks = (
        Check(
            name="coins",
            status="pass",
            measured="sha256 5f5f5f5f…",
            allowed="the hash in the first ledger event",
            explanation="The coins are the ones drawn before the first step.",
        ),
        Check(
            name="blind baseline",
            status="pass",
            measured="AUC 0.51, p = 0.38",
            allowed="p >= 0.001",
            explanation="A classifier that never sees the model can't tell members from others.",
        ),
    )
    fields: dict[str, object] = {
        "game": "canaries",
        "number": 1,
        "previous_sha256": None,
        "about": "weights",
        "claim": None if caught else claim(),
        "alternative": None if caught else "true sigma 30 % smaller than claimed",
        "coins_sha256": COINS,
        "alpha": 0.001,
        "tests": tuple(tests),
        "validity": Validity(sound=True, checks=checks),
        "scores": (
            score_summary("canaries: all kinds", 3.2 if caught else 0.2),
            score_summary("canaries: noise", 4.0 if caught else 0.1, n=50, seed=1),
        ),
        "gallery": thumbnails(),
    }
    return GameDocument.model_validate(fields | changes)


def token_game() -> GameDocument:
    check = Check(
        name="selection",
        status="pass",
        measured="0",
        allowed="0",
        explanation="No token of an image moved when another image changed.",
    )
    fusion = FusionAudit(
        training="per-example preprocessing",
        release="not released",
        reducer="visionzip",
        sensitivity=sensitivity(),
        released=released(),
        cases=cases(),
        checks=(check,),
    )
    shared = {"number": 2, "previous_sha256": None, "about": "weights", "coins_sha256": None, "alpha": 0.001}
    return GameDocument.model_validate({"game": "token path", "claim": claim(), "fusion": fusion, **shared})


def white_box_game(*, e_value: float = 0.5, power: float | None = 0.97, number: int = 2) -> GameDocument:
    """A twin's game: sigma, q, T and coins of its own."""
    theirs = claim().model_copy(update={"noise_multiplier": 1.198, "sample_rate": 0.119, "steps": 168})
    test = claim_test(
        name="white box: all canaries",
        bound="exact likelihood",
        guesses=None,
        correct=None,
        e_value=e_value,
        power=power,
        power_low=None if power is None else power - 0.02,
        control="liveness, noise level" if power is not None else "noise level: the channel is blurred",
    )
    within = claim_test(
        name="white box: all canaries",
        bound="exact likelihood",
        assumes="dp-sgd(q,T)",
        epsilon_lower=7.7,
        ceiling=9.9,
        e_value=None,
        p_value=None,
        decides=False,
    )
    control = Control(name="liveness", outcome="earned", measured="1.000 C", allowed="1 C", explanation="It arrives.")
    shared = {"number": number, "previous_sha256": None, "about": "procedure", "coins_sha256": "ab" * 32}
    return GameDocument.model_validate(
        {
            "game": "white-box",
            "claim": theirs,
            "alternative": "the true sigma is 10 % smaller than claimed",
            "alpha": 0.001,
            "tests": (test, within),
            "controls": (control,),
            "scores": (score_summary("white box", 1.4, seed=5),),
            **shared,
        }
    )


def chained(games: Sequence[GameDocument]) -> tuple[GameDocument, ...]:
    """The same games numbered and chained in this order."""
    done: list[GameDocument] = []
    for game in games:
        before = done[-1].sha256() if done else None
        done.append(game.model_copy(update={"number": len(done) + 1, "previous_sha256": before}))
    return tuple(done)


def games(method: str) -> tuple[GameDocument, ...]:
    own = (canary_game(method), token_game()) if method == "dual-priv" else (canary_game(method),)
    return chained(own)


def audit(method: str, played: Sequence[GameDocument] | None = None) -> AuditDocument:
    """What the judge makes of the games."""
    played = games(method) if played is None else played
    fusion = next((game.fusion for game in played if game.fusion is not None), None)
    return verdict.document(
        run=RunInfo(
            name=method,
            method=method,
            config_sha256=config(method).sha256(),
            coins_sha256=COINS,
            command=f"dpaudit audit runs/{method} --canaries",
        ),
        claim=None if method == "non-private" else claim(),
        alpha=0.001,
        confidence=0.95,
        games=played,
        ledger=(() if method == "non-private" else run_ledger(ledger_rows(method), fusion)) or ledger_rows(method),
    )


def write_audit(run: Path, method: str, played: Sequence[GameDocument] | None = None) -> AuditDocument:
    """Games, chained, and the audit.json that they give."""
    played = games(method) if played is None else chained(played)
    folder = run / "release" / "games"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for game in played:
        (folder / f"{game.name}.json").write_text(game.to_json())
    document = audit(method, played)
    (run / "release" / "audit.json").write_text(document.to_json())
    return document


def thumbnails() -> tuple[Thumbnail, ...]:
    generator = np.random.default_rng(3)
    items = []
    for index in range(4):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
        items.append(
            Thumbnail(
                caption=f"candidate {index}",
                kind="noise" if index % 2 else "new-token",
                png_base64=base64.b64encode(buffer.getvalue()).decode(),
                question="Which digit is this?",
                answer="<|spare_7|>",
            )
        )
    return tuple(items)


def _metric(value: float, n: int, pictures: int) -> Metric:
    half = 1.96 * (value * (1 - value) / pictures) ** 0.5
    return Metric(value=value, low=max(0.0, value - half), high=min(1.0, value + half), n=n, pictures=pictures)


def _scores(level: float) -> dict[str, Metric]:
    shifts = (-0.08, 0.06, 0.03, 0.02, -0.03)
    kinds = {
        f"exact_match/{kind}": _metric(min(0.995, level + s), 350, 350) for kind, s in zip(KINDS, shifts, strict=True)
    }
    return {"exact_match": _metric(level, 1750, 350), **kinds}


def benchmark(level: float) -> BenchmarkDocument:
    return BenchmarkDocument(
        tasks={"dpaudit_vqa": _scores(level)},
        base={"dpaudit_vqa": _scores(0.552)},
        majority={"dpaudit_vqa": _metric(0.421, 1750, 350)},
        lmms_eval_version="0.7.3",
        prompt="{question}",
        batch_size=128,
        precision="float32",
        device="cpu",
        sample_sha256={"dpaudit_vqa": "ab" * 32},
        seconds=11.2,
    )


def environment(method: str) -> EnvironmentDocument:
    return EnvironmentDocument(
        dpaudit="0.1.0",
        python="3.12.4",
        platform="Linux-6.1-x86_64",
        device="cpu (2 cores)",
        packages={"torch": "2.13.0", "transformers": "5.23.0", "opacus": "1.6.0", "dp-accounting": "0.6.0"},
        command=f"dpaudit train method={method} --canaries 300 --out runs/{method}",
    )


def write_run(
    parent: Path, method: str, *, name: str | None = None, with_audit: bool = True, with_benchmark: bool = True
) -> Path:
    """A run folder with everything in its release part."""
    folder = parent / (name or method)
    release = folder / "release"
    release.mkdir(parents=True)
    private = method == "non-private"
    own = None if private else claim()
    reasons = ("The method is non-private: no noise is added.",) if private else ()
    (release / "config.yaml").write_text(config(method).to_yaml())
    (release / "claim.json").write_text(ClaimDocument(claim=own, reasons=reasons).to_json())
    spent = Spent(steps_started=194, steps_planned=194, epsilon=None if private else 8.0, delta=1e-5)
    (release / "ledger.json").write_text(
        LedgerDocument(coins_sha256=COINS, rows=ledger_rows(method), spent=None if private else spent).to_json()
    )
    (release / "environment.json").write_text(environment(method).to_json())
    if with_audit:
        write_audit(folder, method)
    if with_benchmark:
        level = {"non-private": 0.942, "dp-sgd": 0.861, "dual-priv": 0.847}[method]
        (release / "benchmark.json").write_text(benchmark(level).to_json())
    return folder


def write_sums(release: Path) -> None:
    """The list of checksums, as a run has it."""
    files = [path for path in sorted(release.rglob("*")) if path.is_file() and path.name != checksums.SUMS]
    sums = {path.relative_to(release).as_posix(): checksums.digest(path.read_bytes()) for path in files}
    (release / checksums.SUMS).write_text(checksums.write(sums))


def write_three(parent: Path) -> list[Path]:
    """The three runs of the demo."""
    return [write_run(parent, method) for method in ("non-private", "dp-sgd", "dual-priv")]


def check_document() -> CheckDocument:
    """A step contract with every status in it."""
    rows = (
        ("influence of one unit", "pass", "0.98 C", "at most 1 C"),
        ("clipping per unit", "fail", "3.2 C", "at most 1 C"),
        ("resume", "not applicable", "the trainer has no save", ""),
    )
    checks = tuple(
        Check.model_validate(
            {
                "name": n,
                "status": s,
                "measured": m,
                "allowed": a,
                "explanation": "Clipping the batch instead of the unit.",
            }
        )
        for n, s, m, a in rows
    )
    return CheckDocument(verdict="fail", checks=checks)
