"""Utilities shared by the whole exporter."""
