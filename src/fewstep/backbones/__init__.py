"""Pretrained models behind one protocol: diffusers families, checkpoints, your own network."""
