"""Bundles on Ray Serve: replicas on one or more machines, behind one HTTP address."""
