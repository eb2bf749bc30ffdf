"""A student's card, weights and files: read, written, sampled, exported."""
