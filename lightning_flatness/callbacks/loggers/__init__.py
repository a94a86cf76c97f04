"""Images, charts and hyperparameters in loggers, beside curves."""
