"""What may be done to a module from outside: it works as on the original, or is refused by code.

The oracle is the original with the same done to it.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization
from torch.utils import _pytree as pytree
from transformers.integrations.neftune import activate_neftune

import peftsurgery as ps
from tests.parity.models import base, captured, randomise

BLOCKS = {"llama": "model.layers", "bert": "bert.encoder.layer"}
QUERIES = {"llama": "0.self_attn.q_proj", "bert": "0.attention.self.query"}
Do = Callable[[nn.Module, str, str], object]


def batch() -> dict[str, Tensor]:
    """Text with padding, so that there is a mask to pass on."""
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def listen(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """What hooks on all parts are given, in order, and the hooks."""
    seen: list[Any] = []

    def before(path: str, args: Any, kwargs: Any) -> None:
        seen.append((path, args, kwargs))

    def after(path: str, result: Any) -> None:
        seen.append((path, result))

    handles: list[Any] = []
    for path, part in model.named_modules():
        if path and ".lora_qv" not in path:
            handles += [
                part.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: before(path, args, kwargs), with_kwargs=True
                ),
                part.register_forward_hook(lambda _, args, result, path=path: after(path, result)),
            ]
    return seen, handles


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])
def test_hooks_on_all_parts_see_what_the_originals_do(name: str) -> None:
    original, model = base(name), deepcopy(captured(name))
    inputs = batch()
    if name == "t5":  # a mask that hides something is made by the original, too
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    plain = model(**inputs).logits
    expected, _ = listen(original)
    seen, handles = listen(model)
    assert torch.equal(model(**inputs).logits, original(**inputs).logits)
    assert [path for path, *_ in seen] == [path for path, *_ in expected]
    for mine, theirs in zip(seen, expected, strict=True):
        (values, structure), (wanted, form) = pytree.tree_flatten(mine), pytree.tree_flatten(theirs)
        assert structure == form, mine[0]
        for value, other in zip(values, wanted, strict=True):
            same = torch.equal if isinstance(value, Tensor) else type(value).__eq__
            assert same(value, other), mine[0]
    for handle in handles:
        handle.remove()
    number = len(seen)
    assert torch.equal(model(**inputs).logits, plain)
    assert len(seen) == number


def test_hooks_on_an_operated_model_see_its_own_values() -> None:
    model = ps.apply(captured("llama"), "lora_qv", rank=4, alpha=4)
    randomise(model, lambda name: ".lora_qv." in name)
    expected = model(**batch()).logits
    seen, _ = listen(model)
    assert torch.equal(model(**batch()).logits, expected)
    path = "model.layers.0.self_attn.q_proj"
    (_, (x,), _), (_, result) = (note for note in seen if note[0] == path)
    part = model.get_submodule(path)
    low = part.get_submodule("lora_qv")
    branch = x @ low.A.T @ low.B.T  # alpha is the rank
    assert torch.allclose(result, x @ part.weight.T + branch, atol=1e-6)


def doubled(_: nn.Module, args: Any, result: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda value: value * 2, result)


class Wrapped(nn.Module):
    """A module around another one, as libraries put them in its place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return doubled(self, args, self.inner(*args, **kwargs))


class Skipped(nn.Module):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def put(model: nn.Module, path: str, part: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    setattr(model.get_submodule(holder), name, part)


def new_linear(model: nn.Module, query: str, _: str) -> None:
    torch.manual_seed(1)
    rows, columns = model.get_parameter(f"{query}.weight").shape
    put(model, query, nn.Linear(columns, rows))


def adding(model: nn.Module, query: str, _: str) -> None:
    part = model.get_submodule(query)
    forward = part.forward
    part.forward = lambda x: forward(x) + 1


def seeded(function: Callable[..., Any]) -> Do:
    def do(model: nn.Module, query: str, _: str) -> None:
        torch.manual_seed(1)
        function(model.get_submodule(query))

    return do


DONE: dict[str, Do] = {
    "hook": lambda m, q, _: m.get_submodule(q).register_forward_hook(doubled),
    "hook on a block": lambda m, _, b: m.get_submodule(f"{b}.1").register_forward_hook(doubled),
    "hook before": lambda m, q, _: m.get_submodule(q).register_forward_pre_hook(
        lambda _, args: (args[0] + 1,)
    ),
    "hook before a block": lambda m, _, b: m.get_submodule(f"{b}.1").register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + 1, *args[1:]), kwargs), with_kwargs=True
    ),
    "wrapped": lambda m, q, _: put(m, q, Wrapped(m.get_submodule(q))),
    "wrapped block": lambda m, _, b: put(m, f"{b}.0", Wrapped(m.get_submodule(f"{b}.0"))),
    "skipped block": lambda m, _, b: put(m, f"{b}.1", Skipped()),
    "other block": lambda m, _, b: put(m, f"{b}.0", m.get_submodule(f"{b}.1")),
    "copied block": lambda m, _, b: put(m, f"{b}.0", deepcopy(m.get_submodule(f"{b}.1"))),
    "new linear": new_linear,
    "forward": adding,
    "parametrize": lambda m, q, _: register_parametrization(
        m.get_submodule(q), "weight", Doubling()
    ),
    "weight_norm": seeded(parametrizations.weight_norm),
    "spectral_norm": seeded(parametrizations.spectral_norm),
    "weight_norm by hooks": seeded(nn.utils.weight_norm),
    "spectral_norm by hooks": seeded(nn.utils.spectral_norm),
    "prune": lambda m, q, _: prune.l1_unstructured(m.get_submodule(q), "weight", amount=0.3),
    "new weight": lambda m, q, _: setattr(
        m.get_submodule(q), "weight", nn.Parameter(m.get_parameter(f"{q}.weight").detach() * 2)
    ),
    "apply": lambda m, *_: m.apply(rescaled),
    "double": lambda m, *_: m.double(),
    "assigned": lambda m, *_: m.load_state_dict(
        {name: value.clone() * 1.5 for name, value in m.state_dict().items()}, assign=True
    ),
}


@torch.no_grad()
def rescaled(part: nn.Module) -> None:
    if isinstance(part, nn.LayerNorm | nn.Embedding):
        part.weight = nn.Parameter(part.weight * 1.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("done", DONE)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_is_done_to_a_module_does_what_it_does_to_the_original(name: str, done: str) -> None:
    logits = []
    for model in (base(name), deepcopy(captured(name))):
        DONE[done](model, f"{BLOCKS[name]}.{QUERIES[name]}", BLOCKS[name])
        torch.manual_seed(0)
        logits.append(model(**batch()).logits)
    assert torch.equal(*logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("done", ["hook", "wrapped", "parametrize", "weight_norm by hooks"])
def test_it_is_done_to_an_operated_model_too(done: str) -> None:
    # a rule that does nothing yet: the original is the oracle
    original, model = base("llama"), ps.apply(captured("llama"), "lora_qv")
    for each in (original, model):
        DONE[done](each, f"{BLOCKS['llama']}.{QUERIES['llama']}", BLOCKS["llama"])
    assert torch.equal(model(**batch()).logits, original(**batch()).logits)


@pytest.mark.parametrize(
    "do",
    [
        lambda m: m.model.layers.__delitem__(1),
        lambda m: m.model.layers.append(nn.Identity()),
        lambda m: m.model.layers.insert(0, nn.Identity()),
        lambda m: delattr(m.model, "norm"),
        lambda m: setattr(m.model, "norm", None),
        lambda m: setattr(m.model, "layers", None),
        lambda m: m.model.add_module("norm", None),
        lambda m: m.model.layers.__setitem__(0, None),
        lambda m: setattr(m.model, "layers", nn.ModuleList(list(m.model.layers)[:1])),
        lambda m: setattr(m.model, "layers", nn.ModuleList([*m.model.layers, nn.Identity()])),
        lambda m: setattr(m.model, "layers", nn.ModuleList([nn.Identity(), nn.Identity()])),
        lambda m: setattr(m.model, "layers", nn.ModuleList([m.model.norm, m.model.norm])),
        lambda m: setattr(m.model, "layers", nn.Identity()),
        lambda m: setattr(m.model.layers[0].self_attn, "scaling", 2.0),
        lambda m: m.model.layers[0].self_attn.q_proj.lora_qv.register_forward_hook(doubled),
        lambda m: m.model.layers[0](torch.ones(1, 3, 32)),
        lambda m: m.model.layers[0].mlp(torch.ones(1, 3, 32)),
    ],
)
def test_what_a_capture_cannot_follow_is_refused_when_it_is_done(do: Callable[[Any], Any]) -> None:
    model = ps.apply(captured("llama"), "lora_qv")
    expected = model(**batch()).logits
    with pytest.raises(ps.SurgeryError, match="PSG2"):
        do(model)
    assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize("result", [lambda y: (y, y), lambda y: {"y": y}])
def test_a_hook_that_returns_another_structure_is_refused(result: Callable[[Any], Any]) -> None:
    model = deepcopy(captured("llama"))
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, y: result(y))
    with pytest.raises(ps.SurgeryError, match=r"PSG221.*layers\.0\.mlp"):
        model(**batch())


def test_gradients_pass_backward_hooks_as_in_the_original() -> None:
    seen: list[list[Tensor]] = []
    gradients = []
    for model in (base("llama"), deepcopy(captured("llama"))):
        noted: list[Tensor] = []
        part = model.get_submodule("model.layers.1.mlp.down_proj")
        part.register_full_backward_pre_hook(lambda _, out, noted=noted: noted.append(out[0]))
        part.register_full_backward_hook(lambda _, into, out: (into[0] * 2,))
        model(**batch()).loss.backward()
        seen.append(noted)
        gradients.append(model.get_parameter("model.layers.0.mlp.up_proj.weight").grad)
    assert torch.allclose(seen[0][0], seen[1][0], atol=1e-7)
    assert torch.allclose(*gradients, atol=1e-7)


@pytest.mark.slow
def test_hooks_steer_generation_and_are_gone_once_they_are_removed() -> None:
    original = base("llama")
    original.config.use_cache = True
    model = ps.apply(ps.capture(original, cache=True), "lora_qv")
    tokens = batch()["input_ids"]
    written = []
    for each in (original, model):
        texts = [each.generate(tokens, max_new_tokens=3, do_sample=False)]
        handles = [
            each.get_submodule(path).register_forward_hook(doubled)
            for path in ("model.layers.0.mlp", "model.layers.1", "model.layers.1.self_attn.o_proj")
        ]
        texts.append(each.generate(tokens, max_new_tokens=3, do_sample=False))
        for handle in handles:
            handle.remove()
        texts.append(each.generate(tokens, max_new_tokens=3, do_sample=False))
        written.append(texts)
    assert all(torch.equal(*pair) for pair in zip(*written, strict=True))
    assert not torch.equal(written[0][0], written[0][1])


def test_a_parametrised_adapter_trains_rests_saves_and_folds(tmp_path: Path) -> None:
    model = ps.apply(captured("llama"), "lora_qv")
    randomise(model, lambda name: ".lora_qv." in name)
    doubled_by_hand = deepcopy(model)
    path = "model.layers.0.self_attn.q_proj.lora_qv"
    with torch.no_grad():
        doubled_by_hand.get_parameter(f"{path}.A").mul_(2)
    expected = doubled_by_hand(**batch()).logits
    register_parametrization(model.get_submodule(path), "A", Doubling())
    assert torch.equal(model(**batch()).logits, expected)
    assert f"{path}.parametrizations.A.original" in model.state_dict()
    model.deactivate()
    stored = model.get_submodule(f"{path}.parametrizations.A").original
    assert not stored.requires_grad
    model.activate()
    assert stored.requires_grad
    assert torch.allclose(ps.fold(model)(**batch()).logits, expected, atol=1e-5)
    model.save(tmp_path / "surgery")
    with torch.no_grad():
        saved = load_file(tmp_path / "surgery" / "adapter.safetensors")
    assert torch.equal(saved[f"{path}.A"], stored * 2)


def test_what_is_not_the_captures_own_is_not_folded_or_saved(tmp_path: Path) -> None:
    model = ps.apply(captured("llama"), "lora_qv")
    put(model, "model.layers.0.mlp.up_proj", nn.Linear(32, 48, bias=False))
    for refused in (lambda: ps.fold(model), lambda: model.save(tmp_path / "surgery")):
        with pytest.raises(ps.SurgeryError, match=r"PSG220.*layers\.0\.mlp\.up_proj"):
            refused()


def test_a_trainers_noise_reaches_the_embeddings() -> None:
    losses = []
    for model in (base("llama"), ps.apply(captured("llama"), "lora_qv")):
        activate_neftune(model.train(), 5)  # as a Trainer does with neftune_noise_alpha
        torch.manual_seed(0)
        losses.append(model(**batch()).loss)
    assert torch.allclose(*losses, atol=1e-6)
    assert not torch.allclose(losses[0], base("llama")(**batch()).loss, atol=1e-3)
