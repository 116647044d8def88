"""The Neuron backend's place: it reports what it finds, and does not run models yet."""

from __future__ import annotations

from .backend import NeuronBackend

BACKEND = NeuronBackend()
