"""GraphModel: a captured model, called like the model it came from.

It captures once per signature, when a call first needs it, and runs every capture over the same
parameters. An operated model is a GraphModel too: ``transform`` turns each fresh capture into the
operated one, so inputs nobody thought of when the rules were applied (labels, embeddings) work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from transformers import PreTrainedModel

from ..errors import SurgeryError
from .blocks import Library, Splitter, block_paths
from .cleanup import clean_up
from .export import export
from .inputs import example_inputs
from .parts import Block, Part, mirror, module_infos
from .program import Program, TensorInfo
from .signature import Call, bind_call, map_tensors, widen
from .sources import Source, open_source


@dataclass(frozen=True)
class Capture:
    """One signature of a model as programs: "" is the top graph, other keys are block paths.

    ``sizes`` are the shapes of the inputs as far as they are fixed (None where they may vary), and
    ``mode`` is the value of ``training`` the capture is for (None: it follows).
    """

    programs: Mapping[str, Sequence[Program]]
    output: pytree.TreeSpec
    sizes: tuple[tuple[int | None, ...] | None, ...]
    names: tuple[str, ...]
    mode: bool | None

    @property
    def top(self) -> Program:
        """The program of the model itself."""
        return self.programs[""][0]

    @property
    def notes(self) -> tuple[str, ...]:
        """What was specialised: sizes that are fixed, a mode."""
        fixed = [
            f"axis {axis} of {name} is fixed at {size}"
            for name, shape in zip(self.names, self.sizes, strict=True)
            for axis, size in enumerate(shape or ())
            if size is not None
        ]
        if self.mode is not None:
            fixed.append(f"for {'train' if self.mode else 'eval'} mode only")
        return tuple(fixed)

    def fits(self, leaves: Sequence[Any], training: bool) -> bool:
        """Whether the capture is for this mode, and the inputs have its fixed sizes."""
        return self.mode in (None, training) and all(
            fixed is None or fixed == actual
            for sizes, leaf in zip(self.sizes, leaves, strict=True)
            if sizes is not None
            for fixed, actual in zip(sizes, leaf.shape, strict=True)
        )


class Captures:
    """The captures of one source, made when they are needed and shared by all models made of it."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.infos = module_infos(source.module)
        self.blocks = block_paths(source.module)
        self.library = Library()
        self.constants: dict[str, torch.Tensor] = {}
        self._made: dict[str, list[Capture]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Captures:
        return self

    def find(self, call: Call, training: bool) -> Capture:
        """The capture that serves a call, made now if there is none yet."""
        known = self._made.setdefault(call.signature, [])
        for capture in known:
            if capture.fits(call.leaves, training):
                return capture
        if self.source.on_meta:
            call = map_tensors(call, lambda tensor: tensor.to("meta"))
        capture = self._capture(widen(call), training)
        if not capture.fits(call.leaves, training):
            capture = self._capture(call, training)
        known.append(capture)
        return capture

    def _capture(self, call: Call, training: bool) -> Capture:
        module = self.source.module
        exported = export(module, call, training)
        graph = exported.module.graph
        tensors = tensor_infos(module)
        self._name_constants(exported.module, tensors)
        clean_up(exported.module, tensor_names(module), _counters(module))
        splitter = Splitter(self.blocks, self.infos, tensors, self.library)
        splitter.split(graph)
        placeholders = graph.find_nodes(op="placeholder")
        sizes = tuple(_fixed_sizes(node.meta.get("val")) for node in placeholders)
        names = tuple(node.name for node in placeholders)
        return Capture(splitter.programs, exported.output, sizes, names, exported.mode)

    def _name_constants(self, module: fx.GraphModule, tensors: Mapping[str, TensorInfo]) -> None:
        """Give each constant tensor of a capture a name that no other capture uses."""
        for node in module.graph.find_nodes(op="get_attr"):
            value = _attribute(module, str(node.target))
            if str(node.target) in tensors or not isinstance(value, torch.Tensor):
                continue
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = value.detach()
            node.target = name


class GraphModel(Part):
    """The captured model: a top graph and block graphs under the original's names."""

    def __init__(
        self,
        captures: Captures,
        parameter: Callable[[nn.Parameter], nn.Parameter] = lambda parameter: parameter,
    ) -> None:
        super().__init__(captures.infos[""])
        self._captures = captures
        self._served: dict[int, Capture] = {}
        mirror(captures.source.module, self, captures.blocks, captures.infos, parameter)
        self._bound = not captures.source.on_meta

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original returns for these arguments, in the original's type."""
        self.bind()
        call = bind_call(self._captures.source.module, args, kwargs)
        capture = self.serve(self._captures.find(call, self.training))
        outputs = capture.top.forward(self, *call.leaves)
        return pytree.tree_unflatten(outputs, capture.output)

    def capture_for(self, *args: Any, **kwargs: Any) -> Capture:
        """The capture that serves a call of these arguments, as this model runs it."""
        call = bind_call(self._captures.source.module, args, kwargs)
        return self.serve(self._captures.find(call, self.training))

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The captures served so far, the one the model was made with first."""
        return tuple(self._served.values())

    @property
    def source(self) -> Source:
        """Where the model and its weights come from."""
        return self._captures.source

    @property
    def config(self) -> Any:
        """The transformers config of the original; AttributeError if it has none."""
        return self._captures.source.module.config

    def transform(self, capture: Capture) -> Capture:
        """A fresh capture as this model runs it; an operated model replays its operations here."""
        return capture

    def serve(self, capture: Capture) -> Capture:
        """Make a capture runnable: transform it once, and give the blocks their programs."""
        if id(capture) not in self._served:
            ready = self.transform(capture)
            for path, programs in ready.programs.items():
                if path:
                    block = self.get_submodule(path)
                    assert isinstance(block, Block)
                    block.programs.update({program.label: program for program in programs})
            for name, value in self._captures.constants.items():
                if not hasattr(self, name):
                    self.register_buffer(name, value, persistent=False)
            self._served[id(capture)] = ready
        return self._served[id(capture)]

    def bind(self) -> None:
        """Read the weights now, if the model was captured without them. PSG207 if there are none."""
        if self._bound:
            return
        loaded = dict(_named_tensors(self._captures.source.weights()))
        for name, tensor in _named_tensors(self):
            if tensor.is_meta and name in loaded:
                _assign(self, name, loaded[name].detach())
        self._bound = True

    def gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each block's forward in the backward pass instead of keeping its activations."""
        for part in self.modules():
            if isinstance(part, Block):
                part.checkpointing = enabled

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        self.bind()
        return super()._apply(fn, recurse)

    def _get_name(self) -> str:
        return f"GraphModel[{self._info.type}]"


def capture(
    model: nn.Module | str,
    inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    cache: bool = False,
) -> GraphModel:
    """Capture a model as graphs.

    ``model`` is a live module, or what the command line takes for MODEL (a directory, a hub id,
    ``package.module:factory``), which is captured on the meta device. ``inputs`` are example
    arguments, a tuple or a dict, with a batch of at least 2; a transformers model needs none.
    Raises PSG201 if the model cannot be exported, PSG202 if it needs inputs.
    """
    if cache:
        raise SurgeryError("PSG210", "captures that carry a cache are not there yet")
    source = open_source(model) if isinstance(model, str) else Source(model)
    graph_model = GraphModel(Captures(source))
    if inputs is None:
        inputs = _made_inputs(source.module)
    if isinstance(inputs, Mapping):
        graph_model.capture_for(**inputs)
    else:
        graph_model.capture_for(*inputs)
    return graph_model


def _made_inputs(module: nn.Module) -> Mapping[str, Any]:
    if not isinstance(module, PreTrainedModel):
        raise SurgeryError(
            "PSG202",
            f"example inputs are needed to capture a {type(module).__name__}",
            "capture(module, inputs=(x,)) or capture(module, inputs={'x': x})",
        )
    return example_inputs(module)


def _fixed_sizes(value: Any) -> tuple[int | None, ...] | None:
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def _counters(module: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{name}.num_batches_tracked" if name else "num_batches_tracked"
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.batchnorm._NormBase)
    )


def _attribute(module: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf, None)


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or buffer by one of the same kind; ties between parameters are kept by
    the loaded model's, whose storage is shared."""
    owner, _, leaf = name.rpartition(".")
    part = module.get_submodule(owner)
    if leaf in part._parameters:
        old = part._parameters[leaf]
        trainable = old is not None and old.requires_grad
        part._parameters[leaf] = nn.Parameter(value, requires_grad=trainable)
    else:
        part._buffers[leaf] = value


def tensor_names(module: nn.Module) -> dict[str, list[str]]:
    """Every name of a parameter or buffer, with all names of the same tensor."""
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(module):
        by_tensor.setdefault(id(tensor), []).append(name)
    return {name: names for names in by_tensor.values() for name in names}


def tensor_infos(module: nn.Module) -> dict[str, TensorInfo]:
    """Shape and dtype of every parameter and buffer by name."""
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype, isinstance(tensor, nn.Parameter))
        for name, tensor in _named_tensors(module)
    }


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
