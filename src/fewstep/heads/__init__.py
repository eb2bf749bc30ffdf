"""TrajP-L: the shape of sampling trajectories, and direction heads.

A direction head corrects a step's direction along the shape that sampling trajectories share.
"""
