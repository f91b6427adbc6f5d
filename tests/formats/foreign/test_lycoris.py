"""LoHa and LoKr of LyCORIS, imported as peft has them.

The oracle are the formulas of arXiv:2309.14859 and of LyCORIS's ``rebuild_tucker``, computed here
in double precision of the numbers that were written.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lokr.layer import factorization
from safetensors.numpy import save_file
from torch import nn

import peftsurgery as ps
from peftsurgery.formats.foreign.lycoris import _small
from tests.checkpoint.loras import llama
from tests.formats.test_import_adapter import added, image, same, text_encoder

TAPS = {"down_blocks.0": (8, 3, 3, 3), "proj_in": (8, 8, 1, 1), "to_q": (6, 8)}
Q = "encoder.layers.0.self_attn.q_proj"
ALPHA = 1.5


def values(seed: str, *shape: int) -> Any:
    generator = np.random.default_rng(abs(hash_of(seed)))
    return generator.normal(size=shape).astype(np.float32)


def hash_of(text: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**32


def rebuilt(parts: dict[str, Any], one: str, sizes: tuple[int, ...]) -> Any:
    """A matrix or kernel of its factors."""
    wide = {part: value.astype(float) for part, value in parts.items()}
    if f"w{one}" in wide:
        return wide[f"w{one}"].reshape(sizes)
    if f"t{one}" in wide:
        core, up, down = wide[f"t{one}"], wide[f"w{one}_a"], wide[f"w{one}_b"]
        return np.einsum("ijkl,jr,ip->prkl", core, down, up).reshape(sizes)
    low = wide[f"w{one}_a"] @ wide[f"w{one}_b"].reshape(len(wide[f"w{one}_b"]), -1)
    return low.reshape(sizes)


def factored(path: str, one: str, rank: int, sizes: tuple[int, ...], core: bool) -> dict[str, Any]:
    """The factors of a matrix or kernel as LyCORIS writes them; a core for several taps."""
    out, into, *taps = sizes
    if core and any(size > 1 for size in taps):
        shapes = {"a": (rank, out), "b": (rank, into)}
        found = {f"t{one}": values(f"{path}t{one}", rank, rank, *taps)}
    else:
        shapes, found = {"a": (out, rank), "b": (rank, int(np.prod([into, *taps])))}, {}
    return found | {f"w{one}_{h}": values(path + one + h, *shape) for h, shape in shapes.items()}


def hadamard(path: str, sizes: tuple[int, ...], rank: int, core: bool) -> tuple[Any, Any]:
    parts = factored(path, "1", rank, sizes, core) | factored(path, "2", rank, sizes, core)
    change = rebuilt(parts, "1", sizes) * rebuilt(parts, "2", sizes) * ALPHA / rank
    return {f"hada_{part}": value for part, value in parts.items()}, change


def kronecker(
    path: str, sizes: tuple[int, ...], rank: int, core: bool, whole: str = "", factor: int = -1
) -> tuple[Any, Any]:
    (out, into, *taps), parts = sizes, {}
    (a, c), (b, d) = factorization(out, factor), factorization(into, factor)
    for one, these in (("1", (a, b)), ("2", (c, d, *taps))):
        is_whole = one in whole
        parts |= (
            {f"w{one}": values(f"{path}w{one}", *these)}
            if is_whole
            else factored(path, one, rank, these, core)
        )
    first, second = rebuilt(parts, "1", (a, b)), rebuilt(parts, "2", (c, d, *taps))
    change = np.zeros(sizes)
    for row, column, p, q in np.ndindex(a, b, c, d):
        change[row * c + p, column * d + q] = first[row, column] * second[p, q]
    scale = 1 if whole == "12" else ALPHA / rank
    return {f"lokr_{part}": value for part, value in parts.items()}, change * scale


def with_mid(path: str, sizes: tuple[int, ...], rank: int) -> tuple[Any, Any]:
    """LoCon, with a core between the factors of a kernel of several taps."""
    out, into, *taps = sizes
    ones = [1 for _ in taps]
    down, up = values(f"{path}down", rank, into, *ones), values(f"{path}up", out, rank, *ones)
    parts = {"lora_down.weight": down, "lora_up.weight": up}
    down, up = down.reshape(rank, into).astype(float), up.reshape(out, rank).astype(float)
    if all(size == 1 for size in taps):
        return parts, (up @ down).reshape(sizes) * ALPHA / rank
    core = values(f"{path}mid", rank, rank, *taps)
    change = np.einsum("oi,ijkl,jc->ockl", up, core.astype(float), down)
    return {**parts, "lora_mid.weight": core}, change * ALPHA / rank


CASES: dict[str, Callable[[str, tuple[int, ...]], tuple[Any, Any]]] = {
    "loha": lambda path, sizes: hadamard(path, sizes, 3, False),
    "loha, cores": lambda path, sizes: hadamard(path, sizes, 3, True),
    "loha, ranks": lambda path, sizes: hadamard(path, sizes, 2 + (path == "to_q"), False),
    "locon, cores": lambda path, sizes: with_mid(path, sizes, 3),
    "lokr, whole": lambda path, sizes: kronecker(path, sizes, 2, False, "12"),
    "lokr, first whole": lambda path, sizes: kronecker(path, sizes, 1, False, "1"),
    "lokr, second whole": lambda path, sizes: kronecker(path, sizes, 2, False, "2"),
    "lokr, none whole": lambda path, sizes: kronecker(path, sizes, 1, False),
    "lokr, large rank": lambda path, sizes: kronecker(path, sizes, 5, False, "1"),
    "lokr, cores": lambda path, sizes: kronecker(path, sizes, 1, True, "1"),
    "lokr, large cores": lambda path, sizes: kronecker(path, sizes, 5, True),
    "lokr, factor": lambda path, sizes: kronecker(path, sizes, 1, False, "1", 4),
}


def file_of(case: str, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    tensors, expected = {}, {}
    for path, sizes in TAPS.items():
        parts, expected[f"{path}.weight"] = CASES[case](path, sizes)
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        tensors[f"{name}.alpha"] = np.array(ALPHA, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors", expected


@pytest.mark.parametrize("case", CASES)
def test_peft_changes_the_weights_as_the_formula_says(case: str, tmp_path: Path) -> None:
    file, expected = file_of(case, tmp_path)
    ps.import_adapter(file, tmp_path / "out", f"{__name__}:image")
    same(added(image()[0], tmp_path / "out"), expected)
    theirs = PeftModel.from_pretrained(image()[0], tmp_path / "out")
    sample = torch.from_numpy(values("sample", 2, 3, 8, 8))
    assert (theirs(sample) - theirs.merge_and_unload()(sample)).abs().max() < 1e-3


@pytest.mark.parametrize("case", ["loha", "lokr, whole", "lokr, first whole"])
def test_linears_are_read_by_every_command(case: str, tmp_path: Path) -> None:
    text_encoder().save_pretrained(tmp_path / "base")
    parts, change = CASES[case](Q, (16, 16))
    name = f"lora_te_text_model_{Q.replace('.', '_')}"
    tensors = {f"{name}.{part}": value for part, value in parts.items()}
    save_file(tensors | {f"{name}.alpha": np.float32([ALPHA])}, tmp_path / "lora.safetensors")
    ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", tmp_path / "base")
    read = ps.from_peft(ps.capture(str(tmp_path / "base")), tmp_path / "out")
    folded = ps.fold(read).state_dict()
    moved = {n: (folded[n] - v).double().numpy() for n, v in text_encoder().state_dict().items()}
    found = {name: move for name, move in moved.items() if np.abs(move).max() > 0}
    same(
        {name.removeprefix("text_model."): move for name, move in found.items()},
        {f"{Q}.weight": change},
    )


def test_sides_are_divided_as_in_peft() -> None:
    for size in (1, 2, 6, 8, 12, 36, 97, 320, 640, 768):
        for factor in (-1, *range(1, size + 2)):
            assert _small(size, factor) == factorization(size, factor)[0], (size, factor)


def broken(case: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the linear, some of them changed, or left out where the change is None."""
    parts, _ = CASES[case]("to_q", TAPS["to_q"])
    changed = {**parts, **changes}
    return {f"lora_unet_to_q.{n}": value for n, value in changed.items() if value is not None}


def some(*shape: int) -> Any:
    return values("more", *shape)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "half": (broken("loha", {"hada_w2_b": None}), r"PSG507: .* has no 'hada_w2_b'"),
    "rank 0": (broken("loha", {"hada_w1_b": some(0, 8)}), r"PSG507: .* is of rank 0"),
    "ranks": (broken("loha", {"hada_w2_b": some(2, 8)}), r"PSG507: w2_b of .* is \[2, 8\], where"),
    "scalar": (broken("loha", {"hada_w1_b": np.array(1, np.float32)}), "PSG507: .* is of rank 0"),
    "sizes": (broken("loha", {"hada_w1_a": some(5, 3)}), r"PSG507: w1_a of .* is \[5, 3\], where"),
    "one core": (broken("loha", {"hada_t1": some(3, 3)}), "PSG507: .* has no 'hada_t2'"),
    "cores of a linear": (
        broken("loha", {"hada_t1": some(3, 3), "hada_t2": some(3, 3)}),
        "PSG520: .* has a core, and no kernel",
    ),
    "magnitude": (broken("loha", {"dora_scale": some(6, 1)}), r"PSG520: .* it has '.*dora_scale'"),
    "another method": (broken("loha", {"lokr_w1": some(2, 2)}), r"PSG520: .* it has '.*lokr_w1'"),
    "core of a linear": (
        broken("locon, cores", {"lora_mid.weight": some(3, 3)}),
        r"PSG507: the core of .* is \[3, 3\], and its factors are",
    ),
    "core of another rank": (
        broken("locon, cores", {"lora_mid.weight": some(3, 2, 3, 3)}),
        r"PSG507: the core of .* is \[3, 2, 3, 3\], and its factors are",
    ),
    "core of a kernel without taps": (
        broken("locon, cores", {"lora_mid.weight": some(3, 3, 3, 3)}),
        r"PSG507: the factors of 'to_q' are",
    ),
    "no second": (
        broken("lokr, first whole", {"lokr_w2_b": None}),
        "PSG507: .* has no 'lokr_w2_b'",
    ),
    "twice": (broken("lokr, whole", {"lokr_w2_b": some(2, 4)}), "PSG507: .* w2 whole, and w2_b"),
    "uneven": (
        broken("lokr, whole", {"lokr_w1": some(4, 2)}),
        r"PSG507: .* matrix of \[4, 2\], and",
    ),
    "flat": (broken("lokr, whole", {"lokr_w1": some(4)}), r"PSG507: .* matrix of \[4\]"),
    "other second": (
        broken("lokr, whole", {"lokr_w2": some(3, 2)}),
        r"PSG507: w2 of .* is \[3, 2\], where its weight needs \[3, 4\]",
    ),
    "ranks of both": (
        broken("lokr, none whole", {"lokr_w1_a": some(2, 2), "lokr_w1_b": some(2, 2)}),
        r"PSG507: .* factors of ranks \[1, 2\]",
    ),
    "other sides": (
        broken("lokr, whole", {"lokr_w1": some(3, 8), "lokr_w2": some(2, 1)}),
        "PSG520: 'to_q' divides 6 by 3, and no factor does so in all modules",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_refused_and_nothing_is_written(kind: str, tmp_path: Path) -> None:
    tensors, message = BROKEN[kind]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match=message):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", f"{__name__}:image")
    assert not (tmp_path / "out").exists()


class Kernels(nn.Module):
    """Two kernels of several taps, one along one axis, and a linear of odd sides."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.line = nn.Conv1d(4, 8, 3)
        self.odd = nn.Linear(9, 9)


def kernels() -> Any:
    torch.manual_seed(0)
    return Kernels(), {}


def test_kernels_with_and_without_cores_are_refused(tmp_path: Path) -> None:
    with_core = {
        f"lora_unet_one.{n}": v for n, v in hadamard("one", (4, 4, 3, 3), 2, True)[0].items()
    }
    without = {
        f"lora_unet_two.{n}": v for n, v in hadamard("two", (4, 4, 3, 3), 2, False)[0].items()
    }
    save_file(with_core | without, tmp_path / "lora.safetensors")
    with pytest.raises(ps.SurgeryError, match="PSG520: 'lora_unet_two' has no core, and other"):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", f"{__name__}:kernels")


@pytest.mark.parametrize("kind", ["loha", "loha, cores", "lokr", "lokr, whole"])
def test_kernels_along_one_axis(kind: str, tmp_path: Path) -> None:
    sizes = (8, 4, 3)
    if kind == "loha, cores":
        parts, change = hadamard("line", (*sizes, 1), 2, True)
        parts |= {n: value[..., 0] for n, value in parts.items() if "_t" in n}
    elif kind == "loha":
        parts, change = hadamard("line", sizes, 2, False)
    else:
        parts, change = kronecker("line", sizes, 1, False, "12" if "whole" in kind else "1")
    tensors = {f"lora_unet_line.{n}": value for n, value in parts.items()}
    save_file(tensors | {"lora_unet_line.alpha": np.float32([ALPHA])}, tmp_path / "l.safetensors")
    if "whole" in kind:
        with pytest.raises(ps.SurgeryError, match=r"PSG520: .* whole, for a convolution along one"):
            ps.import_adapter(tmp_path / "l.safetensors", tmp_path / "out", f"{__name__}:kernels")
        return
    ps.import_adapter(tmp_path / "l.safetensors", tmp_path / "out", f"{__name__}:kernels")
    same(added(kernels()[0], tmp_path / "out"), {"line.weight": change.reshape(sizes)})


def test_a_whole_matrix_of_odd_sides(tmp_path: Path) -> None:
    parts, change = kronecker("odd", (9, 9), 1, False, "12")
    save_file(
        {f"lora_unet_odd.{n}": value for n, value in parts.items()}, tmp_path / "l.safetensors"
    )
    ps.import_adapter(tmp_path / "l.safetensors", tmp_path / "out", f"{__name__}:kernels")
    same(added(kernels()[0], tmp_path / "out"), {"odd.weight": change})


def test_a_table_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    parts, _ = hadamard("table", tuple(llama().model.embed_tokens.weight.shape), 2, False)
    tensors = {f"model.embed_tokens.{n}": value for n, value in parts.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(
        ps.SurgeryError, match=r"PSG520: .* is no linear and no convolution of torch"
    ):
        ps.import_adapter(tmp_path / "lora.safetensors", tmp_path / "out", tmp_path / "base")
