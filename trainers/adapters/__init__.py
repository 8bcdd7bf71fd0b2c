"""Trainers under test: each module offers factories `factory(records=None, *, seed, noise_seed=None)`."""
