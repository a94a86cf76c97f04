"""The user's module: its loss, its batches, its weights, and what it takes to evaluate it without a trace."""
