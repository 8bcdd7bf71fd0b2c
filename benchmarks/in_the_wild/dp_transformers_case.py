"""The pattern of dp-transformers' OpacusDPTrainer with the transformers of today: GradSampleModule around the model,
Opacus' DPOptimizer in `create_optimizer`, gradients zeroed by a callback, batches from a shuffled sampler.

Its package asks for transformers before 5 (its `training_step` has the signature of 4.45), so the pattern is written
out here; sampling is claimed as what its accountant is told (Poisson); with CLAIM=shuffle as what its sampler draws.
"""

import os
import tempfile
import warnings

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch.utils.data import DataLoader, RandomSampler
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from dpaudit.claims import StepClaim
from dpaudit.under_test import hf_trainer

SIZE, BATCH, STEPS, CLIP, SIGMA, LENGTH, WORDS = 60, 6, 20, 1.0, 0.8, 8, 64
warnings.filterwarnings("ignore")


def load_data():
    drawn = np.random.default_rng(0).integers(0, WORDS, (SIZE, LENGTH))
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in drawn]


def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64).reshape(-1, LENGTH)
    positions = torch.arange(LENGTH).repeat(len(rows), 1)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}


class ZeroGrad(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.zero_grad()


class OpacusDPTrainer(Trainer):
    def __init__(self, model, **given):
        super().__init__(model=GradSampleModule(model), callbacks=[ZeroGrad()], **given)

    def create_optimizer(self, *given):
        super().create_optimizer(*given)
        self.optimizer = DPOptimizer(
            optimizer=self.optimizer, noise_multiplier=SIGMA, max_grad_norm=CLIP, expected_batch_size=BATCH
        )
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()

    def get_train_dataloader(self):
        sampler = RandomSampler(self.train_dataset)
        return DataLoader(self.train_dataset, batch_size=BATCH, sampler=sampler, collate_fn=self.data_collator)


def make_trainer(rows):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LENGTH, "vocab_size": WORDS}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config.tie_word_embeddings = False
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        report_to="none",
        max_steps=STEPS,
    )
    return OpacusDPTrainer(GPT2LMHeadModel(config), args=arguments, train_dataset=rows, data_collator=collate)


SAMPLING = os.environ.get("CLAIM", "poisson")
claim = StepClaim("gaussian", CLIP, SIGMA, SAMPLING, BATCH / SIZE, BATCH, "add-remove", "text", STEPS, 1e-5)
factory = hf_trainer(make_trainer, records=load_data, claim=claim)
