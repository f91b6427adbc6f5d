"""Run by two processes: each trains on half of a batch, and alone on the whole of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peftsurgery as ps
from peftsurgery.capture import Block
from peftsurgery.capture.sharded import await_released, whole
from peftsurgery.surgery.model.operated import OperatedModel
from tests.parity.models import batch, captured
from tests.surgery.reference import randomise

WHOLE = batch(4, 6)
Change = Callable[[OperatedModel], Any]


def made(*rules: str, name: str = "llama", **settings: Any) -> OperatedModel:
    """A model with adapters, the same in all processes."""
    model: Any = captured(name)
    torch.manual_seed(5)
    for number, rule in enumerate(rules):
        model = ps.apply(model, rule, name=f"n{number}", **settings)
    trained: OperatedModel = randomise(model, scale=0.3).train()
    return trained


def sharded(model: OperatedModel) -> OperatedModel:
    """FSDP2 as torch says: each block, then the whole."""
    for part in model.modules():
        if isinstance(part, Block):
            fully_shard(part)
    fully_shard(model)
    return model


def step(model: nn.Module, inputs: Mapping[str, Tensor], **more: Any) -> dict[str, Tensor]:
    """The loss, and the gradients by name, of one step."""
    model.zero_grad()
    loss = model(**inputs, **more).loss
    loss.backward()
    found = {
        name.removeprefix("module."): whole(value.grad)
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    return {"loss": loss.detach(), **found}


def difference(
    wrap: Callable[[OperatedModel], nn.Module],
    *rules: str,
    change: Change | None = None,
    **more: Any,
) -> float:
    """The largest difference of a step of all processes from one of this process alone."""
    rows, own = more.pop("rows", None), slice(*(2 * distributed.get_rank() + n for n in (0, 2)))
    alone, model = made(*rules, **more), made(*rules, **more)
    wrapped = wrap(model)
    for each in (alone, model):
        if change is not None:
            change(each)
    parts = [{} if rows is None else {"adapters": names} for names in (rows, rows and rows[own])]
    expected = step(alone, WHOLE, **parts[0])
    mine = {name: value[own] for name, value in WHOLE.items()}
    actual = step(wrapped, mine, **parts[1])
    distributed.all_reduce(actual["loss"])
    actual["loss"] /= distributed.get_world_size()
    assert actual.keys() == expected.keys()
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected)


def allocated(model: OperatedModel, inputs: Mapping[str, Tensor]) -> list[list[bool]]:
    """The ranks that a budget leaves."""
    allocator = ps.RankAllocator(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for number in range(4):
        step(model, inputs)
        optimizer.step()
        allocator.step(number)
    return [kept.tolist() for kept in allocator.kept.values()]


def compiled(model: OperatedModel) -> None:
    model.compile(backend="aot_eager")
    model.gradient_checkpointing()


def hooked(model: OperatedModel) -> None:
    part = model.get_submodule("model.layers.1.mlp.up_proj")
    part.register_forward_hook(lambda part, args, output: output / 2)


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    found: dict[str, Any] = {
        "ddp": difference(DistributedDataParallel, "lora_qv"),
        "ddp, a penalty": difference(DistributedDataParallel, "adalora"),
        "fsdp": difference(sharded, "lora_qv"),
        "fsdp, computed again": difference(
            sharded, "lora_qv", change=OperatedModel.gradient_checkpointing
        ),
        "fsdp, compiled": difference(sharded, "lora_all_linear", change=compiled),
        "fsdp, a hook": difference(sharded, "lora_qv", change=hooked),
        "fsdp, another adapter": difference(
            sharded, "lora_qv", "ia3", change=lambda model: model.choose("n1")
        ),
        "fsdp, rows": difference(sharded, "lora_qv", "lora_qv", rows=["n0", "n1", "n1", "n0"]),
        "fsdp, a penalty": difference(sharded, "adalora"),
        "fsdp, prefixes": difference(sharded, "prefix_tuning"),
        "fsdp, trained biases": difference(sharded, "bitfit", name="gpt2"),
    }
    ranks = {"rank": 4, "target": 2, "total_steps": 4, "final_steps": 1}
    found["ranks"] = [
        allocated(sharded(made("adalora", **ranks)), WHOLE),
        allocated(made("adalora", **ranks), WHOLE),
    ]
    model, alone = (
        sharded(made("lora_qv", "bitfit", name="gpt2")),
        made("lora_qv", "bitfit", name="gpt2"),
    )
    model.save(folder / "sharded")
    found["seen after save"] = sorted(file.name for file in (folder / "sharded").iterdir())
    alone.save(folder / f"alone-{distributed.get_rank()}")
    codes = []
    (folder / "taken").mkdir(exist_ok=True)
    (folder / "taken" / "file").touch()
    for refused in (
        lambda: model.save(folder / "taken"),
        lambda: ps.fold(model),
        lambda: ps.to_peft(model, folder / "peft"),
        lambda: ps.apply(model, "ia3"),
        lambda: ps.eject(model, "n0"),
        lambda: ps.export_adapter(model, folder / "vllm", to="vllm"),
        lambda: ps.as_lora(model),
        lambda: model.eval().merge(),
    ):
        try:
            refused()
            codes.append("")
        except ps.SurgeryError as error:
            codes.append(error.code)
    found["codes"] = codes
    file = folder / f"{distributed.get_rank()}.json"
    file.write_text(json.dumps(found), encoding="utf-8")
    await_released()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
