"""Training methods: TDM with variants and rivals, and TrajP-L.

A method says which role is updated by which objective.
"""
