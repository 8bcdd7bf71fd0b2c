"""Reference trainer: data, models, token reducers, gradient pruning and the training methods."""
