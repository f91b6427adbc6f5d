"""Write architectures as ONNX with adapters of six methods, and run the files in onnxruntime.

python -m tools.bench.onnx_sweep                      16 architectures, 6 methods
python -m tools.bench.onnx_sweep swin mamba --methods lora_all_linear dora
python -m tools.bench.onnx_sweep --done FILE          go on where FILE, which is written, ends

The models are those of the tests' zoo, small and with random weights. A file whose adapters are
inputs is made of one adapter and run at two sizes that its export has not seen: with nothing put
in, where the oracle is the original; with the adapter; and with one of another rank, whose oracle
is the model operated on with it. A folded file is run at the same sizes. A line says how far
onnxruntime is from the oracle; a change that is no weight's cannot be folded, and is refused. Exit
code 1 if anything is further away than 1e-5, refused without need, or ends without a code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import peftsurgery as ps
from tests.formats.onnx.sessions import with_adapter
from tests.models.zoo import ZOO, Inputs

ARCHITECTURES = (
    *("bert", "roberta", "deberta", "gpt2", "opt", "llama", "qwen3", "gemma2"),
    *("phi3", "falcon_7b", "gpt_neox", "bloom", "mixtral", "t5", "bart", "vit"),
)
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora_all_linear": ({"rank": 3, "alpha": 6}, {"rank": 5, "alpha": 2, "stabilised": True}),
    "dora": ({"rank": 3, "alpha": 6}, {"rank": 5, "alpha": 2}),
    "loha": ({"rank": 3, "alpha": 6}, {"rank": 5, "alpha": 2}),
    "ia3": ({}, {}),
    "pfeiffer": ({"reduction_factor": 8}, {"reduction_factor": 4}),
    "prefix_tuning": ({"length": 3}, {"length": 5}),
}
"""Settings of the adapter that a file is made of, and of the one that is put in its place."""
SEEN, UNSEEN = (2, 7), ((1, 5), (3, 12))
TOLERANCE = 1e-5
UNFOLDABLE = "PSG401"
Row = dict[str, str]


def main() -> int:
    """Print a line for each file, and how many are as they should be; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=METHODS)
    parser.add_argument("--seconds", type=float, default=180, help="for one row")
    parser.add_argument("--minutes", type=float, default=60, help="for all of them")
    parser.add_argument("--done", type=Path, help="results, a line of JSON for each row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = _read(options.done)
    wanted = [(a, m) for a in options.architectures for m in options.methods]
    end = time.monotonic() + 60 * options.minutes
    for key in wanted:
        if key in done or time.monotonic() > end:
            continue
        done[key] = bounded(*key, options.seconds)
        if options.done:
            with options.done.open("a") as file:
                file.write(json.dumps([*key, done[key]]) + "\n")
        for what, result in done[key].items():
            print(f"{key[0]:10} {key[1]:16} {what:8} {result[:150]}", flush=True)
    return _counted([done.get(key, {}) for key in wanted])


def _read(file: Path | None) -> dict[tuple[str, str], Row]:
    lines = file.read_text().splitlines() if file and file.exists() else []
    return {(a, m): row for a, m, row in map(json.loads, lines)}


def _counted(rows: Iterable[Row]) -> int:
    """Print what became of the files; 1 if one is not as it should be."""
    results = [result for row in rows for result in row.values()] + [
        "not run" for r in rows if not r
    ]
    for kind in sorted({result.split(":")[0].split(" ")[0] for result in results}):
        print(f"{kind:10} {sum(result.startswith(kind) for result in results):4} of {len(results)}")
    good = ("within", "unfoldable")
    return int(not all(result.startswith(good) for result in results))


def bounded(architecture: str, method: str, seconds: float) -> Row:
    """What became of the files of one row, each in a process that is given so much time."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    given = (architecture, method, sender)
    process = multiprocessing.get_context("fork").Process(target=attempt, args=given)
    process.start()
    sender.close()
    found: Row = {}
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            what, result = receiver.recv()
            found[what] = str(result)
        return {**found, "slow": f"slow: more than {seconds:.0f} s"}
    except EOFError:
        return found or {"all": "crashed: nothing was said"}
    finally:
        process.kill()
        process.join()


def attempt(architecture: str, method: str, answer: Connection) -> None:
    """Send what became of each file of a row."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.manual_seed(0)
    original: Any = ZOO[architecture].build().eval()
    graph = ps.capture(original, inputs=ZOO[architecture].inputs(*SEEN))
    for what, written in (("inputs", _with_inputs), ("folded", _folded)):
        answer.send((what, "crashed: an error without a code"))
        with tempfile.TemporaryDirectory() as folder:
            try:
                gap = written(Path(folder), architecture, method, original, graph)
                kind = "within" if gap <= TOLERANCE else "wrong"
                answer.send((what, f"{kind}: {gap:.1e}"))
            except ps.SurgeryError as error:
                kind = "unfoldable" if error.code == UNFOLDABLE else "refused"
                answer.send((what, f"{kind}: {str(error).splitlines()[0]}"))


def _with_inputs(folder: Path, kind: str, method: str, original: Any, graph: Any) -> float:
    """The largest difference of a file with adapters as inputs, off, on and swapped."""
    adapters = [_operated(graph, method, number) for number in (0, 1)]
    ps.export_onnx(adapters[0], folder / "m.onnx", adapters="inputs")
    gaps = _differences(folder / "m.onnx", kind, original)
    for number, model in enumerate(adapters):
        file = folder / f"{number}.onnx_adapter"
        ps.export_adapter(model, file, "ort")
        gaps += _differences(folder / "m.onnx", kind, model, file)
    return max(gaps)


def _folded(folder: Path, kind: str, method: str, original: Any, graph: Any) -> float:
    model = _operated(graph, method, 0)
    ps.export_onnx(model, folder / "m.onnx")
    return max(_differences(folder / "m.onnx", kind, model))


def _operated(graph: Any, method: str, number: int) -> ps.OperatedModel:
    """One of a method's two adapters, moved off its start."""
    model = ps.apply(graph, method, settings=METHODS[method][number])
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for value in model.learnt().values():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return model.eval()


def _differences(file: Path, kind: str, oracle: Any, adapter: Path | None = None) -> list[float]:
    """How far a file's first output is from the oracle's at each size, relative above 1."""
    runs = with_adapter(file, adapter)
    gaps = []
    for sizes in UNSEEN:
        inputs: Inputs = ZOO[kind].inputs(*sizes)
        with torch.no_grad():
            wanted = oracle(**inputs)[0]
        found = runs.run({n: v.numpy() for n, v in inputs.items()})[0]
        gap = float((torch.from_numpy(found) - wanted).abs().max())
        gaps.append(gap / max(1.0, float(wanted.abs().max())))
    return gaps


if __name__ == "__main__":
    sys.exit(main())
