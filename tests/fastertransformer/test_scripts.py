"""Whole old scripts: all that changes is the line that imports FasterTransformer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmi_multi import fastertransformer as ft

T5_SCRIPT = """
import json
import fastertransformer as ft

model = ft.init_inference("{folder}", 1, 1, dtype="fp32")
texts = ["translate: one", "translate: two"]
first = model.pipeline_generate(texts)
short = model.pipeline_generate(
    texts, max_seq_len=5, top_k=1, temperature=0.7, repetition_penalty=1.2, random_seed=3
)
try:
    model.pipeline_generate(texts, max_length=5)
    refused = False
except TypeError:
    refused = True
print(json.dumps([first, short, refused]))
"""
GPT_SCRIPT = """
import json
import fastertransformer as ft

ft.save_checkpoint("{folder}", 1, 1, "{folder}-saved", dtype="fp32")
model = ft.init_inference("{folder}-saved", 1, 1, "fp32")
texts = ["Amazon is ", "FasterTransformer is"]
first = model.pipeline_generate(texts)
ids = model.pipeline_generate(texts, batch_size=2, output_len=5, detokenize=False, top_k=0)
sampled = model.pipeline_generate(texts, 2, 6, 1, top_k=5, top_p=0.9, random_seed=7)
print(json.dumps([first, ids, sampled]))
"""


def run_script(text: str, folder: Path, tmp_path: Path) -> Any:
    """What an old script prints once its import line has been changed, and nothing else."""
    text = text.replace(
        "import fastertransformer as ft", "from lmi_multi import fastertransformer as ft"
    )
    script = tmp_path / "script.py"
    script.write_text(text.format(folder=folder))
    environment = os.environ | {"LMI_MULTI_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_old_t5_script(folders: dict[str, Path], t5: ft.T5Model, tmp_path: Path) -> None:
    first, short, refused = run_script(T5_SCRIPT, folders["t5"], tmp_path)
    texts = ["translate: one", "translate: two"]
    assert refused
    assert first == t5.pipeline_generate(texts)
    expected = t5.model.generate(
        texts, max_new_tokens=5, do_sample=False, repetition_penalty=1.2, seed=3
    )
    assert short == [completion.text for completion in expected]


def test_an_old_gpt_script(folders: dict[str, Path], gpt: ft.GPTModel, tmp_path: Path) -> None:
    first, ids, sampled = run_script(GPT_SCRIPT, folders["gpt2"], tmp_path)
    texts = ["Amazon is ", "FasterTransformer is"]
    assert first == gpt.pipeline_generate(texts)
    expected = gpt.model.generate(texts, max_new_tokens=5, do_sample=False)
    assert ids == [" ".join(str(i) for i in c.token_ids if i != 2) for c in expected]
    assert len(sampled) == 2
