"""Capture every class of transformers, and some of others, small with random weights; operate.

python -m tools.bench.sweep --seconds 60 --minutes 30     every class of the mappings
python -m tools.bench.sweep causal:llama base:clip bert   some of them
python -m tools.bench.sweep --done FILE                   go on where FILE, which is written, ends

Each is captured in a process of its own and compared with the original at a shape it was not
captured with, and with tokens hidden. It is exact, or refused with a code, or has no small config
that this script can make (unfit), or wrong. On each exact capture, `lora_qv` and `lora_all_linear`
are applied, given random numbers and folded; the oracle is arithmetic of this script's own: the
folded weights minus the original ones must be what the factors give, at the rows that the report
names, and nothing elsewhere; and the original model is asked whether the roles are right
(:mod:`.sweep_probes`). What a rule says of a model that it refuses is printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tools.bench.sweep_beyond import SAMPLES, fit_sample
from tools.bench.sweep_models import FAILURES, all_models, fit_model
from tools.bench.sweep_probes import misplaced

MEMORY = 8 << 30  # bytes that one model may take
RULES = ("lora_qv", "lora_all_linear")


def swept(name: str, send: Callable[[tuple[str, str]], None]) -> None:
    """Capture, compare, and apply the rules; sends a word for each, when the original has run."""
    import torch

    import peftsurgery as ps
    from peftsurgery.capture import capture
    from peftsurgery.capture.prepared import without_fast_path

    example: dict[str, Any] | None
    model: Any
    if name in SAMPLES:
        model, example, inputs = fit_sample(name)
        with torch.no_grad(), without_fast_path():
            expected = model(**inputs)
    else:
        model, example, inputs, expected = fit_model(name)
    with torch.no_grad():
        send(("capture", "begun"))
        captured = capture(model, example)
        send(("capture", compared(expected, captured(**inputs))))
        hidden = with_hidden_tokens(inputs)
        expected = None if hidden is None else _returned(model, hidden)
        if hidden is not None and expected is not None:
            send(("hidden", "begun"))
            send(("hidden", compared(expected, captured(**hidden))))
    for rule in RULES:
        send((rule, "begun"))
        send((rule, operated(model, captured, rule, inputs)))
    send(("probes", "begun"))
    wrong_roles = misplaced(model, ps.sites(captured), inputs)
    send(("probes", f"wrong: {', '.join(wrong_roles)}" if wrong_roles else "agree"))


def _returned(model: Any, inputs: dict[str, Any]) -> Any:
    """What a model returns; None if it fails."""
    try:
        return model(**inputs)
    except FAILURES:
        return None


def compared(original: Any, captured: Any) -> str:
    """Whether a captured model returns the bits that the original does."""
    import torch

    pairs = zip(tensors_in(returned_too(captured, original)), tensors_in(captured), strict=True)
    wrong = [
        (a.float() - b.float()).abs().nan_to_num(torch.inf).max().item()
        for a, b in pairs
        if a.shape != b.shape or not ((a == b) | ((a != a) & (b != b))).all()
    ]
    return f"wrong by {max(wrong):.1e}" if wrong else "exact"


def with_hidden_tokens(inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The inputs with the first tokens of one row hidden and the last of another.

    None without a mask of tokens, or with one that hides some already.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or min(mask.shape) < 2 or not mask.all():
        return None
    mask = mask.clone()
    mask[0, :2], mask[-1, -3:] = 0, 0
    return {**inputs, "attention_mask": mask}


def operated(model: Any, captured: Any, rule: str, inputs: dict[str, Any]) -> str:
    """What became of a rule: how much of the model it reached, why not, or what it did wrong."""
    import torch

    import peftsurgery as ps

    try:
        made = ps.apply(captured, rule)
        torch.manual_seed(1)
        with torch.no_grad():
            for name in made.report.added:
                parameter = made.get_parameter(name)
                parameter.copy_(torch.randn_like(parameter) / 8)
        folded = ps.fold(made)
        wrong = wrong_weights(model, made, folded)
        with torch.no_grad():
            returned, told = folded(**inputs), made(**inputs)
            returned = returned_too(told, returned)
            for a, b in zip(tensors_in(returned), tensors_in(told), strict=True):
                if not torch.allclose(a, b, atol=1e-3, rtol=1e-3):
                    wrong.append(f"outputs by {(a - b).abs().max():.1e}")
    except ps.SurgeryError as error:
        return f"refused: {str(error).splitlines()[0]}"
    if wrong:
        return f"wrong: {', '.join(wrong)}"
    left = {role: share for role, share in made.report.coverage.roles.items() if share.matched == 0}
    return f"applied at {len(made.report.matches)}" + (f", not {', '.join(left)}" if left else "")


def returned_too(captured: Any, original: Any) -> Any:
    """What the original returns of what the captured model returns, in outputs within outputs too.

    What a model remembers for the next call is not captured unless asked for.
    """
    if not isinstance(captured, Mapping):
        return original
    return {key: returned_too(value, original[key]) for key, value in captured.items()}


def tensors_in(returned: Any) -> list[Any]:
    """The tensors of what a model returns, in order."""
    import torch
    from torch.utils import _pytree as pytree

    return [leaf for leaf in pytree.tree_leaves(returned) if isinstance(leaf, torch.Tensor)]


def wrong_weights(model: Any, made: Any, folded: Any) -> list[str]:
    """The weights whose change is not what the factors of the report's matches give."""
    import torch
    from transformers.pytorch_utils import Conv1D

    before = {name: value.double() for name, value in model.state_dict().items()}
    expected = {name: value.clone() for name, value in before.items()}
    # a weight that is used twice is told twice, and changed once
    matches = {tuple(match["added"]): match for match in made.report.matches}
    for match in matches.values():
        A, B = (made.get_parameter(name).double() for name in sorted(match["added"]))
        change, part = 2 * (B @ A), match["slice"]
        weight = expected.get(match["parameter"])
        if weight is None or weight.dim() != 2:
            expected.pop(match["parameter"], None)  # under other axes: what the fold returns tells
            continue
        is_turned = isinstance(model.get_submodule(match["module"]), Conv1D)
        is_turned |= part is None and weight.shape != change.shape  # a parameter of no module
        held = weight.mT if is_turned else weight
        if part is None:
            held += change
        else:
            rows = torch.arange(len(held))
            inside = (rows % part["period"] - part["start"]) % part["period"] < part["length"]
            held[rows[inside]] += change
    after = folded.state_dict()
    return [
        name
        for name, value in expected.items()
        if value.is_floating_point()
        and not torch.allclose(after[name].double(), value, atol=1e-5, rtol=1e-5)
    ]


def attempt(kind: str, answer: Connection) -> None:
    """Send what became of one model type; nothing at all if its original fails."""
    from peftsurgery.errors import SurgeryError

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    step, begun = "capture", False

    def send(said: tuple[str, str]) -> None:
        nonlocal step, begun
        step, begun = said[0], True
        answer.send(said)

    try:
        swept(kind, send)
    except SurgeryError as error:
        send((step, f"refused: {str(error).splitlines()[0]}"))
    except FAILURES as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        send((step, f"{'crashed' if begun else 'unfit'}: {text}"))


def bounded(kind: str, seconds: float) -> dict[str, str]:
    """What became of one model type within a time, by step."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=attempt, args=(kind, sender))
    process.start()
    sender.close()
    found: dict[str, str] = {}
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            step, result = receiver.recv()
            found[step] = str(result)
        return {**found, "slow": "it took too long"}
    except EOFError:
        return found or {"capture": "unfit: no small config, or the original fails"}
    finally:
        process.kill()
        process.join()


def warm() -> None:
    """Sweep one small model here, so that the forks find imported what all of them need."""
    swept("causal:llama", lambda said: None)
    gc.collect()
    gc.freeze()  # else every collection in a fork walks, and so copies, what the parent made


def main() -> None:
    """Print a line for each step of each model type, and the counts."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--seconds", type=float, default=60, help="for one model")
    parser.add_argument("--minutes", type=float, default=30, help="for all of them")
    parser.add_argument("--done", type=Path, help="results, a line of JSON for each model type")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warm()
    done: dict[str, dict[str, str]] = {}
    if options.done and options.done.exists():
        done = dict(json.loads(line) for line in options.done.read_text().splitlines())
    end = time.monotonic() + 60 * options.minutes
    kinds = options.kinds or [*all_models(), *SAMPLES]
    for kind in kinds:
        if kind not in done and time.monotonic() < end:
            done[kind] = bounded(kind, options.seconds)
            if options.done:
                with options.done.open("a") as file:
                    file.write(json.dumps([kind, done[kind]]) + "\n")
            for step, result in done[kind].items():
                print(f"{kind:28} {step:16} {result[:150]}", flush=True)
    counts = Counter(
        (step, result.split(":")[0].split(" ")[0])
        for kind in kinds
        for step, result in done.get(kind, {}).items()
    )
    for (step, result), count in sorted(counts.items()):
        print(f"{step:16} {result:10} {count:4} of {len(kinds)}")


if __name__ == "__main__":
    main()
