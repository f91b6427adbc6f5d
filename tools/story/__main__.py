"""``tools/demo``: choose the story and tell it."""

import argparse
import os
import time

import torch
import transformers

from tools.story import minilm, smollm2
from tools.story.steps import console

STORIES = {"minilm": minilm.tell, "smollm2": smollm2.tell}


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--model", choices=STORIES, default="minilm")
    name = parser.parse_args().model
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    STORIES[name]()
    console.print(
        f"\n{time.perf_counter() - start:.0f} s in all; everything is in build/demo/{name}"
    )


main()
