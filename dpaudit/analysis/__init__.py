"""From score arrays to tests: the claim test, the analysis of a score file, and planning. Never imports torch."""
