"""The same under Hugging Face accelerate, which places model and data on whatever there is: pip install accelerate.

    accelerate launch examples/with_accelerate.py [text.txt] [steps]

Without a text it learns a riddle; the tuned model goes to tuned/.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from gpt2_pt import GPT2LMHeadModel, GPT2Tokenizer

RIDDLE = """The two mirrors hung in one hall. Whatever the left one showed, the right one showed as well, and nobody
could say which of them had been hung there first. "Ask the wall," said the cat, and went back to sleep."""

text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else RIDDLE
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

accelerator = Accelerator()
model = GPT2LMHeadModel.from_pretrained("gpt2-tales", device="cpu").train()
rows = torch.tensor(GPT2Tokenizer().encode(text)).unfold(0, 32, 16)
loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3), loader)
step = 0
while step < steps:
    for batch in loader:
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        accelerator.print(f"step {step}: loss {loss.item():.3f}")
        step += 1
        if step == steps:
            break
accelerator.unwrap_model(model).save_pretrained("tuned")
