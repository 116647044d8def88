"""A small trained model for demonstrations, tests and measurements.

It rewrites spoken English numbers, dates, times, money and measures in written form;
`checkpoint/README.md` is its model card.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""The folder of the model: an ordinary Hugging Face checkpoint of under 8 MB."""

EXAMPLES: tuple[str, ...] = (
    "the third of march nineteen ninety nine at half past six in the evening",
    "Meet me on July fourth twenty twenty one at noon.",
    "two thousand four hundred and seven",
    "Send forty eight gigabytes to room two oh five before half past five in the afternoon.",
    "The recipe needs two hundred and fifty grams of flour, three eggs and half a litre of milk.",
    "it was minus twelve point five degrees celsius in Oslo on the first of February",
    "He ran the marathon in two hours and five minutes and won ten thousand euros.",
    "Two thirds of the forty eight students passed, and one quarter got more than ninety percent.",
)
"""Sentences to show the model with; `tests/test_demo_model_data.py` holds its answers."""
