"""The Python door: what the shell does, in as few words. `import dpaudit` reaches its names; no package imports it.

It adds arrays, data frames, plots and reprs; everything that computes or judges is what the shell calls.
"""
