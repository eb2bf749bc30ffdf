"""Protocols, metrics and distances."""
