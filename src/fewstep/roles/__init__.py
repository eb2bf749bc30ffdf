"""Teacher, student and fake score as adapters of one network, or as copies."""
