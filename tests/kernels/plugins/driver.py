"""A fake CUDA driver: kernels launched by plugins run in Triton's interpreter, on the given memory."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vp_kernels.launch import Variant

OPERATORS = ("attention", "gather_norm", "select", "merge_rows", "match_merge", "density_merge")
TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64, "i32": torch.int32}
SCALARS = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}
_ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
INVALID_VALUE = 1


@dataclass
class Launch:
    """One launch seen by the driver: the kernel's entry in the index."""

    entry: dict[str, Any]


class Driver:
    """The fake libcuda.so.1, loaded where plugins look for the real one.

    Args:
        library: Its path; loaded once per process.
        kernels: Folder that the plugins were built with.
    """

    def __init__(self, library: Path, kernels: Path) -> None:
        self.c = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.entries = _by_image(kernels)
        self.launches: list[Launch] = []
        self.memory: Callable[[], tuple[Tensor, ...]] = tuple
        self.trouble: list[str] = []
        self._callback = _ON_LAUNCH(self._launch)  # must stay alive
        self.c.fakeOnLaunch(self._callback)

    def reset(self) -> None:
        """Reset to the state of an H200 without launches; kernels stay loaded."""
        self.launches.clear()
        self.trouble.clear()
        self.c.fakeDevice(90)
        self.c.fakeFailure(0)
        self.c.fakeShared(227 << 10)

    def _launch(
        self, image: int, name: bytes, grid: Any, threads: int, shared: int, raised: int, stream: int, given: Any
    ) -> int:
        try:
            self._run(image, name.decode(), (grid[0], grid[1], grid[2]), threads, shared, raised, given)
        except Exception as error:
            self.trouble.append(f"{type(error).__name__}: {error}")
            return INVALID_VALUE
        return 0

    def _run(
        self, image: int, name: str, grid: tuple[int, int, int], threads: int, shared: int, raised: int, given: Any
    ) -> None:
        entry = self._entry(image)
        assert name == entry["entry"]
        assert (threads, shared) == (entry["threads"], entry["shared"]["dynamic"])
        assert raised == (shared if entry["shared"]["raise_limit"] else 0)
        variant = _variant(entry["operator"], entry["variant"])
        arguments: list[Any] = []
        for index, parameter in enumerate(entry["parameters"]):
            if parameter["hidden"]:
                assert ctypes.c_uint64.from_address(given[index]).value == 0
                continue
            dtype = parameter["dtype"]
            if dtype.startswith("*"):
                address = ctypes.c_uint64.from_address(given[index]).value
                assert address % parameter["divisible_by"] == 0
                arguments.append(self._tensor(address, TORCH[dtype[1:]]))
                continue
            value = SCALARS[dtype].from_address(given[index]).value
            assert dtype != "i32" or value % parameter["divisible_by"] == 0
            arguments.append(value)
        self.launches.append(Launch(entry))
        config = variant.config
        config.kernel[grid](*arguments, **config.constants)

    def _tensor(self, address: int, dtype: torch.dtype) -> Tensor:
        """The memory at an address up to the end of its tensor; null is a tensor without elements."""
        if address == 0 and any(memory.numel() == 0 for memory in self.memory()):
            return torch.empty(1, dtype=dtype)
        for memory in self.memory():
            start = memory.data_ptr()
            if start <= address < start + memory.nbytes:
                raw = memory.reshape(-1).view(torch.uint8)[address - start :]
                return raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        raise AssertionError(f"a pointer into none of the tensors that the plugin was given: {address:#x}")

    def _entry(self, image: int) -> dict[str, Any]:
        for size, entries in self.entries.items():
            found = entries.get(hashlib.sha256(ctypes.string_at(image, size)).hexdigest())
            if found is not None:
                return found
        raise AssertionError("a cubin that is not in the index")


def _by_image(kernels: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """Entries of an index by size and sha256 of their cubins; longest first, so that a prefix does not match."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for entry in json.loads((kernels / "index.json").read_text())["entries"]:
        found.setdefault(entry["cubin"]["size"], {})[entry["cubin"]["sha256"]] = entry
    return dict(sorted(found.items()))


@functools.cache
def _variants(operator: str) -> dict[str, Variant]:
    each: Iterator[Variant] = import_module(f"vp_kernels.{operator}.kernel").variants()
    return {variant.name: variant for variant in each}


def _variant(operator: str, name: str) -> Variant:
    return _variants(operator)[name]
