"""Reports, plots and image grids."""
