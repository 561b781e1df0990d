"""Tune gpt2-tales on a text with Keras's `fit`, save it, load it in PyTorch, and let it write on.

    python examples/keras_finetune.py [text.txt] [folder for the tuned model]

Needs both frameworks: pip install 'gpt2-duet[pt,tf]'. Without a text it learns a riddle, in half a minute on a CPU.
"""

import sys
from pathlib import Path

import keras
import numpy as np

from gpt2_pt import GPT2LMHeadModel, GPT2Tokenizer
from gpt2_tf import Perplexity, TFGPT2LMHeadModel

RIDDLE = """The two mirrors hung in one hall. Whatever the left one showed, the right one showed as well, and nobody
could say which of them had been hung there first. "Ask the wall," said the cat, and went back to sleep."""

text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else RIDDLE
folder = sys.argv[2] if len(sys.argv) > 2 else "tuned"

tokenizer = GPT2Tokenizer()
ids = np.array(tokenizer.encode(text))
length = min(len(ids), 128)
windows = np.lib.stride_tricks.sliding_window_view(ids, length)[:: length // 2]

model = TFGPT2LMHeadModel.from_pretrained("gpt2-tales")
model.compile(keras.optimizers.AdamW(1e-3), metrics=["accuracy", Perplexity()])
model.fit({"input_ids": windows, "labels": windows}, batch_size=4, epochs=25)
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)

model = GPT2LMHeadModel.from_pretrained(folder)
prompt = tokenizer(text[:20].rsplit(" ", 1)[0], return_tensors="pt")
out = model.generate(**prompt, max_new_tokens=min(length, 100) - prompt.input_ids.shape[1])
print(tokenizer.decode(out[0].tolist()))
