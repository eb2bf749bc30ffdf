"""The one training loop, checkpoints, optimizers, memory."""
