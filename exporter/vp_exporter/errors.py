"""Errors of the exporter; the base and the exit codes are in vp_engines.errors."""

from __future__ import annotations

from vp_engines.errors import VpError


class PlanError(VpError):
    """A plan or mask is malformed, or does not fit the model."""


class UnsupportedModelError(VpError):
    """A model that we do not take apart; the message names the reason."""


class WeightsError(VpError):
    """Weights are missing, unreadable, unsafe or of another model."""


class DataError(VpError):
    """An image folder is missing, empty or unreadable."""


class SearchError(VpError):
    """A search cannot start or go on: its images, its budget, its losses or its checkpoint."""
