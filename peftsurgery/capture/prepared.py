"""What a faithful export of a module needs around it, undone afterwards."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.fx.experimental import _config as fx_config
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import (
    patch_model_config,
    register_cache_pytrees_for_model,
    reset_model_state,
)
from transformers.exporters.utils import patch_attribute

from peftsurgery.capture.kv_cache import as_if_run
from peftsurgery.capture.masks import Masks
from peftsurgery.capture.patches import patched
from peftsurgery.capture.randomness import kept_generators
from peftsurgery.capture.recording import Watch
from peftsurgery.capture.signature import Call, stand_for


@contextlib.contextmanager
def prepared(
    module: nn.Module,
    call: Call,
    train: bool,
    watch: Watch | None = None,
    masks: Masks | None = None,
) -> Iterator[None]:
    """Everything a faithful export needs, undone on leaving; ``watch`` notes what forward does."""
    flags = dict(call.flags)
    with contextlib.ExitStack() as stack:
        if isinstance(module, PreTrainedModel):
            register_cache_pytrees_for_model(module)
            stack.enter_context(patched(module))
            stack.enter_context(reset_model_state(module))
            stack.enter_context((masks or Masks(call)).traced())
            if call.trace is None:
                for part in _configured(module):
                    stack.enter_context(patch_model_config(part, {"use_cache": False}))
            else:
                stack.enter_context(as_if_run())
        stack.enter_context(kept_generators())
        module.train(train)
        # a size of one is a size like others, and a decision on it a condition of the capture
        stack.enter_context(patch_attribute(fx_config, "backed_size_oblivious", lambda _: True))
        stack.enter_context(without_fast_path())
        stack.enter_context(_explicit_forward(module, call, flags, watch))
        stack.enter_context(torch.enable_grad())
        yield


def _configured(module: nn.Module) -> Iterable[PreTrainedModel]:
    """One model for each config: a model of texts and images has others within it."""
    models = (part for part in module.modules() if isinstance(part, PreTrainedModel))
    return {id(part.config): part for part in models}.values()


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """nn.TransformerEncoder's fast path is one opaque operator: no linears to see, none in ONNX."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _explicit_forward(
    module: nn.Module, call: Call, flags: dict[str, Any], watch: Watch | None
) -> Iterator[None]:
    """Give the module a forward that takes exactly the call's tensors; flags are fixed in it."""
    original: Callable[..., Any] = module.forward

    def plain(**tensors: Any) -> Any:
        if call.trace is not None:
            return call.trace.run(original, tensors, **flags)
        return original(**tensors, **flags)

    def forward(**tensors: Any) -> Any:
        if watch is None:
            return plain(**tensors)
        mode: Any = detect_fake_mode()
        mode.cache_enabled = False  # few steps are like another: what a trace keeps costs more
        return watch.run(plain, **tensors)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=None) for name in call.tensors]
    _declare(forward, inspect.Signature(parameters))
    stand_for(forward, original)
    had_own = "forward" in vars(module)
    module.forward = forward
    try:
        yield
    finally:
        if had_own:
            module.forward = original
        else:
            del module.forward


def _declare(function: Any, signature: inspect.Signature) -> None:
    """Let a function say that it takes these parameters; torch.export asks it."""
    function.__signature__ = signature
