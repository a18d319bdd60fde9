"""ReductionPlan: which tokens are removed where, as a readable JSON file.

    {"format": "vp-plan", "version": 1,
     "model": {"name": "deit_small_patch16_224", "image_size": [224, 224], "patch_size": [16, 16],
               "prefix_tokens": 1, "depth": 12, "patches": 196, "weights_sha256": null},
     "method": "vpruner",
     "steps": [{"block": 0, "reducer": "static", "keep": [0, 1, 5, ...]}, ...],
     "key_bias": {"3": [0.0, -0.2, ...]},
     "proportional_attention": false, "budget": null, "provenance": {}}

The constructor checks a plan for consistency; `check_model` checks it against a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from vp_exporter.errors import PlanError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.reducers import StaticStep, Step, Tokens, step_from_dict
from vp_exporter.utils.files import write_atomically

FORMAT, VERSION = "vp-plan", 1
_FIELDS = {
    "format", "version", "model", "method", "steps", "key_bias", "proportional_attention", "budget", "provenance",
}  # fmt: skip


@dataclass(frozen=True)
class PlanModel:
    """The model that a plan is for.

    Attributes:
        name: timm architecture, with or without the pretrained tag.
        image_size, patch_size: Height and width in pixels.
        prefix_tokens: Number of class, distillation and register tokens.
        depth: Number of blocks.
        patches: Number of patch tokens that the dense model embeds.
        weights_sha256: Fingerprint of the weights used in the search (vp_exporter.model.weights), if relevant.
    """

    name: str
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    prefix_tokens: int
    depth: int
    patches: int
    weights_sha256: str | None = None

    def __post_init__(self) -> None:
        # The upper limits are far above any ViT; they bound the work caused by an untrusted plan.
        for key, low, high in (("prefix_tokens", 0, 10_000), ("depth", 1, 1_000), ("patches", 1, 1_000_000)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise PlanError(f"model.{key} of the plan is {value!r}", expected=f"a whole number, {low} to {high}")
        for key in ("image_size", "patch_size"):
            value = getattr(self, key)
            if len(value) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in value):
                raise PlanError(f"model.{key} of the plan is {list(value)!r}", expected="[height, width] in pixels")
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"model.name of the plan is {self.name!r}", expected="a timm model name")
        if self.weights_sha256 is not None and not isinstance(self.weights_sha256, str):
            raise PlanError(f"model.weights_sha256 of the plan is {self.weights_sha256!r}", expected="text or null")

    @classmethod
    def of(cls, spec: ModelSpec, weights_sha256: str | None = None) -> Self:
        """Create from a model's spec."""
        return cls(
            spec.name, spec.image_size, spec.patch_size, spec.prefix_tokens, spec.depth, spec.patches, weights_sha256
        )

    @property
    def architecture(self) -> str:
        """The timm name without its pretrained tag."""
        return self.name.split(".", 1)[0]


@dataclass(frozen=True)
class BlockTokens:
    """Tokens of one block, prefix tokens included: in its attention, and in its MLP (after inner reducers).

    `positions` are those of the patches in its attention, in the original grid; None if the choice depends on the
    image.
    """

    attention: int
    mlp: int
    positions: tuple[int, ...] | None


@dataclass(frozen=True)
class ReductionPlan:
    """A checked token-reduction plan.

    Attributes:
        model: The model that it is for.
        steps: Reductions, ordered by block; at most one per block and place.
        method: Free text, e.g. "vpruner".
        key_bias: Block -> additive attention logit of every token in that block's attention (prefix tokens first).
        proportional_attention: Add log(token size) to the logits.
        budget: Budget given to the search; free JSON.
        provenance: Data, scores, seeds and versions of the search; free JSON.

    Raises:
        PlanError: on construction, saying what was found, what was expected and what to do.

    Examples:
        >>> import vp_exporter as vp
        >>> plan = vp.build_plan("tome", "deit_small_patch16_224", r=13)
        >>> plan.save("plan.json")
        >>> vp.ReductionPlan.load("plan.json") == plan
        True
        >>> [row.attention for row in plan.tokens()][:3]
        [197, 184, 171]
    """

    model: PlanModel
    steps: tuple[Step, ...] = ()
    method: str = ""
    key_bias: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    proportional_attention: bool = False
    budget: Any = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise PlanError(f"method of the plan is {self.method!r}", expected="text")
        if not isinstance(self.proportional_attention, bool):
            raise PlanError(f"proportional_attention of the plan is {self.proportional_attention!r}", expected="a bool")
        self._check_steps()
        tokens = self.tokens()
        for block, row in self.key_bias.items():
            if not 0 <= block < self.model.depth:
                raise PlanError(f"key_bias names block {block}", expected=f"0 to {self.model.depth - 1}")
            if len(row) != tokens[block].attention:
                raise PlanError(
                    f"key_bias of block {block} has {len(row)} values",
                    expected=f"{tokens[block].attention}, one for each of its {self.model.prefix_tokens} prefix tokens "
                    f"and {tokens[block].attention - self.model.prefix_tokens} surviving patches",
                )
            bad = [v for v in row if not _is_number(v) or not math.isfinite(v)]
            if bad:
                raise PlanError(
                    f"key_bias of block {block} holds {bad[0]!r}",
                    expected="finite numbers",
                    fix="to remove a token, drop it with a static step",
                )
        # As floats: 0 and 0.0 must give the same fingerprint.
        rows = {block: tuple(float(v) for v in row) for block, row in self.key_bias.items()}
        object.__setattr__(self, "key_bias", rows)
        for name in ("budget", "provenance"):
            try:
                json.dumps(getattr(self, name), allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise PlanError(f"{name} of the plan does not fit JSON: {error}", expected="JSON values") from error

    def _check_steps(self) -> None:
        depth, patches = self.model.depth, self.model.patches
        seen: set[tuple[int, str]] = set()
        last = 0
        for step in self.steps:
            if not 0 <= step.block < depth:
                raise PlanError(
                    f"the {step.where} is outside the model", expected=f"a block from 0 to {depth - 1}",
                    fix="block numbers are 0-based",
                )  # fmt: skip
            if step.block < last:
                raise PlanError(f"the {step.where} follows a step at block {last}", expected="steps ordered by block")
            if (step.block, step.place) in seen:
                raise PlanError(f"block {step.block} has two steps in the same place", expected="one", fix="join them")
            seen.add((step.block, step.place))
            last = step.block
            if isinstance(step, StaticStep):
                outside = next((p for p in step.keep if not 0 <= p < patches), None)
                if outside is not None:
                    raise PlanError(
                        f"the {step.where} names position {outside}",
                        expected=f"patch positions 0 to {patches - 1}",
                        fix="prefix tokens are never listed: they are always kept",
                    )

    @property
    def prefix_tokens(self) -> int:
        return self.model.prefix_tokens

    def steps_at(self, block: int, place: str) -> Step | None:
        """The step at a block's "input" or "inner" place, or None."""
        return next((s for s in self.steps if s.block == block and s.place == place), None)

    def tokens(self) -> tuple[BlockTokens, ...]:
        """Tokens of every block, in order.

        Raises:
            PlanError: if a step needs a token that was removed before, or more tokens than there are.
        """
        rows = []
        now = Tokens(self.model.prefix_tokens, self.model.patches, tuple(range(self.model.patches)))
        for block in range(self.model.depth):
            now = self._after(self.steps_at(block, "input"), now)
            after = self._after(self.steps_at(block, "inner"), now)
            rows.append(BlockTokens(now.total, after.total, now.positions))
            now = after
        return tuple(rows)

    @staticmethod
    def _after(step: Step | None, tokens: Tokens) -> Tokens:
        if step is None:
            return tokens
        if isinstance(step, StaticStep) and tokens.positions is not None:
            revived = sorted(set(step.keep) - set(tokens.positions))
            if revived:
                raise PlanError(
                    f"patch {revived[0]} comes back at block {step.block} after it was dropped"
                    + (f" (and {len(revived) - 1} more)" if len(revived) > 1 else ""),
                    expected="a token that has left to stay away",
                    fix="keep it in the earlier blocks too, or drop it here",
                )
        return step.apply(tokens)

    @property
    def reduces(self) -> bool:
        """Whether any block has fewer tokens than in the dense model."""
        full = self.model.prefix_tokens + self.model.patches
        return any(row.attention < full or row.mlp < full for row in self.tokens())

    def check_model(self, description: ModelSpec, weights_sha256: str | None = None) -> None:
        """Check that the plan is for this model.

        Args:
            description: The model.
            weights_sha256: Fingerprint of its weights; compared if both sides have one.

        Raises:
            PlanError: naming the first difference.
        """
        mine, theirs = self.model, PlanModel.of(description)
        if description.named and mine.architecture != theirs.architecture:
            raise PlanError(
                f"the plan is for {mine.architecture}", expected=f"a plan for {theirs.architecture}",
                fix="search a plan on this model, or export the model that the plan names",
            )  # fmt: skip
        for key in ("image_size", "patch_size", "patches", "prefix_tokens", "depth"):
            a, b = getattr(mine, key), getattr(theirs, key)
            if a != b:
                raise PlanError(
                    f"the plan has {key} {_plain(a)}", expected=f"{_plain(b)}, as {theirs.name} has",
                    fix="positions do not carry over: search a plan on this model",
                )  # fmt: skip
        for step in self.steps:
            step.check_model(description)
        if mine.weights_sha256 and weights_sha256 and mine.weights_sha256 != weights_sha256:
            raise PlanError(
                f"the plan was searched on weights {mine.weights_sha256[:12]}",
                expected=f"the weights at hand, {weights_sha256[:12]}",
                fix="search again, or remove model.weights_sha256 from the plan to use it all the same",
            )

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values; the inverse of `from_dict`."""
        model = {key: _plain(getattr(self.model, key)) for key in PlanModel.__dataclass_fields__}
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": model,
            "method": self.method,
            "steps": [{"block": s.block, "reducer": s.reducer, **s.fields()} for s in self.steps],
            "key_bias": {str(block): list(row) for block, row in sorted(self.key_bias.items())},
            "proportional_attention": self.proportional_attention,
            "budget": self.budget,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_dict(cls, data: Any) -> ReductionPlan:
        """Create a plan from JSON values.

        Raises:
            PlanError: if it is not a plan, is of a future version, or is inconsistent.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise PlanError(f"this is no plan: its format is {found!r}", expected=f"{FORMAT!r}")
        # type(): True == 1, but is not a version
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise PlanError(
                f"the plan has version {data.get('version')!r}", expected=f"{VERSION}", fix="upgrade vp-export"
            )
        unknown = sorted(set(data) - _FIELDS)
        if unknown:
            raise PlanError(f"the plan has the unknown field {unknown[0]!r}", expected=f"only {sorted(_FIELDS)}")
        steps, bias, provenance = data.get("steps", []), data.get("key_bias") or {}, data.get("provenance") or {}
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            raise PlanError(f"steps of the plan is {steps!r}", expected="a list")
        if not isinstance(provenance, Mapping):
            raise PlanError(f"provenance of the plan is {provenance!r}", expected="an object")
        return cls(
            model=_model_from(data.get("model")),
            steps=tuple(step_from_dict(entry) for entry in steps),
            method=data.get("method", ""),
            key_bias=_bias_from(bias),
            proportional_attention=data.get("proportional_attention", False),
            budget=data.get("budget"),
            provenance=dict(provenance),
        )

    def dumps(self) -> str:
        """The plan as JSON text, one line per step for readability and diffs."""
        data = self.to_dict()
        lines = [f"  {json.dumps(key)}: {_pretty(key, value)}" for key, value in data.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def loads(cls, text: str | bytes) -> ReductionPlan:
        """Parse a plan from JSON text.

        Raises:
            PlanError: if it is not JSON, has a duplicate key or NaN, or is inconsistent.
        """
        try:
            data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the plan is not JSON: {error}", expected="the JSON of a vp-plan") from error
        return cls.from_dict(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan atomically."""
        try:
            write_atomically(Path(path), self.dumps().encode())
        except OSError as error:
            raise PlanError(f"cannot write {path}: {error.strerror}", fix="choose another place") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReductionPlan:
        """Read a plan file.

        Raises:
            PlanError: if the file cannot be read or is not a valid plan.
        """
        try:
            return cls.loads(Path(path).read_bytes())
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}", expected="a JSON file") from error

    def fingerprint(self) -> str:
        """sha256 of what determines the reduced model's output, equal for plans that run the same.

        A field added later is left out if it has its default, so that old plans keep their fingerprints.
        """
        data = self.to_dict()
        data["steps"] = [
            {key: value for key, value in entry.items() if key not in step.later or value != step.later[key]}
            for step, entry in zip(self.steps, data["steps"], strict=True)
        ]
        what = {key: data[key] for key in ("model", "steps", "key_bias", "proportional_attention")}
        return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _model_from(data: Any) -> PlanModel:
    if not isinstance(data, Mapping):
        raise PlanError(f"model of the plan is {data!r}", expected="an object")
    known = set(PlanModel.__dataclass_fields__)
    missing, unknown = sorted(known - {"weights_sha256"} - set(data)), sorted(set(data) - known)
    if missing or unknown:
        raise PlanError(f"model of the plan {'lacks ' + missing[0] if missing else 'has the unknown ' + unknown[0]}",
                        expected=f"the fields {', '.join(sorted(known))}")  # fmt: skip
    values = dict(data)
    for key in ("image_size", "patch_size"):
        if not isinstance(values[key], Sequence) or isinstance(values[key], str):
            raise PlanError(f"model.{key} of the plan is {values[key]!r}", expected="[height, width] in pixels")
        values[key] = tuple(values[key])
    return PlanModel(**values)


def _bias_from(data: Any) -> dict[int, tuple[float, ...]]:
    if not isinstance(data, Mapping):
        raise PlanError(f"key_bias of the plan is {data!r}", expected="an object: block -> list of numbers")
    rows = {}
    for key, row in data.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", str(key)) or not isinstance(row, Sequence) or isinstance(row, str):
            raise PlanError(f"key_bias holds {key!r}: {str(row)[:40]}", expected="block number -> list of numbers")
        odd = [v for v in row if not _is_number(v)]
        if odd:
            raise PlanError(f"key_bias of block {key} holds {odd[0]!r}", expected="finite numbers")
        try:
            rows[int(key)] = tuple(float(v) for v in row)
        except OverflowError as error:
            raise PlanError(
                f"key_bias of block {key} holds a number out of range", expected="finite numbers"
            ) from error
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _pretty(key: str, value: Any) -> str:
    if key == "steps" and value:
        return "[\n" + ",\n".join("    " + json.dumps(entry) for entry in value) + "\n  ]"
    return json.dumps(value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return keys


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
