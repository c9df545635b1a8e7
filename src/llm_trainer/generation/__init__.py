"""Text from a model: batched and streamed decoding."""

from llm_trainer.generation.sampler import Completions, generate, stream

__all__ = ["Completions", "generate", "stream"]
