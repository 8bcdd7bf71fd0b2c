"""Lower bounds on eps: one bound a module, pure functions of counts, numpy and scipy only (never torch).

`steinke`, `mahloujifar`, `order_statistic` read one training run with fair, independent coins; `clopper_pearson`, `gdp`
and `bayes` read independent runs (or the samples of a mechanism); `guesses` turns scores into counts, `roc` describes
scores without a bound. docs/statistics.md says which assumption each makes and what it was measured to do.
"""
