"""Golden files: what AdapterHub's `adapters` library computes, for tests to compare with.

    tools/golden/make            write tests/golden/adapterhub again
    tools/golden/make --check    exit 1 if the files there hold anything else

Runs with adapters 1.3.0, transformers 4.57.6 and torch 2.13.0, offline. For each architecture:

    config.json, model.safetensors    a tiny random model, as transformers saves it
    expected.safetensors              input_ids, attention_mask, the model's own logits (`base`) and
                                      those with each adapter, by the name of its directory
    <method>/                         the adapter, as the library saves it

Weights are drawn from a generator seeded by the names of architecture and method, so that every run
makes the same tensors. Attention is computed by the library's plain code ("eager"): with SDPA it
masks a prefix out wherever the mask is boolean (adapters 1.3.0).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import (
    ConfigUnion,
    DoubleSeqBnConfig,
    Fuse,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path("tests/golden/adapterhub")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
ENCODER = {
    **SIZES,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 40}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("Bert", "ForSequenceClassification", {**ENCODER, "pad_token_id": 0}),
    "roberta": ("Roberta", "ForSequenceClassification", {**ENCODER, "pad_token_id": 1}),
    "gpt2": ("GPT2", "LMHeadModel", {**GPT2, **NO_DROPOUT}),
    "llama": ("Llama", "ForCausalLM", {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}),
}
ENCODERS = frozenset(("bert", "roberta"))


@dataclass(frozen=True)
class Method:
    """A configuration of the library, and which architectures it is made for."""

    config: Callable[[], adapters.AdapterConfig]
    architectures: frozenset[str] = frozenset(ARCHITECTURES)
    with_head: bool = False
    fused: bool = False


def prefix(**changes: object) -> PrefixTuningConfig:
    """A short prefix with a narrow encoder."""
    return PrefixTuningConfig(**{"prefix_length": 5, "bottleneck_size": 12, **changes})


METHODS = {
    "lora": Method(lambda: LoRAConfig(r=4, alpha=6)),
    "lora_all": Method(
        lambda: LoRAConfig(
            r=2, alpha=4, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
        )
    ),
    "lora_head": Method(lambda: LoRAConfig(r=2, alpha=4), ENCODERS, with_head=True),
    "ia3": Method(IA3Config),
    "seq_bn": Method(SeqBnConfig),
    "seq_bn_drop": Method(lambda: SeqBnConfig(leave_out=[0])),
    "double_seq_bn": Method(DoubleSeqBnConfig),
    "par_bn": Method(lambda: ParBnConfig(reduction_factor=4)),
    "fusion": Method(SeqBnConfig, fused=True),
    "prefix_flat": Method(lambda: PrefixTuningConfig(flat=True, prefix_length=5)),
    "prefix_mlp": Method(prefix),
    "mam": Method(lambda: MAMConfig(prefix(), ParBnConfig(reduction_factor=4))),
    "unipelt": Method(
        lambda: UniPELTConfig(prefix(prefix_length=4), SeqBnConfig(), LoRAConfig(r=4, alpha=2))
    ),
    "prompt_tuning": Method(lambda: PromptTuningConfig(prompt_length=4), ENCODERS),
}


def main() -> int:
    """Write the files, or compare them with new ones."""
    parser = argparse.ArgumentParser(description="Make tests/golden/adapterhub.")
    parser.add_argument("--check", action="store_true", help="compare with what is there")
    if not parser.parse_args().check:
        write(GOLDEN)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        differing = list(differences(GOLDEN, Path(folder)))
    for line in differing:
        print(line, file=sys.stderr)
    return int(bool(differing))


def write(target: Path) -> None:
    """Every architecture with its adapters, beneath ``target``."""
    for name in ARCHITECTURES:
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        build(name).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        expected = inputs(name)
        expected["base"] = run(build(name), expected)
        for method, recipe in METHODS.items():
            if name in recipe.architectures:
                make = fusion if recipe.fused else single
                expected[method] = run(make(name, method, folder / method), expected)
        save_file(expected, folder / "expected.safetensors")


def build(architecture: str) -> Any:
    """The tiny model, with weights large enough to make mistakes visible."""
    name, head, settings = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{name}Config")(
        **{"bos_token_id": 1, "eos_token_id": 2, **settings},
        use_cache=False,
        attn_implementation="eager",
    )
    model: Any = getattr(transformers, f"{name}{head}")(config).eval()
    randomise(model, architecture, lambda _: True, lambda _: 0.2)
    return model


def inputs(architecture: str) -> dict[str, Tensor]:
    """Ids of three rows, the last two ending in padding."""
    generator = seeded(architecture)
    ids = torch.randint(3, SIZES["vocab_size"], (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -1:] = mask[2, -3:] = 0
    padding = ARCHITECTURES[architecture][2].get("pad_token_id", 0)
    return {"input_ids": ids.where(mask.bool(), torch.tensor(padding)), "attention_mask": mask}


def run(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The logits."""
    with torch.no_grad():
        logits: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits
    return logits.contiguous()


def single(architecture: str, method: str, folder: Path) -> Any:
    """The model with one adapter, which is saved too."""
    model = build(architecture)
    adapters.init(model)
    recipe = METHODS[method]
    config = recipe.config()
    model.add_adapter("golden", config=config)
    randomise(model, f"{architecture}/{method}", lambda key: ".golden." in key, spread)
    if recipe.with_head:
        randomise(model, f"{architecture}/head", lambda key: "classifier" in key, spread)
    model.set_active_adapters("golden")
    parts = config.configs if isinstance(config, ConfigUnion) else [config]
    # the library keeps a prefix under several names, which it cannot write as safetensors
    plain = any(isinstance(part, PrefixTuningConfig) for part in parts)
    model.save_adapter(str(folder), "golden", use_safetensors=not plain, with_head=recipe.with_head)
    return model.eval()


def fusion(architecture: str, method: str, folder: Path) -> Any:
    """The model with two adapters and a fusion over them, all of which are saved."""
    model = build(architecture)
    adapters.init(model)
    setup = Fuse("first", "second")
    for name in setup:
        model.add_adapter(name, config=METHODS[method].config())
    model.add_adapter_fusion(setup)
    model.set_active_adapters(setup)
    added = (".first.", ".second.", ".first,second.")
    randomise(
        model, f"{architecture}/{method}", lambda key: any(name in key for name in added), spread
    )
    model.save_adapter_setup(str(folder), setup, use_safetensors=True)
    for head in folder.rglob("*head*"):
        head.unlink()
    return model.eval()


def spread(name: str) -> float:
    """How far random values are from the initial ones: an adapter must show in the output."""
    return 0.5 if "prefix_tunings" in name or "prompt" in name else 0.2


def randomise(
    model: nn.Module, seed: str, select: Callable[[str], bool], scale: Callable[[str], float]
) -> None:
    """Random values for the parameters selected, in the order of their names."""
    generator = seeded(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if select(name):
                noise = scale(name) * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(centre(name, parameter) + noise)


def centre(name: str, parameter: Tensor) -> Tensor:
    """The value that random ones are spread around: the initial one where that is not random."""
    if name.endswith("lora_B") or ("fusion" in name and name.endswith("value.weight")):
        return parameter
    is_scale = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
    return torch.full_like(parameter, float(is_scale))


def seeded(name: str) -> torch.Generator:
    """A generator that depends on a name only."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def differences(here: Path, new: Path) -> Iterator[str]:
    """The files that are in one directory only, or whose tensors or text differ."""
    names = {
        str(file.relative_to(folder))
        for folder in (here, new)
        for file in folder.rglob("*")
        if file.is_file()
    }
    for name in sorted(names):
        if not ((here / name).is_file() and (new / name).is_file()):
            yield f"{name}: in one place only"
        elif content(here / name) != content(new / name):
            yield f"{name}: differs"


def content(file: Path) -> object:
    """What a file holds, apart from the order in which it holds it."""
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    elif file.suffix == ".bin":
        tensors = torch.load(file, weights_only=True)
    else:
        return file.read_bytes()
    return {name: (tuple(value.shape), value.numpy().tobytes()) for name, value in tensors.items()}


if __name__ == "__main__":
    sys.exit(main())
