"""What a config says of ties, and what of it has to change where weights are written apart.

One flag, ``tie_word_embeddings``, unties every group of weights at once. Some configs set it again
when they are read, and some models compute differently without it: there it has to stay.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

FLAG = "tie_word_embeddings"


def untied_flags(model: PreTrainedModel) -> dict[str, Any] | None:
    """The configs of a model that have the flag set, by their dotted paths in that of the model.

    None if it would be set again, or means more than that weights are one.
    """
    configs = {path: each for path, each in with_parts(model.config) if getattr(each, FLAG, False)}
    untied = copy.deepcopy(model.config)
    for path, part in with_parts(untied):
        if path in configs:
            setattr(part, FLAG, False)
    again = any(getattr(part, FLAG, False) for _, part in with_parts(reread(untied)))
    models = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    return None if again or any(map(_reads_flag, models)) else configs


def with_parts(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A config and those inside it, with their dotted paths."""
    yield path, config
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from with_parts(part, f"{path}.{name}".lstrip("."))


def reread(config: Any) -> Any:
    """The config as it is read from the file that it is written to."""
    return type(config).from_dict(json.loads(config.to_json_string()))


def _reads_flag(part: nn.Module) -> bool:
    """Whether what a module computes depends on the flag, as a factor of some heads does."""
    code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    return code is not None and FLAG in (*code.co_names, *code.co_consts)
