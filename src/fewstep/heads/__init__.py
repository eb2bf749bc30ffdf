"""The curve that trajectories share, and heads that correct a step's direction."""
