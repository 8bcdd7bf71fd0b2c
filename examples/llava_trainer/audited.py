# What dpaudit needs to know of llava.py.
import llava

from dpaudit.claims import StepClaim
from dpaudit.under_test import hf_trainer

RATE = llava.BATCH / llava.SIZE
claim = StepClaim(
    "gaussian", llava.CLIP, llava.SIGMA, "poisson", RATE, llava.BATCH, "add-remove", "picture", llava.STEPS, 1e-5
)
factory = hf_trainer(llava.make_trainer, records=llava.load_data, claim=claim)
