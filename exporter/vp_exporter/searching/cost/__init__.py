"""Latency of a plan."""
