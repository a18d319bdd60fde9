"""A request for a plan, checked against the known methods and presets."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vp_engines.errors import VpError
from vp_exporter.methods.base import Method
from vp_exporter.methods.options import MethodOptions, label
from vp_exporter.methods.presets import PRESETS
from vp_exporter.methods.table import METHODS


@dataclass(frozen=True)
class MethodRequest(MethodOptions):
    """A method with options that are consistent with each other, independent of the model.

    Fields as in `MethodOptions`.

    Raises:
        VpError: if the method or preset is unknown, an option is not supported by the method or out of range, the
            amount of reduction is not set exactly once, or a required tau is missing.
    """

    def __post_init__(self) -> None:
        method = METHODS.get(self.method)
        if method is None:
            raise VpError(f"unknown method {self.method!r}", expected=f"one of {', '.join(METHODS)}")
        super().__post_init__()
        self._check_taken(method)
        self._check_preset(method)
        self._check_amount(method)
        if "tau" in method.options and self.tau is None and self.preset is None:
            raise VpError(
                f"`method={method.name}` has no tau",
                expected="`tau`, the variance of the scores from which an image is pruned and not pooled",
                fix="tau belongs to a model and a token count: preset ppt-deit-s uses 7e-5 (DeiT-S, 197 tokens)",
            )

    def _check_taken(self, method: Method) -> None:
        always = {"method", "preset", "proportional_attention", "args"}
        given = [f.name for f in fields(self) if f.name not in always and getattr(self, f.name) is not None]
        strange = [label(name) for name in given if name not in method.options]
        strange += [label(name, arg=True) for name in self.args if name not in method.args]
        if strange:
            takes = [label(name) for name in (*method.options, "preset", "proportional_attention")]
            takes += [label(name, arg=True) for name in method.args]
            raise VpError(f"method {method.name} does not take {strange[0]}", expected=f"only {', '.join(takes)}")

    def _check_preset(self, method: Method) -> None:
        if self.preset is None:
            return
        own = [preset.name for preset in PRESETS.values() if preset.method == method.name]
        known = f"one of {', '.join(own)}" if own else f"no preset: {method.name} has none"
        if self.preset not in PRESETS:
            every = f"{known} (of every method: {', '.join(PRESETS)})"
            raise VpError(f"unknown preset {self.preset!r}", expected=every)
        if self.preset not in own:
            other = PRESETS[self.preset].method
            raise VpError(f"preset {self.preset} is one of method {other}", expected=known, fix=f"`method={other}`")

    def _check_amount(self, method: Method) -> None:
        """Check that the amount is set exactly once; a preset sets everything that affects token counts."""
        amounts = (*method.amounts, ("target_macs",), ("preset",))
        given = [group for group in amounts if any(self._has(name) for name in group)]
        names = [" with ".join(label(name, arg=name in method.args) for name in group) for group in amounts]
        if len(given) != 1:
            found = " and ".join(label(group[0], arg=group[0] in method.args) for group in given)
            raise VpError(
                f"method {method.name} is given {found}" if given else f"nothing says how much {method.name} removes",
                expected=f"exactly one of {', '.join(names)}",
            )
        for name in given[0]:
            if not self._has(name):
                raise VpError(f"{label(name, arg=True)} is missing", expected=names[amounts.index(given[0])])
        extra = ["`blocks`"] * (self.blocks is not None) + ["`schedule`"] * (self.schedule is not None)
        extra += [label(name, arg=True) for name in self.args]
        if self.preset is not None and extra:
            raise VpError(
                f"preset {self.preset} is given with {extra[0]}",
                expected="the preset alone: it fixes every token count",
                fix="leave one of them out",
            )
