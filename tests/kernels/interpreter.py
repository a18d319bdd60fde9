"""Patches for Triton's interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def complete_interpreter() -> None:
    """Fix three deficiencies of Triton 3.6's interpreter in this process, and save time.

    Its scalars are arrays of one element, which NumPy 2.4 does not accept as bounds of a range; it stores bf16 as
    uint16, and multiplies those as integers; and it truncates float32 to bf16, where a GPU rounds to nearest.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    create_dot, cast = builder.create_dot, builder.cast_impl

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        nearest = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(nearest.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    patch_lang, done = interpreter._patch_lang, set[int]()

    def patched_once(fn: Any) -> Any:
        """Skip patching triton.language again for each nested kernel function; the launch has done so."""
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules and modules <= done:
            return None  # only a launch undoes its changes
        scope = patch_lang(fn)
        restore = scope.restore

        def restored() -> None:
            done.clear()
            restore()

        scope.restore = restored
        done.update(modules)
        return scope

    interpreter._patch_lang = patched_once
    interpreter._patch_lang_tensor = with_index
    builder.create_dot, builder.cast_impl = dot, rounded
