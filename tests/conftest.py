"""Triton interprets the kernels of this process; whoever compiles them starts another (kernels/support.py).

Here and not in tests/kernels: Triton reads it when it is first imported, which a test of any folder may do.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes says how busy the machine is: no deadline, and slow drawing is no failure.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def compilable_paths() -> Iterator[None]:
    """torch.compile works where the temporary folder or torch itself lies below a folder with a space in its name; the
    aoti backend sees to that itself."""
    if not any(character.isspace() for character in tempfile.gettempdir() + sys.prefix):
        yield
        return
    import torch._inductor.config as config

    from vp_engines.backends.aoti import _paths_without_space

    with _paths_without_space():
        config.cpp_cache_precompile_headers = False
        yield
