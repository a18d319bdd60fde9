"""Error raised by the operators. Defined here because vp_kernels depends on neither vp_engines nor vp_exporter."""

from __future__ import annotations


class KernelError(ValueError):
    """An argument that the operator's kernel does not support; raised before any launch.

    Args:
        operator: e.g. "vp::attention".
        argument: Name in the operator's signature.
        found: Value or property found.
        expected: What is allowed.

    Examples:
        >>> from vp_kernels import KernelError
        >>> print(KernelError("vp::select", "k", "0", "1 .. 16"))
        vp::select: k is 0; expected 1 .. 16
    """

    def __init__(self, operator: str, argument: str, found: str, expected: str) -> None:
        super().__init__(f"{operator}: {argument} is {found}; expected {expected}")
        self.operator, self.argument, self.found, self.expected = operator, argument, found, expected
