"""Set the class names of an existing bundle: `vp-inspect NAME.vpe --classes FILE --update`, or `--out NEW.vpe`."""

from __future__ import annotations

from pathlib import Path

from vp_engines.errors import VpError
from vp_exporter.cli import console


def check_options(path: Path | None, classes: Path | None, out: Path | None, update: bool) -> None:
    """Check the combination of options.

    Raises:
        VpError: if an option is missing, or conflicts with another.
    """
    if classes is None:
        if out is not None or update:
            name = "--update" if update else "--out"
            raise VpError(f"{name} is given without --classes", expected="--classes FILE, the names to write")
        return
    if path is None or path.is_file():
        raise VpError("--classes is given without a bundle", expected="NAME.vpe, whose classes are to be named")
    if (out is None) == (not update):
        raise VpError(
            "--classes is given " + ("with both --update and --out" if update else "alone"),
            expected="--update, to name the classes of the bundle itself, or --out NEW.vpe for a copy",
        )


def name_classes(path: Path, classes: Path, out: Path | None, as_json: bool) -> int:
    """Write the class names atomically, and print the new digest."""
    from vp_engines.bundle import update_bundle, verify_bundle
    from vp_exporter.data.labels import read_names

    names = read_names(classes)
    old = verify_bundle(path)
    count = old.manifest.model.num_classes
    if len(names) != count:
        raise VpError(
            f"{classes} holds {len(names)} class names", expected=f"{count}, one for each class of {path.name}"
        )
    manifest = update_bundle(path, files={}, out=out, classes=names)
    if as_json:
        console.print_json({"manifest": manifest.document(), "digest": manifest.digest()})
        return 0
    where = out if out is not None else path
    console.stdout.print(f"named the {count} classes of {where}: {names[0]}, ...", markup=False, soft_wrap=True)
    console.stdout.print(f"its digest is now {manifest.digest()}", markup=False, soft_wrap=True)
    console.stdout.print(f"it was            {old.digest}", markup=False, soft_wrap=True)
    return 0
