"""Table of measured block latencies by token count, with interpolation, stored as a file.

Measured by `vp_exporter.searching.cost.measured_latency`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.searching.mask.budget import Costs
from vp_exporter.utils.files import write_atomically

FORMAT, VERSION = "vp-latency", 1


@dataclass(frozen=True)
class TimedModel:
    """Properties of a model that determine its block latency; a table applies to any model with equal ones.

    Attributes:
        patches: Patches of the dense model.
        block_macs: MACs per token of one block's linear layers.
    """

    embed_dim: int
    num_heads: int
    depth: int
    prefix_tokens: int
    patches: int
    block_macs: int


@dataclass(frozen=True)
class LatencyTable:
    """Measured latencies for one batch size.

    Attributes:
        engine, precision, device: What was timed; device is "cpu" or "cuda".
        batch: Images per run.
        threads: Threads per run; None for the engine's default.
        model: The model that was timed.
        tokens: Measured token counts, prefix tokens included, ascending.
        milliseconds: Time of one block at each count.
        overhead_ms: Time of everything but the blocks, with that many tokens embedded.
        repeats: Timed runs per figure.
        environment: vp_exporter.validation.latency.environment of the machine.

    Raises:
        SearchError: on construction, if a value is out of range.
    """

    engine: str
    precision: str
    device: str
    batch: int
    threads: int | None
    model: TimedModel
    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]
    overhead_ms: tuple[float, ...]
    repeats: int
    environment: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("engine", "precision", "device"):
            _need(isinstance(getattr(self, name), str), name, getattr(self, name), "text")
        for name in ("batch", "repeats"):
            _need(_whole(getattr(self, name), 1), name, getattr(self, name), "a whole number from 1")
        _need(
            self.threads is None or _whole(self.threads, 1), "threads", self.threads, "a whole number from 1, or null"
        )
        for name, value in asdict(self.model).items():
            _need(_whole(value, 0 if name == "prefix_tokens" else 1), f"model.{name}", value, "a whole number")
        _need(
            len(self.tokens) > 0
            and all(_whole(n, self.model.prefix_tokens) for n in self.tokens)
            and all(a < b for a, b in zip(self.tokens, self.tokens[1:], strict=False)),
            "tokens", list(self.tokens), "token counts with the prefix tokens, ascending",
        )  # fmt: skip
        for name, above in (("milliseconds", True), ("overhead_ms", False)):
            row = getattr(self, name)
            good = len(row) == len(self.tokens) and all(_time(value, above=above) for value in row)
            _need(good, name, list(row), f"{len(self.tokens)} finite times {'above' if above else 'from'} 0")
        _need(isinstance(self.environment, Mapping), "environment", self.environment, "an object")

    def block_ms(self, tokens: float) -> float:
        """Milliseconds of one block with this many tokens, prefix tokens included, by linear interpolation.

        Raises:
            SearchError: if the count is outside the measured range.
        """
        return self._between(tokens, self.milliseconds)

    def overhead_at(self, tokens: float) -> float:
        """Milliseconds of everything but the blocks with this many tokens embedded, by linear interpolation."""
        return self._between(tokens, self.overhead_ms)

    def predicted_ms(self, tokens: Sequence[int]) -> float:
        """Milliseconds of a batch under a plan of static steps.

        Args:
            tokens: Tokens of each block [depth], prefix tokens included: `[row.attention for row in plan.tokens()]`.

        Raises:
            SearchError: if the number of blocks differs, or a count is outside the measured range.
        """
        if len(tokens) != self.model.depth:
            raise SearchError(
                f"token counts of {len(tokens)} blocks", expected=f"{self.model.depth}, one for each block"
            )
        return self.overhead_at(tokens[0]) + sum(self.block_ms(n) for n in tokens)

    def check_model(self, description: ModelSpec) -> None:
        """Check that the table was measured on an equivalent model.

        Raises:
            SearchError: naming the first difference.
        """
        mine, theirs = asdict(self.model), asdict(timed_model(description))
        for name, value in mine.items():
            if value != theirs[name]:
                raise SearchError(
                    f"the latency table has {name} {value}", expected=f"{theirs[name]}, as {description.name} has",
                    fix="measure a table of this model",
                )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON values; the inverse of `from_dict`."""
        data = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"format": FORMAT, "version": VERSION, **data, "environment": dict(self.environment)}

    @classmethod
    def from_dict(cls, data: Any) -> LatencyTable:
        """Create a table from JSON values.

        Raises:
            SearchError: if it is not a table, is of a future version, or is inconsistent.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise SearchError(f"this is no latency table: its format is {found!r}", expected=f"{FORMAT!r}")
        if type(data.get("version")) is not int or data["version"] != VERSION:
            raise SearchError(
                f"the latency table has version {data.get('version')!r}", expected=f"{VERSION}", fix="upgrade vp-export"
            )
        values = {name: value for name, value in data.items() if name not in ("format", "version")}
        _same_fields("the latency table", values, cls)
        _need(isinstance(values["model"], Mapping), "model", values["model"], "an object")
        _same_fields("model of the latency table", values["model"], TimedModel)
        for name in ("tokens", "milliseconds", "overhead_ms"):
            _need(isinstance(values[name], list | tuple), name, values[name], "a list of numbers")
            values[name] = tuple(values[name])
        return cls(**{**values, "model": TimedModel(**values["model"])})

    def save(self, path: Path) -> None:
        """Write the table atomically.

        Raises:
            SearchError: if the file cannot be written.
        """
        try:
            write_atomically(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        except OSError as error:
            raise SearchError(f"cannot write {path}: {error.strerror}", fix="choose another place") from error

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table file.

        Raises:
            SearchError: if the file cannot be read, or is not a valid table.
        """
        try:
            data = json.loads(path.read_bytes())
        except OSError as error:
            raise SearchError(f"cannot read the latency table {path}: {error.strerror}", expected="a file") from error
        except (ValueError, RecursionError) as error:
            raise SearchError(f"the latency table {path} is not JSON: {error}", expected=f"a {FORMAT}") from error
        return cls.from_dict(data)

    def _between(self, tokens: float, values: tuple[float, ...]) -> float:
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            raise SearchError(
                f"{tokens} tokens are outside of what the latency table measured",
                expected=f"{self.tokens[0]} to {self.tokens[-1]}", fix="measure a table with more counts",
            )  # fmt: skip
        return float(np.interp(tokens, self.tokens, values))


def timed_model(description: ModelSpec) -> TimedModel:
    """Properties of a model that a table must match.

    Raises:
        SearchError: if its blocks differ from each other, so that one cannot represent all.
    """
    if len(set(description.blocks)) != 1:
        raise SearchError(
            f"the blocks of {description.name} differ in width", expected="equal blocks, of which one is timed for all",
            fix="search by MACs",
        )  # fmt: skip
    block = description.blocks[0]
    return TimedModel(
        description.embed_dim, description.num_heads, description.depth, description.prefix_tokens, description.patches,
        block.attention_linear + block.mlp_linear,
    )  # fmt: skip


def latency_costs(table: LatencyTable, description: ModelSpec) -> Costs:
    """Costs in milliseconds per batch from a table. Counts below the smallest measured one have infinite cost.

    Raises:
        SearchError: if the table is for another model, or does not include its dense token count.
    """
    table.check_model(description)
    prefix, patches = description.prefix_tokens, description.patches
    table.block_ms(prefix + patches)
    known = range(max(table.tokens[0] - prefix, 0), patches + 1)
    block, embed = np.full(patches + 1, np.inf), np.zeros(patches + 1)
    block[known.start :] = [table.block_ms(prefix + n) for n in known]
    embed[known.start :] = [table.overhead_at(prefix + n) for n in known]
    return Costs(np.tile(block, (description.depth, 1)), embed, 0.0, "ms")


def _whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _time(value: Any, *, above: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value < math.inf and (value > 0 if above else value >= 0)  # not isfinite: huge integers overflow it


def _need(good: bool, name: str, value: Any, expected: str) -> None:
    if not good:
        raise SearchError(f"{name} of the latency table is {str(value)[:80]}", expected=expected)


def _same_fields(what: str, values: Mapping[str, Any], kind: type) -> None:
    known = {field.name for field in fields(kind)}
    missing, unknown = sorted(known - set(values)), sorted(str(name) for name in set(values) - known)
    if missing or unknown:
        raise SearchError(
            f"{what} {'lacks ' + missing[0] if missing else 'has the unknown field ' + repr(unknown[0])}",
            expected=f"the fields {', '.join(sorted(known))}",
        )
