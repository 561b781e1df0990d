"""GPT-2 for TensorFlow / Keras 3: the same models, files and names as `gpt2_pt`, over `gpt2_core`."""

from __future__ import annotations

from gpt2_core import GenerationConfig, GPT2Config, GPT2Tokenizer, __version__
from gpt2_tf import _start  # noqa: F401 - first: what the others import needs it
from gpt2_tf.cache import Past
from gpt2_tf.fitting import Perplexity
from gpt2_tf.heads import (
    TFGPT2DoubleHeadsModel,
    TFGPT2ForQuestionAnswering,
    TFGPT2ForSequenceClassification,
    TFGPT2ForTokenClassification,
    TFGPT2LMHeadModel,
)
from gpt2_tf.model import TFGPT2Model

__all__ = [
    "GPT2Config",
    "GPT2Tokenizer",
    "GenerationConfig",
    "Past",
    "Perplexity",
    "TFGPT2DoubleHeadsModel",
    "TFGPT2ForQuestionAnswering",
    "TFGPT2ForSequenceClassification",
    "TFGPT2ForTokenClassification",
    "TFGPT2LMHeadModel",
    "TFGPT2Model",
    "__version__",
]
