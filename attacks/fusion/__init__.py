"""The token-fusion path: is it private, and where not?

Three separate questions, each decided by its own test:

- *isolation* (`isolation`, `sensitivity`): does one record move anything of another before clipping? Decides whether
  the training's eps is right.
- *noise* (`noise`): is the fusion noise a stream of its own? Decides what it may be used for.
- *release* (`release`, `masks`, `reconstruction`): what do tokens tell about their picture if they leave the trust
  boundary?

`verdicts` turns the answers into the rows of the truth table, `audit` runs all of it on a finished run.
"""
