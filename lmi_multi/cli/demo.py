"""`lmi-multi demo`: the main job on the model that ships with the package."""

from __future__ import annotations

from typing import Annotated

import typer

from lmi_multi.cli import options
from lmi_multi.cli.console import byte_progress, line, out, table


def demo(
    backend: options.Backend = "auto",
    count: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 8,
) -> None:
    """Run the embedded demo model: spoken dates and numbers in, written form out."""
    import torch

    import lmi_multi
    from lmi_multi.cli.generate import summary
    from lmi_multi.demo import EXAMPLES

    # Products this small are not worth sharing, and threads that wait for each other on a busy
    # machine make it many times slower.
    torch.set_num_threads(1)
    prompts = list(EXAMPLES)[:count]
    with byte_progress("loading demo") as progress:
        model = lmi_multi.load("demo", backend=backend, progress=progress)
    with model:
        completions = model.generate(prompts)
        shown = table("prompt", "text")
        for completion in completions:
            shown.add_row(str(completion.prompt), completion.text or "")
        out().print(shown)
        line(summary(model))
