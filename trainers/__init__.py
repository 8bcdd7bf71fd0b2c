"""Reference trainer: data, models, token reducers, gradient pruning and the training methods."""

import logging

# Where bitsandbytes is installed peft and transformers import it, and it warns of kernels that it could not fetch.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
