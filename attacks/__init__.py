"""Attacks: canaries, membership inference, and the audit of the token-fusion path."""
