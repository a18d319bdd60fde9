"""What the interpreter of Triton lacks."""

from __future__ import annotations

from typing import Any

import numpy as np


def complete_interpreter() -> None:
    """Two gaps of Triton 3.6's interpreter, closed in this process (a GPU has neither).

    Its scalars are arrays of one element, which NumPy 2.4 no longer takes as the bounds of a range; it keeps bf16 as
    uint16, and multiplies those as whole numbers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.create_dot = dot
