"""The training job of the command line: configuration, data, models, loop, checkpoints, metrics, report."""
