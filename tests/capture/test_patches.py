"""While a model is traced, transformers' patches of what is imported are in place, no others."""

from __future__ import annotations

import sys
from typing import Any

from torch.nn import functional as F
from transformers.exporters import utils
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

from peftsurgery.capture.patches import MODELS, patched


def registered() -> list[tuple[str, str]]:
    return [(path, name) for path, name, _ in utils._PATCHES["dynamo"]]


def test_patches_of_imported_modules_are_in_place_and_taken_out_again() -> None:
    def found() -> list[Any]:
        here = [(path, name) for path, name in registered() if not path.startswith(MODELS)]
        objects = [(utils.import_dotted_path(path, True), name) for path, name in here]
        every = [getattr(owner, name) for owner, name in objects if owner is not None]
        return [*every, NllbMoeTop2Router._cast_classifier, F.scaled_dot_product_attention]

    before, find = found(), utils.import_dotted_path
    with patched():
        assert utils.import_dotted_path is find
        within = found()
    assert found() == before
    assert len(within) > 2
    assert all(one is not other for one, other in zip(before, within, strict=True))


def test_no_architecture_is_imported_to_be_patched() -> None:
    modules = {".".join(path.split(".")[:4]) for path, _ in registered() if path.startswith(MODELS)}
    missing = {module for module in modules if module not in sys.modules}
    with patched():
        pass
    assert missing == {module for module in modules if module not in sys.modules}
    assert all(module.rpartition(".")[2].startswith("modeling_") for module in modules)
