"""Completions of a model: batched and streamed decoding, and the service that trainers ask."""

from llm_trainer.generation.sampler import Completions, generate, stream

__all__ = ["Completions", "generate", "stream"]
