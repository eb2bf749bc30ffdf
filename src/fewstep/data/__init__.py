"""Prompts, images and trajectories that students learn from."""
