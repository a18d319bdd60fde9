"""Bundles on Ray Serve: replicas on one machine or many, behind one HTTP address."""
