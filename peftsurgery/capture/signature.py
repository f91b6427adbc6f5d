"""Signatures: which inputs a call gives, and what of them a capture may not change.

A model is captured once per signature: the names and kinds of its tensor inputs, and the values of
everything else (flags such as ``output_attentions``). Sizes are not part of a signature; a capture
has conditions on them, and a call that does not meet them makes another capture.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils import _pytree as pytree

from peftsurgery.capture.kv_cache import STRETCH, Past, Traced, is_cache
from peftsurgery.capture.withheld import refused
from peftsurgery.errors import SurgeryError

MASK = "attention_mask"  # the name it has in every model of transformers, as have these
TEXT = ("input_ids", "inputs_embeds")
PLAIN = (bool, int, float, str)  # what holds no tensor, as one look tells


@dataclass(frozen=True)
class Call:
    """The arguments of one call, by name: ``tensors`` hold at least one tensor, ``flags`` none.

    ``past`` is the cache among them, if there is one; ``trace`` stands for it in a trace.
    """

    tensors: Mapping[str, Any]
    flags: Mapping[str, Any]
    past: Past | None = None
    trace: Traced | None = None

    @cached_property
    def leaves(self) -> tuple[Any, ...]:
        """The values of the call in the order in which a captured graph takes them."""
        past = () if self.past is None else (self.past.cache,)
        values = tuple(self.tensors.values())
        if any(type(value) is not torch.Tensor for value in values):
            values = tuple(pytree.tree_leaves(dict(self.tensors)))
        return (*values, *past)

    @cached_property
    def signature(self) -> str:
        """Text key of a call's structure.

        Equal for calls that one capture can serve, sizes aside.
        """
        kinds = [(name, _kind(value)) for name, value in self.tensors.items()]
        past = self.past and self.past.signature
        return repr((kinds, sorted(self.flags.items(), key=lambda item: item[0]), past))


def _kind(value: Any) -> Any:
    """Structure of an argument: nesting, dtype and rank of tensors, values of flags."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.ndim
    leaves, spec = pytree.tree_flatten(value)
    return spec, [_kind(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves]


def bind_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """Name the arguments of ``module(*args, **kwargs)``; arguments that are None are left out.

    Raises PSG203 if the module's forward does not take them.
    """
    try:
        places = _places(module, len(args), tuple(kwargs))
    except TypeError as error:
        raise SurgeryError("PSG203", f"{type(module).__name__}.forward: {error}") from None
    values = (*args, *kwargs.values())
    tensors, flags, pasts = dict[str, Any](), dict[str, Any](), list[Past]()
    for name, place in places:
        value = values[place]
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, PLAIN):
            flags[name] = value
        elif is_cache(value):
            pasts.append(Past(name, value))
        elif value is not None:
            (tensors if _has_tensor(value) else flags)[name] = value
    if len(pasts) > 1:
        raise refused(f"there are {len(pasts)} of them")
    call = Call(dict(sorted(tensors.items())), flags)
    return with_cache(call, pasts[0]) if pasts else call


def with_cache(call: Call, past: Past) -> Call:
    """The call with a cache, and without a mask that masks nothing.

    Models look whether it does, and compute in another way then; a capture cannot look.
    """
    idle = {MASK} if _masks_nothing(call.tensors, past) else set[str]()
    kept = {name: value for name, value in call.tensors.items() if name not in idle}
    return Call(kept, call.flags, past, call.trace)


def with_own_name(call: Call, module: nn.Module, own: str | None) -> Call:
    """The call with its cache under the model's own name for it, if it came by an earlier one.

    Forwards that renamed the argument take the earlier name still, though they do not declare it.
    """
    if call.past is None or own is None or takes(module, call.past.name):
        return call
    return replace(call, past=replace(call.past, name=own))


def _masks_nothing(named: Mapping[str, Any], past: Past) -> bool:
    """Whether the mask covers past and present and keeps all of it."""
    mask, new = named.get(MASK), next((named[name] for name in TEXT if name in named), None)
    if not _is_of_tokens(mask) or not isinstance(new, torch.Tensor):
        return False
    if torch.compiler.is_exporting():  # the call itself is traced: there are no values to look at
        return False
    covers = mask.shape == (new.shape[0], new.shape[1] + past.seen)
    return covers and not mask.is_meta and bool(mask.all())


def _is_of_tokens(mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether a mask says which tokens are seen, not which token sees which."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward has an argument of that name."""
    return name in _signature(module).parameters


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of the module's forward, in order."""
    return tuple(_signature(module).parameters)


def stand_for(forward: Any, original: Callable[..., Any]) -> None:
    """Register a module's replacement forward for the time of its export."""
    forward.stands_for = original


def _signature(module: nn.Module) -> inspect.Signature:
    """Signature of the module's own forward without self, even while another replaces it."""
    forward, function = _forward(module)
    return inspect.signature(forward) if function is None else _method_signature(function)


def _forward(module: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The module's own forward, and the function that it is a method of.

    None for a function of the module's own: it may hold the module, and is not to be remembered.
    """
    forward = module.forward
    forward = getattr(forward, "stands_for", forward)
    return forward, getattr(forward, "__func__", None)


@lru_cache(maxsize=256)  # decorated forwards take longer to inspect than a small block to run
def _method_signature(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


Places = tuple[tuple[str, int], ...]
"""By name of an argument: which of a call's values it gets, those by position counted first."""


def _places(module: nn.Module, count: int, names: tuple[str, ...]) -> Places:
    """Where the arguments of ``count`` values by position, and of others by ``names``, belong.

    That depends on nothing else. TypeError if the forward does not take them.
    """
    forward, function = _forward(module)
    if function is None:
        return _bound(inspect.signature(forward), count, names)
    return _method_places(function, count, names)


@lru_cache(maxsize=1024)  # to bind anew would take as long as several operators of a small model
def _method_places(function: Callable[..., Any], count: int, names: tuple[str, ...]) -> Places:
    return _bound(_method_signature(function), count, names)


def _bound(signature: inspect.Signature, count: int, names: tuple[str, ...]) -> Places:
    by_name = {name: count + number for number, name in enumerate(names)}
    found: list[tuple[str, int]] = []
    for name, place in signature.bind(*range(count), **by_name).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found += place.items()
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            hint = "wrap the module in one whose forward names its inputs"
            raise SurgeryError("PSG203", f"the module's forward takes *{name}", hint)
        else:
            found.append((name, place))
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        raise TypeError(f"two values for '{twice[0]}'")
    return tuple(found)


def widen(call: Call) -> Call:
    """The same call with a batch of two where every tensor has a batch of one, and a longer past.

    torch.export takes a size of 1 for a constant, so an example needs at least two of everything
    that may vary. A mask of the past has the past's length.
    """
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor)]
    if all(tensor.ndim > 0 and tensor.shape[0] == 1 for tensor in tensors):
        call = map_tensors(call, lambda tensor: torch.cat([tensor, tensor]))
    if call.past is None:
        return call
    tensors_by_name = dict(call.tensors)
    if _is_of_tokens(tensors_by_name.get(MASK)):
        tensors_by_name[MASK] = nn.functional.pad(tensors_by_name[MASK], (STRETCH, 0), value=1)
    return replace(call, tensors=tensors_by_name, past=replace(call.past, stretched=True))


def apart(call: Call) -> Call:
    """The call with every tensor distinct: one given for two inputs becomes two tensors.

    torch.export takes a tensor for one input wherever it is given, and the next call may well give
    two.
    """
    return map_tensors(
        call, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad)
    )


def traced(call: Call, module: nn.Module) -> Call:
    """The call as it is traced: its cache replaced by stand-in tensors of the cache's lengths.

    Raises PSG210 for a cache that a capture cannot leave to its owner.
    """
    if call.past is None:
        return call
    text = next((name for name in TEXT if name in call.tensors), None)
    if text is None:
        raise refused(f"there is neither {' nor '.join(TEXT)} beside it")
    trace = Traced(call.past, module, text, call.tensors[text].shape[1])
    return replace(call, tensors={**call.tensors, **trace.sizes}, trace=trace)


def example(call: Call) -> Call:
    """The call with tensors on meta and nothing in its past, to remember what a capture is for."""
    tensors = dict(call.tensors)
    if call.past is not None and _is_of_tokens(tensors.get(MASK)):
        tensors[MASK] = tensors[MASK][:, call.past.seen :]
    past = call.past and call.past.emptied()
    emptied = replace(call, tensors=tensors, past=past)
    return map_tensors(emptied, lambda tensor: torch.empty_like(tensor, device="meta"))


def map_tensors(call: Call, function: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The call with a function applied to every tensor in it."""
    return replace(call, tensors=pytree.tree_map_only(torch.Tensor, function, dict(call.tensors)))


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
