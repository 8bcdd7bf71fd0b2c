"""Membership inference: records whose membership a coin decided, model access in, one score a record out.

`members` draws the coins, `signals` asks a model once for everything that the cheap attacks need, `references` trains
reference models, `formulas` holds the published scores, `table` lists the attacks, `selection` decides which of them
may report a bound.
"""
