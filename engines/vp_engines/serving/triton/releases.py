"""ONNX Runtime version of each Triton Inference Server release, to tell which server can run a bundle.

Source: ORT version in build.py of github.com/triton-inference-server/server at the tag of each release (read on
2026-11-27). A container's number is the year and month of its release. Custom builds may differ.
"""

from __future__ import annotations

from typing import NamedTuple

from vp_engines.backends.base import version_tuple


class Release(NamedTuple):
    """A container by NVIDIA, its server version, and that server's ONNX Runtime."""

    container: str
    server: str
    onnxruntime: str


# Releases that changed the ONNX Runtime version.
RELEASES = tuple(
    Release(*row.split())
    for row in (
        "23.11 2.40 1.16.3",
        "24.03 2.44 1.17.2",
        "24.04 2.45 1.17.3",
        "24.05 2.46 1.18.0",
        "24.07 2.48 1.18.1",
        "24.08 2.49 1.19.0",
        "24.09 2.50 1.19.2",
        "24.12 2.53 1.20.1",
        "25.03 2.56 1.21.0",
        "25.05 2.58 1.22.0",
        "25.08 2.60 1.23.0",
        "25.10 2.62 1.23.1",
        "25.11 2.63 1.23.2",
        "26.02 2.66 1.24.1",
        "26.03 2.67 1.24.2",
        "26.04 2.68 1.24.4",
        "26.07 2.71 1.27.0",
    )
)


def least_release(onnxruntime: str) -> Release | None:
    """First release with ONNX Runtime `onnxruntime` or newer; None if no known release has it."""
    wanted = version_tuple(onnxruntime)
    return next((release for release in RELEASES if version_tuple(release.onnxruntime) >= wanted), None)


def server_needed(onnxruntime: str) -> str:
    """`least_release` in words."""
    release = least_release(onnxruntime)
    if release is None:
        last = RELEASES[-1]
        return (
            f"a server with ONNX Runtime {onnxruntime} or newer: newer than release {last.container}, "
            f"which has {last.onnxruntime}"
        )
    return (
        f"Triton Inference Server {release.server} (release {release.container}) or newer: "
        f"the model needs ONNX Runtime {onnxruntime}"
    )
