"""Contents of a saved surgery, read without its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftsurgery.language.describe import describe_where
from peftsurgery.surgery.model.saved.manifest import TENSORS, Manifest, read_manifest
from peftsurgery.surgery.plan.cut import Operation
from peftsurgery.tensor_file import Tensor, read_header


@dataclass(frozen=True)
class Size:
    """How many tensors, numbers in them and bytes."""

    tensors: int
    parameters: int
    bytes: int

    @staticmethod
    def of(tensors: Iterable[Tensor]) -> Size:
        """The size of all of them together."""
        found = list(tensors)
        numbers, size = sum(each.count for each in found), sum(each.size for each in found)
        return Size(len(found), numbers, size)

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters in {self.tensors} tensors, {_bytes(self.bytes)}"


@dataclass(frozen=True)
class Held:
    """An adapter of a saved surgery: what it is made of, and how large what it learnt is.

    ``trained`` are the names of the base's parameters that it trains whole, ``lost`` the share of
    the change that it was combined of which it lacks.
    """

    name: str
    operations: tuple[Operation, ...]
    active: bool
    left_out: tuple[int | str, ...]
    size: Size
    dtypes: tuple[str, ...]
    trained: tuple[str, ...] = ()
    lost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The adapter as ``--json`` prints it."""
        return {
            "name": self.name,
            "active": self.active,
            "operations": [
                {
                    "method": operation.file.name,
                    "about": operation.file.about,
                    "settings": operation.own_settings,
                    "where": operation.where.as_data(),
                    "rules": len(operation.file.rules),
                    "seed": operation.origin.seed,
                    "other_base": operation.origin.other_base,
                }
                for operation in self.operations
            ],
            "left_out": list(self.left_out),
            **asdict(self.size),
            "dtypes": list(self.dtypes),
            "trained": list(self.trained),
            "lost": self.lost,
        }

    def __str__(self) -> str:
        lines = [f"{self.name}{'' if self.active else ' (inactive)'}: {self.size}"]
        for operation in self.operations:
            settings = ", ".join(f"{k}={_shown(v)}" for k, v in operation.own_settings.items())
            lines.append(f"  {operation.file.name}({settings})")
            if operation.where.given():
                lines.append(f"  only where {describe_where(operation.where)}")
            if other := operation.origin.other_base:
                lines.append(f"  on another base than it was made for: {other}")
        if self.trained:
            rest = f" and {len(self.trained) - 1} more" if self.trained[1:] else ""
            lines.append(f"  trains of the base: {self.trained[0]}{rest}")
        if self.lost is not None:
            lines.append(f"  lacks {self.lost:.2%} of the change that it was combined of")
        if self.left_out:
            lines.append(f"  left out of layers {', '.join(map(str, self.left_out))}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Contents:
    """A saved surgery: its adapters, its base, and what it holds of the base besides.

    ``of_the_base`` is what is no adapter's: buffers that training moved, and the parameters that
    were trained whole of a surgery that does not say by which adapter.
    """

    manifest: Manifest
    adapters: tuple[Held, ...]
    of_the_base: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """The contents as ``--json`` prints them."""
        said = ("base", "model", "versions", "seed", "date")
        print_ = self.manifest.fingerprint
        return {
            "surgery": str(self.manifest.path),
            **{key: self.manifest.said.get(key) for key in said},
            "fingerprint": print_ and {**print_.summary(), "tensors": len(print_.tensors)},
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "active": [adapter.name for adapter in self.adapters if adapter.active],
            "of_the_base": {
                **asdict(Size.of(self.of_the_base.values())),
                "names": [*self.of_the_base],
            },
        }

    def __str__(self) -> str:
        given, print_ = self.manifest.said, self.manifest.fingerprint
        lines = [f"{self.manifest.path}: a surgery on a {given.get('model') or 'model'}"]
        lines.append(f"  base: {given.get('base') or 'a model in memory'}")
        if print_ is None:
            lines.append("  no fingerprint of the base's weights")
        else:
            count = len(print_.tensors)
            lines.append(f"  fingerprint {print_.digest} of its {count} tensors")
        versions = given.get("versions")
        if isinstance(versions, dict):
            made = ", ".join(f"{name} {version}" for name, version in versions.items())
            lines.append(f"  saved {given.get('date')} with {made}; seed {given.get('seed')}")
        lines += [line for adapter in self.adapters for line in str(adapter).splitlines()]
        if self.of_the_base:
            lines.append(f"of the base, trained or moved: {Size.of(self.of_the_base.values())}")
        return "\n".join(lines)


def contents_of(path: Path) -> Contents:
    """What a saved surgery holds; only its manifest, its rules and a header are read.

    PSG605 and PSG606 for files that are damaged.
    """
    manifest = read_manifest(path)
    tensors = read_header(path / TENSORS, "PSG606").tensors
    names, trained = manifest.adapters, manifest.trained
    owners = {tensor: trained.get(tensor) or _owner(tensor, names) for tensor in tensors}
    owners |= dict.fromkeys(manifest.buffers)
    adapters = []
    for name in names:
        mine = [tensor for key, tensor in tensors.items() if owners[key] == name]
        adapters.append(
            Held(
                name,
                tuple(operation for operation in manifest.operations if operation.name == name),
                manifest.active is None or name in manifest.active,
                tuple(manifest.left_out.get(name, ())),
                Size.of(mine),
                tuple(sorted({tensor.dtype for tensor in mine})),
                tuple(sorted(key for key, owner in trained.items() if owner == name)),
                manifest.lost.get(name),
            )
        )
    rest = {key: tensor for key, tensor in tensors.items() if owners[key] is None}
    return Contents(manifest, tuple(adapters), rest)


def _owner(tensor: str, names: Iterable[str]) -> str | None:
    """The adapter that a tensor's name is beneath, the innermost; None for one of no adapter."""
    known = set(names)
    return next((part for part in reversed(tensor.split(".")[:-1]) if part in known), None)


def _bytes(count: int) -> str:
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(max(count.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{count / 1024**power:.{1 if power else 0}f} {units[power]}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
