"""Exceptions of the exporter. The base class and the exit codes are in vp_engines.errors."""

from __future__ import annotations

from vp_engines.errors import VpError


class PlanError(VpError):
    """A plan or mask is malformed, or does not fit the model."""


class UnsupportedModelError(VpError):
    """The model is not supported; the message gives the reason."""


class WeightsError(VpError):
    """Weights are missing, unreadable, unsafe or for another model."""


class DataError(VpError):
    """An image folder is missing, empty or unreadable."""


class SearchError(VpError):
    """A search cannot start or continue, because of its images, budget, losses or checkpoint."""


def first_line(error: object) -> str:
    """First line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]
