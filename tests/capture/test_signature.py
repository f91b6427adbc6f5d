"""A call of another kind makes another capture; sizes and values do so if code asks for them."""

from __future__ import annotations

import functools
import gc
import inspect
import random
import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftsurgery.capture import capture
from peftsurgery.capture.signature import bind_call
from peftsurgery.errors import SurgeryError
from tests.capture.pairs import assert_same, pair, pair_of
from tests.models.zoo import text


def test_calls_that_differ_in_sizes_only_share_a_capture() -> None:
    both = pair("llama")
    for batch, seq in ((2, 3), (5, 4), (1, 17)):
        assert_same(*both.run(**text(batch, seq)))
    assert len(both.graph.captures) == 1


def test_flags_of_the_original_are_captured_when_they_come() -> None:
    both = pair("llama")
    flags = {"output_hidden_states": True, "return_dict": False, "logits_to_keep": 1}
    assert_same(*both.run(**text(2, 6), **flags))
    assert len(both.graph.captures) == 2


def test_embeddings_and_positions_can_take_the_place_of_ids() -> None:
    both = pair("llama")
    inputs = {
        "inputs_embeds": torch.randn(2, 6, 32),
        "position_ids": torch.arange(6).repeat(2, 1) + 3,
        "attention_mask": torch.ones(2, 6).long(),
    }
    assert_same(*both.run(**inputs))


def test_arguments_may_be_given_by_position() -> None:
    both = pair("bert")
    inputs = text(2, 6)
    assert_same(*both.run(inputs["input_ids"], inputs["attention_mask"]))
    assert len(both.graph.captures) == 1


def test_images_of_another_size_are_another_capture() -> None:
    both = pair("resnet")
    for size in (32, 48):
        assert_same(*both.run(pixel_values=torch.randn(2, 3, size, size)))
    notes = " ".join(both.graph.captures[1].notes)
    assert "exact where dimension 2 of pixel_values is exactly 48" in notes
    vit = pair("vit")
    assert_same(
        *vit.run(pixel_values=torch.randn(2, 3, 48, 48), interpolate_pos_encoding=True),
    )


def test_arguments_that_forward_does_not_take_are_refused_by_name() -> None:
    with pytest.raises(SurgeryError, match="'z'") as caught:
        _branching().graph(x=torch.randn(2, 5, 4), z=3)
    assert caught.value.code == "PSG203"


def test_a_call_without_inputs_is_refused() -> None:
    with pytest.raises(SurgeryError) as caught:
        pair("bert").graph()
    assert caught.value.code == "PSG203"


class Branching(nn.Module):
    """Decides by sizes and flags what to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, double: bool = False) -> dict[str, Any]:
        if x.shape[1] > 16:
            x = x * 2
        if x.shape[1] == 1:
            x = x + 3
        if x.shape[0] * x.shape[1] % 3 == 0:
            x = x - 1
        y = self.into(x) * scale
        return {"y": y + y if double else y, "double": double, "none": None}


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_branches_on_sizes_are_taken_as_in_the_original(batch: int) -> None:
    both = _branching()
    for seq in (1, 2, 3, 16, 17, 18):
        assert_same(*both.run(torch.randn(batch, seq, 4)))
    assert len(both.graph.captures) <= 6


def _branching() -> Any:
    return pair_of(Branching(), {"x": torch.randn(2, 5, 4)})


def test_conditions_on_sizes_are_reported_in_words() -> None:
    notes = [note.partition(";")[0] for note in _branching().graph.captures[0].notes]
    sizes = ("1 of x is at most 16", "1 of x is other than 1", "2 of x is exactly 4")
    assert {f"exact where dimension {size}" for size in sizes} <= set(notes)


def test_flags_are_part_of_the_signature() -> None:
    both = _branching()
    x = torch.randn(2, 5, 4)
    for flags in ({"scale": 0.5}, {"scale": 2.0, "double": True}, {"double": True}):
        assert_same(*both.run(x, **flags))
    assert len(both.graph.captures) == 4


class Nested(nn.Module):
    """Takes and returns nested containers."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 3)

    def forward(self, batch: dict[str, Any], pair: tuple[Tensor, Tensor]) -> Any:
        first = self.into(batch["x"]) + batch["more"][0]
        return {"a": (first, [pair[0] * pair[1]]), "b": batch["k"], "same": pair[0]}


def test_nested_inputs_and_outputs_keep_their_shape() -> None:
    def inputs(n: int) -> dict[str, Any]:
        batch = {"x": torch.randn(n, 4), "more": [torch.randn(n, 3)], "k": 7}
        return {"batch": batch, "pair": (torch.randn(n, 2), torch.randn(n, 2))}

    both = pair_of(Nested(), inputs(3))
    assert_same(*both.run(**inputs(5)))
    assert len(both.graph.captures) == 1


class Variadic(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0] + xs[1]


def test_positional_variadics_are_refused() -> None:
    with pytest.raises(SurgeryError, match=r"\*xs") as caught:
        capture(Variadic(), (torch.randn(2), torch.randn(2)))
    assert caught.value.code == "PSG203"


class Counting(nn.Module):
    """Integers only, no parameter, a keyword dictionary."""

    def forward(self, **numbers: Tensor) -> Tensor:
        return numbers["a"].cumsum(0) + numbers["b"].sum()


def test_a_model_of_integers_without_parameters() -> None:
    both = pair_of(Counting(), {"a": torch.arange(4), "b": torch.arange(3)})
    assert_same(*both.run(a=torch.arange(9), b=torch.arange(2)))


def test_other_input_dtypes_are_other_captures() -> None:
    both = pair_of(Counting(), {"a": torch.arange(4), "b": torch.arange(3)})
    assert_same(*both.run(a=torch.randn(4), b=torch.arange(2)))
    assert len(both.graph.captures) == 2


class Mixed(nn.Module):
    """Takes arguments of every kind."""

    def forward(self, x: Any, /, y: Any = 3, *, z: Any, w: Any = None, **more: Any) -> Any:
        return x


def own_forward() -> nn.Module:
    module = Mixed()
    module.forward = lambda a, b=2, **more: a
    return module


VALUES = (torch.ones(2), torch.ones(2, dtype=torch.long), 1, True, None, [torch.ones(1)], "x", {})


@pytest.mark.parametrize("module", [Mixed(), own_forward(), pair("llama").original], ids=type)
def test_arguments_are_bound_as_python_binds_them_whatever_was_bound_before(module: Any) -> None:
    chosen = random.Random(0)
    names = ("y", "z", "w", "a", "b", "x", "input_ids", "attention_mask", "labels", "use_cache")
    signature = inspect.signature(module.forward)
    bound = 0
    for _ in range(600):
        args = tuple(chosen.choices(VALUES, k=chosen.randrange(4)))
        kwargs = {n: chosen.choice(VALUES) for n in chosen.sample(names, chosen.randrange(5))}
        try:
            given = dict(signature.bind(*args, **kwargs).arguments)
            if "x" in given.get("more", {}) and "x" in given:
                raise TypeError("two values for 'x'")
        except TypeError as error:
            with pytest.raises(SurgeryError, match=re.escape(str(error))) as caught:
                bind_call(module, args, kwargs)
            assert caught.value.code == "PSG203"
            continue
        more = {k: v for n in ("more", "kwargs") for k, v in given.pop(n, {}).items()}
        expected = {n: v for n, v in {**given, **more}.items() if v is not None}
        call = bind_call(module, args, kwargs)
        assert call.tensors.keys().isdisjoint(call.flags)
        found = {**call.tensors, **call.flags}
        assert found.keys() == expected.keys()
        assert all(found[name] is value for name, value in expected.items())
        assert all(isinstance(v, Tensor | list) for v in call.tensors.values())
        assert list(call.tensors) == sorted(call.tensors)
        bound += 1
    assert bound > 20


def test_a_forward_that_is_put_in_the_place_of_another_is_asked_anew() -> None:
    module, x = Variadic(), torch.ones(2)
    with pytest.raises(SurgeryError):
        bind_call(module, (x, x), {})
    module.forward = lambda first, second: first
    assert list(bind_call(module, (x, x), {}).tensors) == ["first", "second"]
    module.forward = lambda second, third: second
    assert list(bind_call(module, (x, x), {}).tensors) == ["second", "third"]
    kept = Variadic.forward
    try:
        Variadic.forward = lambda self, one, two: one
        del module.forward
        assert list(bind_call(module, (x, x), {}).tensors) == ["one", "two"]
    finally:
        Variadic.forward = kept


def test_a_module_is_not_kept_for_its_forward() -> None:
    module = Mixed()
    module.forward = functools.partial(Mixed.forward, module)
    bind_call(module, (torch.ones(2),), {"z": 1})
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_the_order_and_the_way_in_which_arguments_come_make_no_difference() -> None:
    both = pair("llama")
    x, mask = torch.randint(100, (2, 6)), torch.ones(2, 6).long()
    mask[0, 0] = 0
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, mask), {}),
        ((x,), {"attention_mask": mask}),
        ((), {"attention_mask": mask, "input_ids": x}),
        ((), {"use_cache": None, "input_ids": x, "attention_mask": mask}),
        ((), {"input_ids": mask, "attention_mask": x}),
        ((mask, mask), {}),
        ((x, None), {}),
    ]
    for _ in range(2):
        for args, kwargs in ways:
            assert_same(*both.run(*args, **kwargs))
