"""GPT-2 for PyTorch: the same models, files and names as `gpt2_tf`, over `gpt2_core`."""

from __future__ import annotations

from gpt2_core import GenerationConfig, GPT2Config, GPT2Tokenizer, __version__
from gpt2_pt.cache import Past
from gpt2_pt.heads import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)
from gpt2_pt.model import GPT2Model

__all__ = [
    "GPT2Config",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GPT2Tokenizer",
    "GenerationConfig",
    "Past",
    "__version__",
]
