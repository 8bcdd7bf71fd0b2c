"""Reports: the VQA benchmark through lmms-eval, figures and the HTML report."""
