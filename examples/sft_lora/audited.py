# What dpaudit needs to know of sft.py.
import sft

from dpaudit.claims import StepClaim
from dpaudit.under_test import hf_trainer

RATE = sft.BATCH / sft.SIZE
claim = StepClaim("gaussian", sft.CLIP, sft.SIGMA, "poisson", RATE, sft.BATCH, "add-remove", "text", sft.STEPS, 1e-5)
factory = hf_trainer(sft.make_trainer, records=sft.load_data, claim=claim)
