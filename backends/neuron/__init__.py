"""The Neuron backend: static graphs, and an emulator that runs them on a CPU."""

from __future__ import annotations

from .backend import NeuronBackend

BACKEND = NeuronBackend()
