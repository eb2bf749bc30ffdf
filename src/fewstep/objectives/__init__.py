"""Losses and divergences, one formula of the papers each."""
