"""What tests share: modules, problems, workers of several ranks, and a browser."""
