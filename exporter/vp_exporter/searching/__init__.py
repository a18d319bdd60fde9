"""Search for a plan within a budget: V-Pruner's three stages, and schedules for every reducer."""
