"""Membership inference: records whose membership a coin decided, model access in, one score a record out.

`game` draws the coins, `signals` asks a model once for everything that the cheap attacks need, `references` trains
reference models, `formulas` holds the published scores, `attacks` the table of attacks, `selection` decides which of
them may report a bound, `audit` puts it together.
"""
