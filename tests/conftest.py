"""Triton interprets the kernels of this process; whoever compiles them starts another (kernels/support.py).

Here and not in tests/kernels: Triton reads it when it is first imported, which a test of any folder may do.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
