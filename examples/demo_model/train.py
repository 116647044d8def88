"""Train the demo model from scratch and save it as a Hugging Face checkpoint folder.

python examples/demo_model/train.py --out /tmp/demo --steps 50 --batch 64   # a quick look
python examples/demo_model/train.py --out /tmp/demo                         # the real thing
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evaluate import exact_match
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import T5Config, T5ForConditionalGeneration

from lmi_multi.demo.spoken import HELD_OUT_COUNT, HELD_OUT_SEED, MAX_SPOKEN, MAX_WRITTEN, pairs

CONFIG: dict[str, Any] = {
    "architectures": ["T5ForConditionalGeneration"],
    "model_type": "t5",
    "is_encoder_decoder": True,
    # 259 byte and special tokens, rounded up so that the rows split evenly over devices.
    "vocab_size": 320,
    "d_model": 192,
    "d_kv": 32,
    "d_ff": 448,
    "num_heads": 8,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-6,
    # Twice T5's usual number of buckets: bytes need finer positions than word pieces.
    "relative_attention_num_buckets": 64,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.0,  # no sentence is seen often enough to be learnt by heart
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "dtype": "bfloat16",
}
GENERATION = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
TOKENIZER = {
    "tokenizer_class": "ByT5Tokenizer",
    "extra_ids": 0,
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
}
FIRST_TOKEN, END = 3, 1  # ByT5Tokenizer: byte b is token b + 3, and 1 ends a sentence

# Two fixed shapes (spoken tokens, written tokens) keep padding low and compile only twice.
SHAPES = ((48, 40), (MAX_SPOKEN + 1, MAX_WRITTEN + 1))
FIRST_SEED = 1_000_000_000


def encode(texts: list[str], width: int) -> torch.Tensor:
    """Tokenize as ByT5Tokenizer does, but hundreds of times faster: rows padded with 0."""
    raw = [text.encode() for text in texts]
    table = np.frombuffer(b"".join(text.ljust(width, b"\0") for text in raw), np.uint8)
    ids = table.reshape(len(raw), width).astype(np.int16)
    ids[ids > 0] += FIRST_TOKEN
    ids[np.arange(len(raw)), [len(text) for text in raw]] = END
    return torch.from_numpy(ids)


class Batches(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """An endless stream of fresh batches, each of sentences of similar length."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        waiting: list[list[tuple[str, str]]] = [[] for _ in SHAPES]
        for chunk in itertools.count(worker, workers):
            for spoken, written in pairs(FIRST_SEED * (self.seed + 1) + chunk, self.size):
                fits = (
                    len(spoken.encode()) < wide and len(written.encode()) < narrow
                    for wide, narrow in SHAPES
                )
                which = list(fits).index(True)
                waiting[which].append((spoken, written))
                if len(waiting[which]) == self.size:
                    sides = zip(*waiting[which], strict=True)
                    first, second = (
                        encode(list(texts), width)
                        for texts, width in zip(sides, SHAPES[which], strict=True)
                    )
                    yield first, second
                    waiting[which] = []


def save(model: T5ForConditionalGeneration, folder: Path) -> None:
    """Write bf16 weights, without the copies that tied embeddings are, and short configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {**GENERATION, "max_new_tokens": MAX_SPOKEN + 1}
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", generation),
        ("tokenizer_config.json", TOKENIZER),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def learning_rate(peak: float, done: float, warm_up: float = 0.03) -> float:
    """Linear warm-up, then a cosine down to zero, by the share of the training done."""
    if done < warm_up:
        return peak * done / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warm_up) / (1 - warm_up))))


def train(options: argparse.Namespace) -> T5ForConditionalGeneration:
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = T5Config(**{key: value for key, value in CONFIG.items() if key != "dtype"})
    # With a bias that is trained, the fused attention kernels do not apply.
    config._attn_implementation = "eager"
    model = T5ForConditionalGeneration(config)
    if options.start:
        model.load_state_dict(load_file(options.start / "model.safetensors"), strict=False)
    model = model.to(device).train()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )

    def loss_of(spoken: torch.Tensor, written: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            loss: torch.Tensor = model(
                input_ids=spoken,
                attention_mask=spoken != 0,
                labels=written.masked_fill(written == 0, -100),
                use_cache=False,
            ).loss
        return loss

    compiled = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
    batches = DataLoader(
        Batches(options.batch, options.seed),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=8 if options.workers else None,
        pin_memory=device.type == "cuda",
    )
    begin = time.monotonic()
    done, step = 0.0, 0
    for spoken, written in batches:
        spent = time.monotonic() - begin
        done = spent / (60 * options.minutes) if options.minutes else step / options.steps
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.rate, done)
        loss = compiled(
            spoken.to(device, non_blocking=True).long(),
            written.to(device, non_blocking=True).long(),
        )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step in (1, 2, 10, 100) or step % options.log_every == 0:
            print(f"step {step} ({spent:.0f} s) loss {loss.item():.5f}", flush=True)
    seconds = time.monotonic() - begin
    print(f"{step} steps of {options.batch} sentences in {seconds:.0f} s")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--start", type=Path, help="checkpoint folder to go on from")
    parser.add_argument("--steps", type=int, default=27_000)
    parser.add_argument("--minutes", type=float, help="train this long, whatever the steps")
    parser.add_argument("--batch", type=int, default=1024, help="sentences in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=min(14, os.cpu_count() or 1), help="data processes"
    )
    parser.add_argument("--log-every", type=int, default=1000)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compile the model (default: on a GPU)",
    )
    options = parser.parse_args()
    model = train(options)
    save(model, options.out)
    for dtype in (torch.float32, torch.bfloat16):
        right, wrong = exact_match(options.out, pairs(HELD_OUT_SEED, HELD_OUT_COUNT), dtype)
        print(f"exact match in {dtype}: {right / HELD_OUT_COUNT:.2%}")
        for spoken, written, got in wrong[:20]:
            print(f"  {spoken}\n    wanted {written}\n    got    {got}")


if __name__ == "__main__":
    main()
