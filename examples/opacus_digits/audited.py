# What dpaudit needs to know of digits.py.
import digits

from dpaudit.under_test import opacus_loop

factory = opacus_loop(
    digits.build,
    records=digits.load_data,
    train=digits.train,
    steps=digits.EPOCHS * digits.SIZE // digits.BATCH,
    public_size=digits.SIZE,
)
