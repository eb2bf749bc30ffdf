"""Objectives and updates of each role: TDM with variants and rivals, TrajP-L."""
