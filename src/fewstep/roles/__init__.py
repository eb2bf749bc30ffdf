"""Teacher, student and fake score: adapters of one network, or copies."""
