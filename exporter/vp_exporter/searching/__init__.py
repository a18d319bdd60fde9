"""Search: from calibration images and a budget to a plan (V-Pruner's three stages, and schedules for every reducer)."""
