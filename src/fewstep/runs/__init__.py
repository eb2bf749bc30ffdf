"""Recipes, preparation, previews and what a run leaves."""
