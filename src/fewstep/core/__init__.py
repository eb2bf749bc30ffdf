"""Schedules, predictions, time grids, solvers, guidance and rollouts: formulas on tensors."""
