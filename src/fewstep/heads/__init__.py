"""TrajP-L: the shape that sampling trajectories share, and the head that corrects a step's direction along it."""
