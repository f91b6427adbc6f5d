"""Read exports by the real programs, and what they write themselves: ``tools/readers/run``.

For each architecture a small model with random weights is given a rank-stabilised LoRA of two
ranks, exported, read, and compared with the outputs of the folded model, in the original's own
class. Adapters that mlx-lm, diffusers and LyCORIS write are imported, and the outputs compared with
the program's own; so are the modules that names of Stable Diffusion's own code mean. Prints a line
for each, and exits with 1 if one differs by more than the program's own precision.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel

import peftsurgery as ps
from peftsurgery.formats.foreign.layout import laid_out_otherwise
from tests.formats.onnx.sessions import with_adapter

HERE = Path(__file__).parent
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": False},
    "Mistral": {"tie_word_embeddings": False},
    "Qwen2": {"tie_word_embeddings": False},
    "Qwen3": {"tie_word_embeddings": False, "head_dim": 16},
    "Gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "Phi3": {"tie_word_embeddings": False},
}
# The largest difference that is the program's own: llama.cpp keeps keys and values in fp16, and its
# base alone is as far from transformers.
BOUNDS = {
    "llama.cpp": 1e-2,
    "mlx-lm": 1e-4,
    "peft": 1e-4,
    "onnxruntime": 1e-4,
    "diffusers": 1e-4,
    "lycoris": 1e-4,
}


def operated(folder: Path, name: str, changes: dict[str, Any]) -> ps.OperatedModel:
    """A small model in ``folder/base`` with a trained LoRA, of another rank in its last layer."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    shaken(model)
    model.save_pretrained(folder / "base")
    _say_theta(folder / "base" / "config.json")
    made = ps.apply(
        ps.capture(str(folder / "base")),
        ["lora_all_linear"],
        settings={"stabilised": True, "rank": 4, "alpha": 6},
        by=[{"where": {"layers": "1"}, "rank": 7}],
    )
    shaken(made, trained=True)
    return made.eval()


def plain(model: ps.OperatedModel) -> Any:
    """The folded model: every program is to compute what it does."""
    return ps.fold(model).eval()


def shaken(model: torch.nn.Module, trained: bool = False) -> None:
    """Move weights, or what is trained, at random."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not trained or parameter.requires_grad:
                noise = torch.randn_like(parameter)
                parameter.add_((0.15 if trained else 0.05) * noise)


def _say_theta(file: Path) -> None:
    """Say the base of the rotary frequencies as other programs read it too."""
    config = json.loads(file.read_text())
    config["rope_theta"] = (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    file.write_text(json.dumps(config))


def by_llama(home: Path, model: ps.OperatedModel, folder: Path, ids: Any, wanted: Any) -> float:
    """Largest difference of llama.cpp's log-probabilities, where they are above 1e-6."""
    python, out = home / "venv/bin/python", folder / "adapter.gguf"
    ps.export_adapter(model, out, "gguf")
    said = json.loads(printed(python, HERE / "gguf_reader.py", out))
    assert said["keys"]["general.type"] == "adapter"
    printed(python, HERE / "base_gguf.py", folder / "base", folder / "base.gguf")
    (folder / "ids.json").write_text(json.dumps(ids[0].tolist()))
    reader = ("node", HERE / "llama_reader.mjs", home / "node", folder / "base.gguf")
    found = json.loads(printed(*reader, out, folder / "ids.json"))
    logs = wanted[0] - np.log(np.exp(wanted[0]).sum(-1, keepdims=True))
    return max(
        abs(np.log(share) - logs[place][token])
        for place, row in enumerate(found)
        for token, share in row
        if not share <= 1e-6
    )


def by_mlx(home: Path, model: ps.OperatedModel, folder: Path, ids: Any, wanted: Any) -> float:
    """Largest difference of mlx-lm's logits."""
    ps.export_adapter(model, folder / "mlx", "mlx")
    return _read_by(home, "mlx_reader.py", folder, "mlx", ids, wanted)


def by_peft(home: Path, model: ps.OperatedModel, folder: Path, ids: Any, wanted: Any) -> float:
    """Largest difference of peft's logits, of the directory that is made for vLLM."""
    ps.export_adapter(model, folder / "vllm", "vllm")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    theirs = PeftModel.from_pretrained(base, str(folder / "vllm")).eval()
    with torch.no_grad():
        found = theirs(torch.from_numpy(ids)).logits.double().numpy()
    return float(np.abs(found - wanted).max())


def by_onnxruntime(
    home: Path, model: ps.OperatedModel, folder: Path, ids: Any, wanted: Any
) -> float:
    """Largest difference of onnxruntime's logits, with the adapter put into a file for any."""
    ps.export_onnx(model, folder / "model.onnx", adapters="inputs")
    ps.export_adapter(model, folder / "a.onnx_adapter", "ort")
    runs = with_adapter(folder / "model.onnx", folder / "a.onnx_adapter")
    found = runs.run({"input_ids": ids, "attention_mask": np.ones_like(ids)}, ["logits"])[0]
    return float(np.abs(found - wanted).max())


def by_diffusers(home: Path, folder: Path) -> float:
    """Largest difference of a text encoder's outputs in diffusers."""
    encoder = text_encoder(folder)
    model = ps.apply(ps.capture(encoder), "lora_attention", rank=3, stabilised=True).eval()
    shaken(model, trained=True)
    ids = torch.randint(3, 98, (1, 9))
    with torch.no_grad():
        wanted = plain(model)(ids).last_hidden_state.double().numpy()
    ps.export_adapter(model, folder / "kohya", "kohya")
    return _read_by(home, "kohya_reader.py", folder, "kohya", ids.numpy(), wanted)


def text_encoder(folder: Path) -> Any:
    """A small CLIP text encoder, in ``folder/base`` too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.CLIPTextConfig(**sizes, num_hidden_layers=2, vocab_size=99)
    encoder = transformers.CLIPTextModel(config).eval()
    shaken(encoder)
    encoder.save_pretrained(folder / "base")
    return encoder


def of_mlx(home: Path, folder: Path) -> float:
    """Largest difference of a Llama's logits from mlx-lm's, with an adapter that mlx-lm wrote."""
    operated(folder, "Llama", MODELS["Llama"])
    return _of_its_own(home, "mlx_writer.py", folder, torch.randint(3, 256, (1, 12)))


def of_diffusers(home: Path, folder: Path) -> float:
    """Largest difference of a text encoder's outputs, with an adapter that diffusers wrote."""
    text_encoder(folder)
    return _of_its_own(home, "diffusers_writer.py", folder, torch.randint(3, 98, (1, 9)))


def of_lycoris(home: Path, folder: Path) -> float:
    """Largest difference of a text encoder's outputs, with adapters of LyCORIS's methods."""
    gaps = []
    for method in ("locon", "dora", "loha", "lokr", "lokr, whole"):
        inner = folder / method
        inner.mkdir()
        text_encoder(inner)
        ids = torch.randint(3, 98, (1, 9))
        gaps.append(_of_its_own(home, "lycoris_writer.py", inner, ids, method))
    return max(gaps)


# Names that diffusers (0.42) reads as others in a LoRA than in a checkpoint: a sampler without an
# attention before it, and classes.
ODD = {"up_blocks.0.upsamplers.0.conv", "class_embedding.linear_1", "class_embedding.linear_2"}


def names_apart(home: Path, folder: Path) -> float:
    """How many names of Stable Diffusion's own code mean other modules in diffusers."""
    python, script, listed = home / "venv/bin/python", HERE / "unet_names.py", folder / "listed"
    printed(python, script, listed)
    modules = json.loads(listed.read_text())
    ours = {shape: laid_out_otherwise(paths) for shape, paths in modules.items()}
    lost = sum(len(set(paths) - ours[shape].keys()) for shape, paths in modules.items())
    names = {shape: [*of_path.values()] for shape, of_path in ours.items()}
    (folder / "names").write_text(json.dumps(names))
    printed(python, script, listed, folder / "names", folder / "found")
    for shape, theirs in json.loads((folder / "found").read_text()).items():
        for path, name in ours[shape].items():
            by_lora = path if path in ODD else theirs["lora"][name]
            alike = by_lora in (path, path.removesuffix(".0"))
            lost += not (alike and theirs["checkpoint"].get(name) == path)
    return float(lost)


def _of_its_own(home: Path, script: str, folder: Path, ids: torch.Tensor, *more: str) -> float:
    """Largest difference of a model's first output with the adapter that a program writes."""
    np.save(folder / "ids.npy", ids.numpy())
    given = (folder / "base", folder / "written", folder / "ids.npy", folder / "wanted.npy")
    printed(home / "venv/bin/python", HERE / script, *given, *more)
    ps.import_adapter(folder / "written", folder / "imported", folder / "base")
    model = ps.from_peft(ps.capture(str(folder / "base")), folder / "imported").eval()
    with torch.no_grad():
        found = model(input_ids=ids)[0].double().numpy()
    return float(np.abs(found - np.load(folder / "wanted.npy")).max())


def _read_by(home: Path, script: str, folder: Path, out: str, ids: Any, wanted: Any) -> float:
    np.save(folder / "ids.npy", ids)
    given = (folder / "base", folder / out, folder / "ids.npy", folder / "found.npy")
    printed(home / "venv/bin/python", HERE / script, *given)
    return float(np.abs(np.load(folder / "found.npy") - wanted).max())


def printed(*command: str | Path) -> str:
    """What a program prints; its own complaints if it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"{command[1]}: {done.stderr[-2000:]}")
    return done.stdout


Reader = Callable[[Path, ps.OperatedModel, Path, Any, Any], float]
READERS: dict[str, Reader] = {
    "llama.cpp": by_llama,
    "mlx-lm": by_mlx,
    "peft": by_peft,
    "onnxruntime": by_onnxruntime,
}
WRITERS: dict[str, tuple[str, Callable[[Path, Path], float]]] = {
    "mlx-lm": ("Llama", of_mlx),
    "diffusers": ("CLIP", of_diffusers),
    "lycoris": ("CLIP", of_lycoris),
}


def main(home: Path, programs: list[str]) -> int:
    """Read every export by these programs; returns the exit code."""
    far = []
    models = MODELS.items() if set(programs) & set(READERS) else ()
    for name, changes in models:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = operated(folder, name, changes)
            ids = torch.randint(3, 256, (1, 12))
            with torch.no_grad():
                wanted = plain(model)(input_ids=ids).logits.double()
                moved = float((model.base(input_ids=ids).logits - wanted).abs().max())
            for program in (each for each in READERS if each in programs):
                gap = READERS[program](home, model, folder, ids.numpy(), wanted.numpy())
                far.append(said(name, program, gap, f", moved by {moved:.1e}"))
    if "diffusers" in programs:
        with TemporaryDirectory() as temporary:
            far.append(said("CLIP", "diffusers", by_diffusers(home, Path(temporary))))
        with TemporaryDirectory() as temporary:
            gap = names_apart(home, Path(temporary))
            far.append(said("UNets", "diffusers", gap, ", in names of modules"))
    for program in (each for each in WRITERS if each in programs):
        with TemporaryDirectory() as temporary:
            name, write = WRITERS[program]
            gap = write(home, Path(temporary))
            far.append(said(name, program, gap, ", by an adapter of its own"))
    return int(any(far))


def said(name: str, program: str, gap: float, more: str = "") -> bool:
    """Print how far a program is from the folded model; whether that is too far, as NaN is."""
    far = not gap <= BOUNDS[program]
    words = f", TOO FAR: {BOUNDS[program]:.0e} is its own" if far else ""
    print(f"{name:8} {program:11} {gap:.1e} apart{more}{words}", flush=True)
    return far


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2:]))
