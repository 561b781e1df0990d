"""The same under PyTorch Lightning, which owns the loop: pip install pytorch-lightning.

    python examples/with_lightning.py [text.txt] [steps]

Without a text it learns a riddle; the tuned model goes to tuned/.
"""

import sys
from pathlib import Path

import pytorch_lightning as lightning
import torch

from gpt2_pt import GPT2LMHeadModel, GPT2Tokenizer

RIDDLE = """The two mirrors hung in one hall. Whatever the left one showed, the right one showed as well, and nobody
could say which of them had been hung there first. "Ask the wall," said the cat, and went back to sleep."""

text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else RIDDLE
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20


class Tuning(lightning.LightningModule):
    """What Lightning wants to know: the loss of a batch, and who takes the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT2LMHeadModel.from_pretrained("gpt2-tales", device="cpu").train()

    def training_step(self, batch, index):
        """The loss of one batch."""
        loss = self.model(batch, labels=batch).loss
        print(f"step {self.global_step}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        """AdamW on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


rows = torch.tensor(GPT2Tokenizer().encode(text)).unfold(0, 32, 16)
loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
tuning = Tuning()
trainer = lightning.Trainer(
    max_steps=steps, max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(tuning, loader)
tuning.model.save_pretrained("tuned")
