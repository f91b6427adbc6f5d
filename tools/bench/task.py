"""The task that every method is trained on: MiniLM learns which package a docstring is from.

It is the demonstration's (tools/story), with more texts held out: a guess is the package whose name
is most like the docstring, so that only the encoder can make the difference.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from tools.story.docstrings import Labelled, collect
from tools.story.minilm import NAMES, encode, find_model, pool

STEPS, BATCH, SCALE = int(os.environ.get("BENCH_STEPS", "120")), 16, 20.0
LEARN, HELD_OUT = 150, 100


@dataclass(frozen=True)
class Trained:
    """What a run of training cost: milliseconds of a step, at the median, and the last losses."""

    step_ms: float
    loss: float


class Task:
    """The texts and the tokenizer; ``folder`` keeps the texts, whose collection takes a while."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(find_model())
        self.learn, self.judge = _texts(folder / "texts.json")

    def embed(self, model: Any, texts: list[str]) -> Tensor:
        """Embeddings of unit length (texts, width); what a method puts before a text is left out.

        A method that runs every text behind several prompts gives several rows for each.
        """
        batch = encode(self.tokenizer, texts)
        hidden = model(**batch).last_hidden_state[:, -batch["input_ids"].shape[1] :]
        rows = hidden.unflatten(0, (-1, len(texts))).mean(0)
        return pool(rows, batch["attention_mask"])

    def accuracy(self, model: nn.Module) -> float:
        """The share of held-out docstrings that are most like their own package's name."""
        order = sorted(self.judge, key=lambda item: len(item[0]))
        hits = 0
        with torch.no_grad():
            names = self.embed(model, NAMES)
            for start in range(0, len(order), 50):
                part = order[start : start + 50]
                guesses = (self.embed(model, [text for text, _ in part]) @ names.T).argmax(1)
                hits += int((guesses == torch.tensor([label for _, label in part])).sum())
        return hits / len(order)

    def train(
        self,
        model: nn.Module,
        parameters: Iterable[Any],
        rate: float,
        penalty: Callable[[], Any] = lambda: 0.0,
        after: Callable[[int], Any] = lambda step: None,
        steps: int = STEPS,
        learn: Labelled | None = None,
    ) -> Trained:
        """AdamW with a rate that rises and falls; ``after`` is called when a step is done.

        ``learn`` are the texts, all of them unless given.
        """
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step, steps))
        draw = random.Random(0)
        model.train()
        times, losses = [], []
        for step in range(steps):
            batch = draw.sample(learn or self.learn, BATCH)
            start = time.perf_counter()
            embeddings = self.embed(model, [text for text, _ in batch] + NAMES)
            logits = SCALE * embeddings[:BATCH] @ embeddings[BATCH:].T
            loss = F.cross_entropy(logits, torch.tensor([label for _, label in batch]))
            (loss + penalty()).backward()
            optimizer.step()
            after(step)
            optimizer.zero_grad()
            schedule.step()
            times.append(1e3 * (time.perf_counter() - start))
            losses.append(loss.item())
        model.eval()
        return Trained(statistics.median(times), statistics.mean(losses[-10:]))


def shape(step: int, steps: int) -> float:
    """The rate's share at a step: up over the first tenth, then down to nothing."""
    rise = max(steps // 10, 1)
    return min((step + 1) / rise, (steps - step) / (steps - rise))


def _texts(file: Path) -> tuple[Labelled, Labelled]:
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(collect(train=LEARN, held_out=HELD_OUT)))
        part.replace(file)
    learn, judge = json.loads(file.read_text())
    return [tuple(item) for item in learn], [tuple(item) for item in judge]
