"""Blind votes of people: pairs of images, answers and their count."""
