"""The training loop, checkpoints, optimizers and memory."""
