"""Tune gpt2-tales on a text in a loop of one's own: the model is a torch.nn.Module like any other.

    python examples/own_loop.py [text.txt] [steps]

Without a text it learns a riddle; the tuned model goes to tuned/.
"""

import sys
from pathlib import Path

import torch

from gpt2_pt import GPT2LMHeadModel, GPT2Tokenizer

RIDDLE = """The two mirrors hung in one hall. Whatever the left one showed, the right one showed as well, and nobody
could say which of them had been hung there first. "Ask the wall," said the cat, and went back to sleep."""

text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else RIDDLE
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

ids = torch.tensor(GPT2Tokenizer().encode(text)).unfold(0, 32, 16)  # rows of 32 tokens, every 16
model = GPT2LMHeadModel.from_pretrained("gpt2-tales").train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(0)
for step in range(steps):
    rows = ids[torch.randint(len(ids), (4,))]
    loss = model(rows, labels=rows).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss.item():.3f}")
model.save_pretrained("tuned")
