# What dpaudit needs to know of digits.py.
import digits as mine

from dpaudit.claims import StepClaim
from dpaudit.under_test import step_function

RATE, STEPS, SEEN = mine.BATCH / mine.SIZE, mine.STEPS, (mine, "noisy_mean")
claim = StepClaim("gaussian", mine.CLIP, mine.SIGMA, "poisson", RATE, mine.BATCH, "add-remove", "picture", STEPS, 1e-5)
factory = step_function(
    init=mine.start, step=mine.step, records=mine.load_data, claim=claim, released=SEEN, per_record_gradients=SEEN
)
