"""Measure the demo model's exact match on the held-out sentences with Hugging Face.

python examples/demo_model/evaluate.py
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lmi_multi.demo import CHECKPOINT
from lmi_multi.demo.items import Pair
from lmi_multi.demo.spoken import HELD_OUT_COUNT, HELD_OUT_SEED, pairs


def exact_match(
    folder: Path, sentences: list[Pair], dtype: torch.dtype, batch: int = 100
) -> tuple[int, list[tuple[str, str, str]]]:
    """Count the sentences written exactly right, and list (spoken, wanted, got) of the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    ordered = sorted(sentences, key=lambda pair: len(pair[0]))  # little padding in a batch
    wrong = []
    for start in range(0, len(ordered), batch):
        part = ordered[start : start + batch]
        inputs = tokenizer([spoken for spoken, _ in part], padding=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs.to(device), do_sample=False, num_beams=1)
        written = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        wrong += [(*pair, got) for pair, got in zip(part, written, strict=True) if got != pair[1]]
    return len(sentences) - len(wrong), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=HELD_OUT_COUNT, help="sentences to measure on")
    parser.add_argument("--show", type=int, default=10, help="wrong sentences to print")
    options = parser.parse_args()
    # Its matrices are too small to share out: threads would mostly wait for each other.
    torch.set_num_threads(1)
    print(
        f"seed {HELD_OUT_SEED}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    sentences = pairs(HELD_OUT_SEED, options.count)
    for dtype in (torch.float32, torch.bfloat16):
        begin = time.monotonic()
        right, wrong = exact_match(options.checkpoint, sentences, dtype)
        name = str(dtype).removeprefix("torch.")
        print(
            f"{name}: {right} of {len(sentences)} exact = {right / len(sentences):.2%} "
            f"({time.monotonic() - begin:.0f} s)"
        )
        for spoken, written, got in wrong[: options.show]:
            print(f"  {spoken}\n    wanted {written}\n    got    {got}")


if __name__ == "__main__":
    main()
