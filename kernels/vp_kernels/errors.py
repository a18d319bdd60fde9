"""What an operator says of input that it cannot take. Kept here because kernels know nothing of engines or exporter."""

from __future__ import annotations


class KernelError(ValueError):
    """An operator's argument is not what its kernel can run on; raised before any launch.

    Args:
        operator: e.g. "vp::attention".
        argument: its name in the operator's signature.
        found: what it is.
        expected: what is allowed.
    """

    def __init__(self, operator: str, argument: str, found: str, expected: str) -> None:
        super().__init__(f"{operator}: {argument} is {found}; expected {expected}")
        self.operator, self.argument, self.found, self.expected = operator, argument, found, expected
