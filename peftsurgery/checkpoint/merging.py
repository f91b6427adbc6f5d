"""merge_adapters: one adapter made of others, on files, one layer in memory at a time.

The forms are those of :func:`peftsurgery.combine`, for plain LoRA adapters:

    linear, cat   the weighted sum of what the adapters change, exactly: the ranks add up
    svd           the same at the rank that the sum needs, or at a given one whose error is measured
    merges        ties, dare_linear, dare_ties, magnitude_prune: ``up`` and ``down`` are merged each
                  with its namesakes, weighted by the root of the adapter's weight
                  (:mod:`.tensor_merge`); as in peft, that is no sum of changes
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peftsurgery.arguments import checked
from peftsurgery.checkpoint.arrays import Array
from peftsurgery.checkpoint.hashing import hash_of
from peftsurgery.checkpoint.lora_folder import (
    BASE,
    CONFIG,
    TENSORS,
    LoraFolder,
    LoraLayer,
    NewLayer,
    read_lora_config,
    read_lora_folder,
    write_lora,
)
from peftsurgery.checkpoint.low_rank import Wanted, checked_wish
from peftsurgery.checkpoint.tensor_merge import MERGES, Majority, Merge, is_number, merge_named
from peftsurgery.errors import SurgeryError, did_you_mean
from peftsurgery.model_files import read_model_files
from peftsurgery.outputs import fresh
from peftsurgery.tensor_file import Tensor, TensorFile, read_header

SUMS, SVD = ("linear", "cat"), "svd"
Shares = Sequence[tuple[float, LoraLayer]]


@dataclass(frozen=True)
class MergeReport:
    """What was merged, by weight, into how many layers, and the share of the change that is lost.

    ``lost`` is relative, in Frobenius norms: 0 for the exact sums; None for merges, which are no
    sums.
    """

    out: Path
    how: str
    weights: Mapping[str, float]
    layers: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    lost: float | None = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as ``--json`` prints it."""
        return {**asdict(self), "out": str(self.out)}

    def __str__(self) -> str:
        said = " + ".join(f"{weight:g} x {name}" for name, weight in self.weights.items())
        lines = [f"{self.how}: {said}", f"  {self.layers} layers, in '{self.out}'"]
        if self.ranks:
            least, most = min(self.ranks.values()), max(self.ranks.values())
            lines.append(f"  ranks {least} to {most}" if least != most else f"  rank {most}")
        if self.lost:
            lines.append(f"  lost: {self.lost:.2%} of the change")
        return "\n".join(lines)


@checked
def merge_adapters(
    adapters: Mapping[str | Path, float],
    out: str | Path,
    how: str = "linear",
    base: str | Path | None = None,
    rank: int | None = None,
    density: float | None = None,
    majority: Majority = "total",
    seed: int = 0,
    force: bool = False,
) -> MergeReport:
    """Merge adapters in directories of peft's format into one in ``out``; models are not needed.

    ``adapters`` gives each directory's weight; ``how`` is linear, cat, svd, ties, dare_linear,
    dare_ties or magnitude_prune. ``base`` is the directory of the base that all are for: it is
    asked for the modules, and named in the result; without it all adapters must name one base.
    ``rank`` is what svd keeps, ``density`` the share of entries that pruning keeps, ``majority``
    how ties elects signs, ``seed`` what dare draws by. One adapter with weight 1 is copied, bytes
    and config, whatever it is of.

    Raises SurgeryError: PSG315 for adapters that cannot be merged with each other, PSG317 for
    weights and settings that make no sense, PSG501 to PSG508 for adapters that are damaged or do
    not fit the base, PSG520 for what is no plain LoRA, PSG601 to PSG603 for places.
    """
    weights = _checked_weights(adapters)
    form = _form(how, rank, density, majority, seed)
    target, folders = Path(out), [Path(name) for name in weights]
    reads = [*folders, *([] if base is None else [Path(base)])]
    configs = [read_lora_config(folder) for folder in folders]
    named = _base_named(folders, configs, base)
    with fresh(target, reads, force) as part:
        if len(folders) == 1 and set(weights.values()) == {1.0}:
            return _copied(folders[0], part, target, how)
        read = [read_lora_folder(folder) for folder in folders]
        rows = _rows(read, list(weights.values()))
        if base is not None:
            _check_modules(Path(base), rows)
        ranks: dict[str, int] = {}
        others = {BASE: named, "task_type": configs[0].get("task_type")}
        count = write_lora(part, _merged(rows, form, ranks), others, _tables(read))
    given = {str(name): weight for name, weight in weights.items()}
    return MergeReport(target, how, given, count, ranks, form.lost())


def _checked_weights(adapters: Mapping[str | Path, float]) -> dict[str | Path, float]:
    """The weights by directory. PSG317 for none, for no numbers, and if all are zero."""
    for name, weight in adapters.items():
        if not isinstance(name, str | Path):
            raise SurgeryError("PSG317", f"{name!r:.60} names no directory")
        if not is_number(weight):
            message = f"the weight of '{name}' is {weight!r:.60}, not a finite number"
            raise SurgeryError("PSG317", message)
    kept = {name: float(weight) for name, weight in adapters.items() if weight}
    if not kept:
        what = "no adapters are named" if not adapters else "all weights are 0"
        raise SurgeryError("PSG317", f"{what}, so there is nothing to merge")
    return kept


def _form(
    how: str, rank: int | None, density: float | None, majority: Majority, seed: int
) -> _Sum | _Merging:
    """The form of that name. PSG317 for settings that it does not take."""
    if rank is not None and how != SVD:
        raise SurgeryError("PSG317", f"a rank is for 'svd', not for '{how}'")
    if how in (*SUMS, SVD):
        if density is not None:
            raise SurgeryError("PSG317", f"'{how}' has no density")
        return _Sum(checked_wish(rank, None) if how == SVD else None)
    known = [name for name, merge in MERGES.items() if merge.keep != "all"]
    if how not in known:
        hint = did_you_mean(how, (*SUMS, SVD, *known))
        raise SurgeryError("PSG317", f"no merge is called '{how}'", hint)
    return _Merging(merge_named(how, density, majority), _Numpy(np.random.default_rng(seed)))


def _base_named(folders: Sequence[Path], configs: Sequence[Any], base: str | Path | None) -> Any:
    """What the result says of its base. PSG315 if the adapters name different ones."""
    if base is not None:
        return str(base)
    names = [config.get(BASE) for config in configs]
    odd = next((n for n, name in enumerate(names) if name != names[0]), None)
    if odd is not None:
        message = f"'{folders[0]}' is for {names[0]!r:.80}, and '{folders[odd]}' for"
        hint = "say which base is meant, if they are one: base="
        raise SurgeryError("PSG315", f"{message} {names[odd]!r:.80}", hint)
    return names[0]


def _copied(folder: Path, part: Path, target: Path, how: str) -> MergeReport:
    """One adapter with weight 1, as it is."""
    file = read_header(folder / TENSORS, "PSG505")
    try:
        part.mkdir()
        for name in (TENSORS, CONFIG):
            shutil.copyfile(folder / name, part / name)
    except OSError as error:
        raise SurgeryError("PSG603", f"'{target}' cannot be written: {error.strerror}") from error
    return MergeReport(target, how, {str(folder): 1.0}, len(file.tensors) // 2)


def _rows(folders: Sequence[LoraFolder], weights: Sequence[float]) -> dict[str, Shares]:
    """Each module's layers with their weights. PSG315 if they do not fit each other."""
    rows: dict[str, list[tuple[float, LoraLayer]]] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, layer in folder.layers.items():
            rows.setdefault(module, []).append((weight, layer))
    for module, shares in rows.items():
        first = shares[0][1]
        for _, layer in shares[1:]:
            if _outline(layer) != _outline(first):
                message = f"'{module}' is another weight in '{layer.file.path.parent}' than in"
                raise SurgeryError("PSG315", f"{message} '{first.file.path.parent}'")
    return dict(sorted(rows.items()))


def _tables(folders: Sequence[LoraFolder]) -> dict[str, tuple[TensorFile, Tensor]]:
    """Tables of the base that come with the adapters. PSG315 if two have other values for one."""
    found: dict[str, tuple[TensorFile, Tensor]] = {}
    for folder in folders:
        for name, tensor in folder.tables.items():
            known = found.setdefault(name, (folder.file, tensor))
            same = (tensor.dtype, tensor.shape) == (known[1].dtype, known[1].shape)
            if not same or hash_of(folder.file, tensor) != hash_of(*known):
                message = f"'{folder.folder}' comes with another '{name}' than"
                hint = "the adapters are for bases with different tokens"
                raise SurgeryError("PSG315", f"{message} '{known[0].path.parent}'", hint)
    return found


def _outline(layer: LoraLayer) -> Any:
    return layer.kind, layer.up.shape[0], layer.down.shape[1:]


def _check_modules(base: Path, rows: Mapping[str, Shares]) -> None:
    """Refuse layers of modules that a base lacks, or has in another shape. PSG506, PSG507."""
    held = read_model_files(base).tensors
    for module, shares in rows.items():
        name = next((n for n in held if n == f"{module}.weight"), None) or next(
            (n for n in held if f"{module}.weight".endswith(f".{n}")), None
        )
        if name is None:
            message = f"'{module}' is adapted, and '{base}' has no weight of that name"
            raise SurgeryError("PSG506", message, did_you_mean(f"{module}.weight", held))
        layer = shares[0][1]
        wanted = sorted((layer.up.shape[0], *layer.down.shape[1:]))
        if wanted != sorted(held[name][1].shape):
            message = f"'{name}' is {list(held[name][1].shape)} in '{base}', and not of the sizes"
            raise SurgeryError("PSG507", f"{message} {wanted} that the adapters have")


def _merged(
    rows: Mapping[str, Shares], form: _Sum | _Merging, ranks: dict[str, int]
) -> Iterator[NewLayer]:
    """The layers of the result, made one by one; their ranks are entered into ``ranks``."""
    for module, shares in rows.items():
        down, up = form.layer(shares)
        if not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise SurgeryError("PSG403", f"'{module}' holds NaN or infinity once it is merged")
        ranks[module] = len(down)
        yield NewLayer(module, shares[0][1].kind, down, up)


@dataclass
class _Sum:
    """The weighted sum of changes; taken apart again to what is wanted of it, if it is."""

    wanted: Wanted | None
    norms: list[tuple[float, float]] = field(default_factory=list)

    def layer(self, shares: Shares) -> tuple[Array, Array]:
        """``down`` and ``up`` of the sum."""
        read = [(weight * layer.scale, *layer.read()) for weight, layer in shares]
        down = np.concatenate([down for _, down, _ in read])
        with np.errstate(over="ignore", invalid="ignore"):  # said by whoever asks if it is finite
            up = np.concatenate([weight * up for weight, _, up in read], axis=1)
        return (down, up) if self.wanted is None else self.compressed(down, up, self.wanted)

    def compressed(self, down: Array, up: Array, wanted: Wanted) -> tuple[Array, Array]:
        """Best factors of ``up @ down``: QR of each side, and SVD of the small rest."""
        left, upper = np.linalg.qr(up.reshape(len(up), -1).astype(np.float64))
        right, lower = np.linalg.qr(down.reshape(len(down), -1).T.astype(np.float64))
        inner, values, outer = np.linalg.svd(upper @ lower.T)
        whole = float(np.sum(np.square(values)))
        count = max(1, wanted.count(values, whole))
        root = np.sqrt(values[:count])
        self.norms.append((float(np.sum(np.square(values[count:]))), whole))
        new_up = (left @ inner[:, :count] * root).reshape(len(up), count, *up.shape[2:])
        new_down = (root[:, None] * (outer[:count] @ right.T)).reshape(count, *down.shape[1:])
        return new_down, new_up

    def lost(self) -> float:
        """The share of the change that is lost; what lies within fp32's rounding is 0."""
        missing, whole = (sum(norms) for norms in zip((0.0, 0.0), *self.norms, strict=True))
        share = math.sqrt(missing / whole) if whole else 0.0
        return share if share > ROUNDING else 0.0


ROUNDING = 1e-6


@dataclass
class _Merging:
    """``up`` and ``down`` merged each by themselves."""

    merge: Merge
    arrays: _Numpy

    def layer(self, shares: Shares) -> tuple[Array, Array]:
        """``down`` and ``up``, weighted by the root of the weight; a minus sign is ``down``'s."""
        layers = [layer for _, layer in shares]
        ranks = {layer.rank for layer in layers}
        if len(ranks) > 1:
            message = f"'{layers[0].module}' has the ranks {sorted(ranks)}"
            raise SurgeryError("PSG315", message, "ranks may differ with linear, cat and svd")
        weights = [weight * layer.scale for weight, layer in shares]
        roots = [math.sqrt(abs(weight)) for weight in weights]
        signed = [math.copysign(root, w) for root, w in zip(roots, weights, strict=True)]
        downs, ups = zip(*(layer.read() for layer in layers), strict=True)
        merged = self.merge.merged
        return merged(downs, signed, self.arrays), merged(ups, roots, self.arrays)

    def lost(self) -> None:
        """Nothing is said of what a merge that is no sum loses of one."""


@dataclass(frozen=True)
class _Numpy:
    """What numpy calls otherwise than torch; DARE draws from ``generator``."""

    generator: np.random.Generator

    def stack(self, arrays: Sequence[Array]) -> Array:
        return np.stack(arrays)

    def sign(self, array: Array) -> Array:
        return np.sign(array)

    def weights(self, values: Sequence[float], like: Array) -> Array:
        return np.asarray(values, like.dtype).reshape(-1, *(1,) * (like.ndim - 1))

    def largest(self, array: Array, count: int) -> Array:
        flat = np.abs(array).reshape(-1)
        mask = np.zeros(array.size, array.dtype)
        mask[np.argsort(-flat, kind="stable")[:count]] = 1
        return mask.reshape(array.shape)

    def random(self, array: Array, share: float) -> Array:
        return (self.generator.random(array.shape) < share).astype(array.dtype)
