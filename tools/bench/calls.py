"""What a call costs beside the original's: a tiny model's, a generated token's, one of mixed rows.

``python -m tools.bench calls`` prints two tables, each ratio from runs that take turns in one
process (see turns.py):

    a call      of a Llama of 2 layers of 32, where nearly all is Python's, in microseconds
    a token     a decoding step of a Llama of 8 layers of 512, one text, with a cache
    rows        32 texts, each with one of 2, 8 or 32 adapters, beside one adapter for all of them,
                and beside peft's ``adapter_names``

``ours`` is the captured model, ``lora`` the same with LoRA on all linears, ``merged`` with that in
its weights, ``peft`` peft's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import peftsurgery as ps
from tools.bench.fresh import measured
from tools.bench.turns import Times, median, ratio, shown, taken

RULE, RANK = "lora_all_linear", 8
LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 2000}
ROWS, ADAPTERS, LENGTHS = 32, ("2", "8", "32"), (1, 32, 128)
SETTINGS = {"target_modules": LINEARS, "lora_alpha": 16, "init_lora_weights": False}


def main(arguments: list[str]) -> int:
    """Measure what is named (all unless given), each in a process of its own."""
    wanted = arguments or ["call", "token", "rows"]
    beside = Table(title="one call over the original's: medians of turns (their middle half)")
    for column in ("what", "the original", "ours", "lora", "merged", "peft"):
        beside.add_column(column)
    for name in (each for each in ("call", "token") if each in wanted):
        times: Times = measured("calls", name)
        cells = [shown(ratio(times, other, "original")) for other in list(times)[1:]]
        beside.add_row(f"a {name}", f"{1e3 * median(times, 'original'):.0f} us", *cells)
    rows = Table(title=f"{ROWS} rows with adapters of their own: medians (middle half)")
    for column in ("adapters", "tokens a row", "one adapter", "over one adapter", "over peft's"):
        rows.add_column(column)
    for adapters in ADAPTERS if "rows" in wanted else ():
        for length, row in measured("calls", "rows", adapters).items():
            over = [shown(ratio(row, "rows", other)) for other in ("one", "peft")]
            rows.add_row(adapters, length, f"{median(row, 'one'):.1f} ms", *over)
    for table in (beside, rows):
        if table.row_count:
            Console(width=132).print(table)
    return 0


def call() -> Times:
    """Milliseconds of a call of four tokens of a tiny model."""
    models = _models(_base(TINY))
    ids = torch.ones(1, 4, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return _taken({name: _called(model, batch) for name, model in models.items()}, 400)


def token() -> Times:
    """Milliseconds of a decoding step after 64 tokens."""
    models = _models(_base(SMALL))
    ids = torch.ones(1, 64, dtype=torch.long)
    return _taken({name: _decoding(model, ids) for name, model in models.items()}, 120)


@torch.no_grad()
def rows(adapters: str) -> dict[str, Times]:
    """Milliseconds of a call of 32 rows by their length, each row with one of so many adapters."""
    import peft

    base, count = _base({**SMALL, "num_hidden_layers": 2}), int(adapters)
    ours: Any = ps.capture(base)
    theirs = peft.get_peft_model(copy.deepcopy(base), _settings(), "a0")
    for number in range(count):
        ours = ps.apply(ours, RULE, name=f"a{number}", rank=RANK)
        if number:
            theirs.add_adapter(f"a{number}", _settings())
    ours.eval(), theirs.eval(), ours.choose("a0")
    names = [f"a{row % count}" for row in range(ROWS)]
    found = {}
    for length in LENGTHS:
        batch = {"input_ids": torch.randint(2000, (ROWS, length))}
        runs = {
            "one": _called(ours, batch),
            "rows": _called(ours, {**batch, "adapters": names}),
            "peft": _called(theirs, {**batch, "adapter_names": names}),
        }
        found[str(length)] = _taken(runs, 12)
    return found


def _base(sizes: dict[str, int]) -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heads = sizes["hidden_size"] // 64 or 4
    config = LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=heads)
    return LlamaForCausalLM(config).eval()


def _models(base: LlamaForCausalLM) -> dict[str, Any]:
    """The original, ours without and with LoRA, with that in the weights, and peft's."""
    import peft

    lora = ps.apply(ps.capture(base), RULE, rank=RANK).eval()
    merged = copy.deepcopy(lora)
    merged.merge()
    theirs = peft.get_peft_model(copy.deepcopy(base), _settings()).eval()
    models = {"original": base, "ours": ps.capture(base).eval(), "lora": lora}
    return {**models, "merged": merged, "peft": theirs}


def _settings() -> Any:
    import peft

    return peft.LoraConfig(r=RANK, **SETTINGS)


def _called(model: Any, batch: dict[str, Any]) -> Callable[[], Any]:
    return lambda: model(**batch, use_cache=False)


def _decoding(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """A step that adds a token to a cache of the model's own."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)

    def step() -> None:
        seen = cache.get_seq_length()
        positions = torch.tensor([[seen]])
        mask = torch.ones(1, seen + 1, dtype=torch.long)
        given = {"input_ids": ids[:, :1], "attention_mask": mask, "position_ids": positions}
        model(**given, past_key_values=cache, use_cache=True)

    return step


@torch.no_grad()
def _taken(runs: dict[str, Callable[[], Any]], turns: int) -> Times:
    return taken(runs, turns)
