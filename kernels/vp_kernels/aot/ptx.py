"""Parse the parts of a PTX text that a launcher depends on."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vp_kernels.aot.index import AotError

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_ENTRY = re.compile(r"\.visible\s+\.entry\s+([A-Za-z_$%][\w$]*)\s*\(([^)]*)\)([^{;]*)\{")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?(\.[a-z]+\d+)"  # type
    r"(?:\s+\.ptr(?:\s+\.(?:global|const|shared|local))?(?:\s+\.align\s+\d+)?)?"  # pointee
    r"\s+([A-Za-z_$%][\w$]*)"
)
_SHARED = re.compile(r"(\.extern\s+)?\.shared\s+(?:\.align\s+\d+\s+)?\.[a-z]+(\d+)\s+[\w$%]+\s*(?:\[(\d*)\])?\s*;")
# Directives that a launcher would have to honour; none of our kernels uses them.
_FOREIGN = (".explicitcluster", ".reqnctapercluster", ".maxclusterrank", ".blocksareclusters")


@dataclass(frozen=True)
class Ptx:
    """A PTX module with one kernel.

    Attributes:
        isa: PTX version, "8.7"; older drivers reject the text.
        target: "sm_80", "sm_90a", ...
        entry: Name of the kernel.
        parameters: PTX type of each parameter, in order.
        read: For each parameter, whether the body uses it.
        threads: Threads per block from .reqntid, else .maxntid; 0 if neither is given.
        static_shared: Shared memory that the text allocates, in bytes.
        dynamic_shared: Whether the kernel also uses dynamic shared memory.
    """

    isa: str
    target: str
    entry: str
    parameters: tuple[str, ...]
    read: tuple[bool, ...]
    threads: int
    static_shared: int
    dynamic_shared: bool


def parse(text: str) -> Ptx:
    """Parse the header of a PTX text.

    Raises:
        AotError: if there is not exactly one kernel, or it needs more than a plain launch.
    """
    text = _COMMENT.sub(" ", text)
    version = re.search(r"^\s*\.version\s+(\d+\.\d+)", text)
    target = re.search(r"\.target\s+(sm_\d+[af]?)\b([^\n]*)", text)
    if version is None or target is None:
        raise AotError("no .version and .target at its head; expected a PTX text")
    if target[2].strip():
        raise AotError(f".target has the options {target[2].strip()!r}; expected none")
    if not re.search(r"\.address_size\s+64\b", text):
        raise AotError("its address size is not 64 bits")
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1 or len(re.findall(r"\.entry\b", text)) != 1:
        raise AotError(f"{len(re.findall(r'[.]entry', text))} kernels in it; expected one, visible and with a body")
    entry = entries[0]
    directives, body = entry[3], text[entry.end() :]
    if found := [each for each in _FOREIGN if each in directives]:
        raise AotError(f"the kernel asks for {found[0]}; expected no cluster launch")
    names: list[str] = []
    types: list[str] = []
    for each in entry[2].split(",") if entry[2].strip() else []:
        parameter = _PARAMETER.fullmatch(each.strip())
        if parameter is None:
            raise AotError(f"parameter {len(names)} is {' '.join(each.split())!r}; expected one plain value")
        types.append(parameter[1])
        names.append(parameter[2])
    used = set(re.findall(r"[A-Za-z_$%][\w$]*", body))
    static, dynamic = _shared(text)
    return Ptx(
        version[1], target[1], entry[1], tuple(types), tuple(name in used for name in names), _threads(directives),
        static, dynamic,
    )  # fmt: skip


def _threads(directives: str) -> int:
    for name in (".reqntid", ".maxntid"):
        if found := re.search(re.escape(name) + r"\s+(\d+)((?:\s*,\s*\d+)*)", directives):
            product = int(found[1])
            for each in re.findall(r"\d+", found[2]):
                product *= int(each)
            return product
    return 0


def _shared(text: str) -> tuple[int, bool]:
    """Size in bytes of the static shared variables (without padding), and whether there is dynamic shared memory."""
    static, dynamic = 0, False
    for extern, bits, count in _SHARED.findall(text):
        if extern:
            dynamic = True
        else:
            static += int(bits) // 8 * int(count or 1)
    return static, dynamic


def cubin_has(data: bytes, entry: str) -> bool:
    """Whether the data is a CUDA ELF file that contains this kernel."""
    cuda_machine = 190
    is_elf = len(data) > 64 and data[:5] == b"\x7fELF\x02" and int.from_bytes(data[18:20], "little") == cuda_machine
    return is_elf and b"\0.text." + entry.encode() + b"\0" in data
