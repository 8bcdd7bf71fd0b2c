"""Two correct trainings as their libraries teach them, under test through `under_test`: controls of the auditor."""

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dpaudit.claims import StepClaim
from trainers.adapters.under_test import hf_trainer, opacus_loop

Record = tuple[Tensor, Tensor]  # features (8,), class () int64

SIZE, BATCH, FEATURES, CLASSES = 40, 5, 8, 3
VOCABULARY, CLIP = 24, 0.5


def tabular_records() -> list[Record]:
    """A synthetic data set, always the same."""
    features = 2 * torch.randn(SIZE, FEATURES, generator=torch.Generator().manual_seed(571))
    return [(x, (x.sum() > 0).long() + (x[0] > 1).long()) for x in features]


def build(records: list[Record]) -> Any:
    """What a tutorial writes."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader

    model = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader: DataLoader[Record] = DataLoader(records, batch_size=BATCH)  # type: ignore[arg-type]
    return PrivacyEngine(accountant="rdp").make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )


def train(model: nn.Module, optimizer: Any, loader: Any) -> None:
    """An epoch."""
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def extreme_records() -> list[Record]:
    """Huge features with a wrong class, zeros."""
    ones = torch.ones(FEATURES)
    return [(1e4 * ones, torch.tensor(0)), (-1e4 * ones, torch.tensor(2)), (0 * ones, torch.tensor(1))]


opacus = opacus_loop(build, records=tabular_records, train=train, public_size=SIZE, extreme_records=extreme_records)


def texts() -> list[dict[str, list[int]]]:
    """Token sequences of different lengths, always the same."""
    generator = torch.Generator().manual_seed(5513)
    lengths = torch.randint(4, 10, (SIZE,), generator=generator).tolist()
    return [{"input_ids": torch.randint(VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


class DPTrainer(Trainer):  # type: ignore[misc]
    """DP-SGD, one sequence at a time, inside Hugging Face's training step.

    The Trainer seeds torch's global generator with `seed`, 42 by default: noise drawn from it would be public.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.secret = torch.Generator()
        self.secret.seed()

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(like.shape, generator=self.secret)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """`inputs["rows"]`: token ids of each sequence. Leaves the noisy mean in `.grad` for the optimiser."""
        model.train()
        trained = [value for value in model.parameters() if value.requires_grad]
        total = [torch.zeros_like(value) for value in trained]
        for ids in inputs["rows"]:
            loss = self.compute_loss(model, {"input_ids": ids[None], "labels": ids[None]})
            gradients = torch.autograd.grad(loss, trained)
            norm = torch.stack([value.square().sum() for value in gradients]).sum().sqrt()
            for value, gradient in zip(total, gradients, strict=True):
                value.add_(gradient, alpha=float(CLIP / norm.clamp(min=CLIP)))
        for parameter, value in zip(trained, total, strict=True):
            parameter.grad = (value + CLIP * self.noise(value)) / BATCH
        return torch.zeros(())


def make_trainer(rows: list[dict[str, list[int]]], kind: type[DPTrainer] = DPTrainer) -> Trainer:
    """A Llama of 4,000 parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(), learning_rate=1e-2, remove_unused_columns=False, report_to=[], use_cpu=True
    )
    return kind(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=rows,
        data_collator=lambda chosen: {"rows": [torch.tensor(row["input_ids"]) for row in chosen]},
    )


HUGGING_FACE_CLAIM = StepClaim("gaussian", CLIP, 1.0, "poisson", BATCH / SIZE, float(BATCH), "add-remove", "sequence")
hugging_face = hf_trainer(make_trainer, records=texts, claim=HUGGING_FACE_CLAIM)
