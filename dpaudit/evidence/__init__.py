"""Evidence against a claim: likelihoods of the claimed mechanism, e-values, power as played, anytime merging.

An e-value is a number >= 0 whose expectation is at most 1 while the claim holds. By Markov's inequality it exceeds
1 / alpha with probability at most alpha; averages of e-values with weights fixed beforehand are e-values, and products
of e-values of games with fresh coins form a test supermartingale (Ville's inequality). numpy and scipy only.
"""
