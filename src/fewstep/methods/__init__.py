"""Who is updated by which objective: TDM, its variants, its rivals, TrajP-L."""
