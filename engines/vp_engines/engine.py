"""`load(path)`: open a bundle as an engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from vp_engines.backends import ENGINES, get_backend
from vp_engines.backends.base import Backend, Runner, RunOptions, TensorSpec
from vp_engines.backends.recording import RecordedRun
from vp_engines.bundle import read_bundle
from vp_engines.errors import BundleError, BundleIncompatibleError, EngineUnavailableError, InputError
from vp_engines.manifest import VARIANT_FOLDERS, Manifest

if TYPE_CHECKING:
    import numpy as np

    from vp_engines.preprocess import ImageLike


class Engine:
    """A loaded bundle. Thread-safe; `close` waits for runs in progress.

    Pickled as the path of its bundle: another process (a DataLoader worker, multiprocessing, Ray) opens the bundle
    again, and raises an error if it has changed.

    Attributes:
        manifest: Manifest of the bundle.
        variant: "reduced" or "dense".

    Examples:
        >>> import vp_engines
        >>> with vp_engines.load("tiny.vpe", threads=1) as engine:
        ...     batch = engine.preprocess(["cat.jpg"])
        ...     print(batch.shape, engine.run(batch)["logits"].shape)
        (1, 3, 64, 64) (1, 3)
    """

    def __init__(self, manifest: Manifest, variant: str, runner: Runner, reopen: tuple[Any, ...] | None = None) -> None:
        self.manifest = manifest
        self.variant = variant
        self._runner = runner
        self._reopen = reopen  # arguments of `_open_again`
        self._running = 0
        self._closed = False
        self._idle = threading.Condition()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the inputs."""
        return self._runner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes of the outputs."""
        return self._runner.outputs

    def preprocess(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Prepare images for `run`: float32 [batch, 3, height, width]. See `vp_engines.preprocess`.

        Raises:
            InputError: if an image cannot be read; names the image.
        """
        from vp_engines.preprocess import preprocess

        return preprocess(images, self.manifest.preprocessing)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run one batch.

        Args:
            images: float32 [batch, 3, height, width], preprocessed as the manifest states.

        Returns:
            One float32 array per output name, axis 0 the batch.

        Raises:
            InputError: if the dtype or shape is wrong, the engine was not built for this batch size, or it is closed.
        """
        with self._idle:
            if self._closed:
                raise InputError("this engine is closed", fix="load the bundle again")
            self._running += 1
        try:
            self._check_batch(images)
            return self._runner.run(images)
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _check_batch(self, images: np.ndarray) -> None:
        sizes = self.manifest.engine.batch
        shape: tuple[int, ...] = getattr(images, "shape", ())
        if sizes is not None and len(shape) == 4 and not sizes.min <= shape[0] <= sizes.max:
            raise InputError(
                f"the batch has {shape[0]} images",
                expected=f"{sizes.min} to {sizes.max}",
                fix="split it, or export with another `max_batch`",
            )

    def recorded(self) -> list[RecordedRun]:
        """Profile of every run since `load(..., profile=True)`, by the engine's own profiler. Stops the recording.

        Raises:
            InputError: if loaded without `profile`, closed, or called before.
            EngineUnavailableError: if the engine has no supported profiler.
        """
        return self._runner.recorded()

    def close(self) -> None:
        """Release the engine after runs in progress finish. May be called more than once."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: self._running == 0)
        self._runner.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._reopen is None or self._closed:
            raise InputError(
                "a closed engine cannot be pickled" if self._closed else "this engine is of no bundle",
                expected="an open engine of vp_engines.load",
            )
        return _open_again, self._reopen

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        engine = self.manifest.engine
        return f"<Engine {self.manifest.name!r} {self.variant}, {engine.name} {engine.precision}>"


def load(
    path: str | Path,
    *,
    variant: Literal["reduced", "dense"] = "reduced",
    device: Literal["cpu", "cuda"] | None = None,
    threads: int | None = None,
    profile: bool = False,
) -> Engine:
    """Open a bundle: verify every file, check that its engine can run here, and only then deserialise it.

    Args:
        path: The folder NAME.vpe.
        variant: The reduced model, or the dense one that is included for comparison.
        device: None for what the bundle was built for.
        threads: CPU threads per run; None for the runtime's default.
        profile: Record every run with the engine's own profiler, for `Engine.recorded`; slightly slower.

    Raises:
        InputError: if an argument is invalid.
        BundleError: if there is no bundle, or it lacks the variant.
        BundleCorruptError: if a file is missing, extra, altered or unsafe.
        BundleIncompatibleError: if this version or machine cannot run the bundle.
        EngineUnavailableError: if the engine's package or device is missing.

    Examples:
        >>> import vp_engines
        >>> with vp_engines.load("tiny.vpe", variant="dense") as engine:
        ...     print(engine)
        <Engine 'tiny' dense, ort fp32>
    """
    if variant not in VARIANT_FOLDERS:
        raise InputError(f"variant {variant!r}", expected=f"one of {', '.join(VARIANT_FOLDERS)}")
    if device not in (None, "cpu", "cuda"):
        raise InputError(f"device {device!r}", expected="'cpu', 'cuda' or None")
    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads {threads!r}", expected="a whole number from 1, or None")
    folder = VARIANT_FOLDERS[variant] + "/"
    bundle = read_bundle(path, keep=lambda name: name.startswith(folder))
    manifest = bundle.manifest
    if variant not in manifest.variants:
        raise BundleIncompatibleError(
            f"{path} holds no dense baseline",
            expected="variant='reduced'",
            fix="export again without `dense=False` to have one",
        )
    backend = _usable_backend(manifest)
    chosen = manifest.variants[variant]
    runner = backend.open(
        chosen.artefact.removeprefix(folder),
        {name.removeprefix(folder): bundle.contents[name] for name in chosen.files},
        tuple(tensor.spec() for tensor in manifest.inputs),
        tuple(tensor.spec() for tensor in manifest.outputs),
        chosen.requirements,
        RunOptions(device=device, threads=threads, profile=profile),
    )
    again = (os.path.abspath(path), bundle.digest, variant, device, threads, profile)
    return Engine(manifest, variant, runner, again)


def _open_again(
    path: str,
    digest: str,
    variant: Literal["reduced", "dense"],
    device: Literal["cpu", "cuda"] | None,
    threads: int | None,
    profile: bool,
) -> Engine:
    """Open the bundle of a pickled engine in another process.

    Raises:
        BundleError: if the bundle is gone or has been replaced; else as `load`.
    """
    engine = load(path, variant=variant, device=device, threads=threads, profile=profile)
    found = cast("tuple[Any, ...]", engine._reopen)[1]
    if found != digest:
        engine.close()
        raise BundleError(
            f"the bundle {path} has changed since the engine was pickled (digest {found})",
            expected=f"digest {digest}",
            fix="load the bundle again",
        )
    return engine


def _usable_backend(manifest: Manifest) -> Backend:
    name = manifest.engine.name
    if name not in ENGINES:
        raise BundleIncompatibleError(
            f"the bundle is for the engine {name!r}",
            expected=f"one of {', '.join(ENGINES)}",
            fix="upgrade with 'pip install -U vp-export'",
        )
    backend = get_backend(name)
    ok, reason = backend.available("run")
    if not ok:
        raise EngineUnavailableError(f"the engine '{name}' of the bundle cannot run here: {reason}")
    return backend
