"""Filled-in graphs beside plain traces, for the whole zoo: node by node, in every signature.

    python -m tools.traces            every model; or those that are named
    python -m tools.traces --layers 6 llama

A line says how many blocks were filled in; the exit code is 1 if a graph is not the plain trace's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from peftsurgery import SurgeryError
from tests.models.traces import compared, deeper
from tests.models.zoo import ZOO, Inputs


def main() -> int:
    """Compare; 1 for a difference."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(ZOO), metavar="MODEL")
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    differ = 0
    for name in given.names or ZOO:
        for signature, inputs in signatures(name):
            for training in (False, True):
                where = f"{name} {signature} {'train' if training else 'eval'}"
                try:
                    filled = compared(deeper(name, given.layers).train(training), inputs)
                    print(where, f"equal, {len(filled)} filled in", flush=True)
                except SurgeryError as error:
                    print(where, f"refused: {error}", flush=True)
                except AssertionError as error:
                    differ += 1
                    print(where, f"DIFFERS: {str(error)[:200]}", flush=True)
    return int(differ > 0)


def signatures(name: str) -> Iterator[tuple[str, Inputs]]:
    """The plain inputs of a model; of one of text also with labels, and with embeddings."""
    inputs = ZOO[name].inputs(2, 6)
    yield "plain", inputs
    if "input_ids" not in inputs:
        return
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    yield "embeddings", {**rest, "inputs_embeds": torch.randn(2, 6, 32)}
    if "decoder_input_ids" in inputs:
        del rest["decoder_input_ids"]
        yield "labels", {**rest, "input_ids": inputs["input_ids"], "labels": inputs["input_ids"]}
    elif type(ZOO[name].build()).__name__.endswith("LMHeadModel") or "CausalLM" in str(
        type(ZOO[name].build())
    ):
        yield "labels", {**inputs, "labels": inputs["input_ids"]}


if __name__ == "__main__":
    sys.exit(main())
