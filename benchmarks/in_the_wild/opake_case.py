"""Opake: its `DPTrainer` on a small GPT-2.

The trainer's own `training_step` makes the steps, on batches of its own collate function; its context is set up as
`train()` does it. Noise follows from TrainingArguments.seed: drawn here from torch's generator, or left at its default
of 42 with SEED=default.
"""

import os
import tempfile
import warnings

import numpy as np
import torch
from datasets import Dataset
from opake.transformers.trainer import DPTrainer, TrainingArguments
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

SIZE, BATCH, STEPS, CLIP, SIGMA, LENGTH, WORDS = 100, 10, 40, 1.0, 0.8, 8, 64
warnings.filterwarnings("ignore")


def load_data():
    drawn = np.random.default_rng(0).integers(0, WORDS, (SIZE, LENGTH))
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in drawn]


class Seen(TrainerCallback):
    """Keeps what the optimizer is given."""

    noisy = None

    def on_pre_optimizer_step(self, args, state, control, grads=None, **kwargs):
        self.noisy = {name: value.detach().clone() for name, value in grads.items()}


class Loop:
    """A model, and from the first step on its DPTrainer."""

    def __init__(self):
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": WORDS}
        config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        self.model, self.seen, self.trainer = GPT2LMHeadModel(config), Seen(), None

    def begin(self):
        seed = {} if os.environ.get("SEED") == "default" else {"seed": int(torch.randint(2**31, ()))}
        arguments = TrainingArguments(
            output_dir=tempfile.gettempdir(),
            privacy_noise_multiplier=SIGMA,
            max_grad_norm=CLIP,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **seed,
        )
        data = Dataset.from_list(load_data())
        self.trainer = DPTrainer(model=self.model, args=arguments, train_dataset=data, callbacks=[self.seen])
        self.trainer._ctx = self.trainer._setup_training()
        self.collate = self.trainer.get_train_dataloader().collate_fn

    def parameters(self):
        if self.trainer is None:
            return dict(self.model.named_parameters())
        return self.trainer._ctx.trainable_params


def step(loop, batch):
    if loop.trainer is None:
        loop.begin()
    loop.trainer.training_step(loop.model, loop.collate(batch))
    return loop


claim = StepClaim("gaussian", CLIP, SIGMA, "poisson", BATCH / SIZE, BATCH, "add-remove", "text", STEPS, 1e-5)
factory = step_function(
    init=lambda seed: Loop(),
    step=step,
    records=load_data,
    claim=claim,
    parameters=Loop.parameters,
    released=lambda loop: loop.seen.noisy,
)
