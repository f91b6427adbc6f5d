"""Models with slots: adapters' tensors are inputs, so that one ONNX file serves many adapters.

A slot is an input that may be left out: then it has its default, with which the model is as it was
before the adapter. Sizes that an adapter decides, such as LoRA's rank, are 0 there, and may be any
for an adapter that is put in. Slots are called what the adapter's tensors are called in the model,
in the graph and in adapters' files alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from peftsurgery.capture import GraphModel, capture
from peftsurgery.errors import SurgeryError
from peftsurgery.formats.onnx.calls import NamedCalls, Tensors
from peftsurgery.formats.onnx.translate import in_dtype_of, in_full_precision
from peftsurgery.formats.trial_inputs import TOLERANCE, difference, seen_inputs
from peftsurgery.language.slots import SWITCH, slotted
from peftsurgery.surgery.applying import operate
from peftsurgery.surgery.fold.flattening import flatten
from peftsurgery.surgery.fold.folding import fold
from peftsurgery.surgery.model.operated import OperatedModel, active_operations
from peftsurgery.surgery.model.shared import unoperated
from peftsurgery.surgery.rewrite.inputs import changes_inputs


@dataclass(frozen=True, eq=False)
class Slots:
    """Slots of a model: tensors by the names that they have in it.

    ``values`` are the adapters' own, ``defaults`` what stands for them where none is given, and
    ``sizes`` the axes that may have any size, each with the size's name. ``switches`` are those
    with which what a site adds is left out where they are 0.
    """

    values: Tensors = field(default_factory=dict)
    defaults: Tensors = field(default_factory=dict)
    sizes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()

    def of_size(self, free: int) -> dict[str, Tensor]:
        """Zeros for the slots with axes of any size, which are ``free`` here."""
        shapes = {
            name: [free if axis in axes else n for axis, n in enumerate(self.values[name].shape)]
            for name, axes in self.sizes.items()
        }
        return {name: self.values[name].new_zeros(shape) for name, shape in shapes.items()}


def slot_names(model: GraphModel) -> dict[str, str]:
    """What each active adapter is called in the names of its slots: its method, so that any fits.

    Where two are of one method, each has its own name.
    """
    if not isinstance(model, OperatedModel):
        return {}
    files = {each.name: each.file.name for each in active_operations(flatten(model))}
    alone = len(set(files.values())) == len(files)
    return files if alone else {name: name for name in files}


def with_slots(
    model: GraphModel, called: Mapping[str, str] = MappingProxyType({})
) -> tuple[OperatedModel, Slots]:
    """Say a model's active adapters with slots, in fp32. PSG413 if none is active.

    ``called`` has names of theirs that are not those of :func:`slot_names`.
    """
    if not isinstance(model, OperatedModel) or not active_operations(model):
        raise SurgeryError("PSG413", "no adapter is active that could be put in and left out")
    model = flatten(model)
    old = active_operations(model)
    rules = [slotted(operation.file, operation.settings) for operation in old]
    names = {name: called.get(name, own) for name, own in slot_names(model).items()}
    new = [
        replace(
            operation,
            file=operation.file.model_copy(update={"rules": tuple(each.rule for each in mine)}),
            name=names[operation.name],
        )
        for operation, mine in zip(old, rules, strict=True)
    ]
    # as the rules' text says: ONNX has no translation of torch's joined operators
    made = operate(_in_full_precision(model), new, exact=True).eval()
    known = {id(each.rule): each for mine in rules for each in mine}
    numbers = {c.parameters[name] for c in made.cuts for name in known[id(c.rule)].numbers}
    learnt = iter(model.learnt(*names).values())
    start = {name: value.detach() for name, value in made.learnt().items()}
    values = {n: v if n in numbers else next(learnt).detach().float() for n, v in start.items()}
    sizes = {
        cut.parameters[name]: {axis: cut.rule.params[name].shape[axis].text for axis in axes}
        for cut in made.cuts
        for name, axes in known[id(cut.rule)].free.items()
    }
    switches = frozenset(c.parameters[SWITCH] for c in made.cuts if SWITCH in c.rule.params)
    return made, Slots(values, start, sizes, switches)


def _in_full_precision(model: OperatedModel) -> GraphModel:
    """The base of a model; captured again in fp32 if it is kept in half precision."""
    base = unoperated(model)
    plain = fold(base)
    whole = in_full_precision(plain)
    if whole is plain:
        return base
    return capture(whole, in_dtype_of(whole, plain, seen_inputs(model)))


def that_can_be_left_out(slots: Slots, calls: NamedCalls, without: NamedCalls) -> Slots:
    """Choose defaults with which calls are those ``without`` an adapter. PSG413 if there are none.

    Sizes that are free and switches are 0; what is left starts as the rule says, or is 0 too.
    """
    model = calls.module
    if calls.cached and isinstance(model, OperatedModel) and any(map(changes_inputs, model.cuts)):
        raise SurgeryError(
            "PSG413",
            "an adapter that lengthens the text does so once, and a graph with a cache is called "
            "for every token",
            "export it without a cache",
        )
    off = {name: slots.values[name].new_zeros(1) for name in slots.switches}
    empty = {**slots.defaults, **slots.of_size(0), **off}
    zeros = {name: tensor.new_zeros(tensor.shape) for name, tensor in empty.items()}
    given = without.unseen()[0]
    wanted = without.outputs(given)
    for defaults in (empty, zeros):
        try:
            found = calls.outputs(given, defaults)
        except RuntimeError:  # not everything can be done with nothing
            continue
        if difference(wanted, found).within(TOLERANCE):
            return replace(slots, defaults=defaults)
    raise SurgeryError(
        "PSG413",
        "no tensors of the adapter leave the model as it was",
        "fold it: adapters='fold'",
    )
