"""What Keras's `fit` can do between epochs: save the model as everyone reads it, and show what it writes.

model.fit(..., callbacks=[SavePretrained("runs/tales"), WriteSamples(tokenizer, "Once upon a time")])
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras

from gpt2_core.errors import InputError, nearest
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_tf.adapters import held_by, save_adapter


class SavePretrained(keras.callbacks.Callback):
    """Save the model after each epoch with ``save_pretrained``: for both frameworks, atomic, and for others to read.

    While the model holds an adapter, this alone is saved, with `gpt2_tf.adapters.save_adapter`.

    Args:
        folder: gets epoch-0001, epoch-0002, ...
        monitor: a name in the logs, as "val_loss"; with it only an epoch that is the best so far is saved.
        mode: "min" or "max", what is better.
        keep: how many of the epochs that it has saved stay; what an earlier fit left in the folder is not touched.
        tokenizer: saved with each.

    Raises: InputError, for another mode, or a name that is not in the logs; WriteError, where the system refuses.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        monitor: str | None = None,
        mode: str = "min",
        keep: int = 1,
        tokenizer: GPT2Tokenizer | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("min", "max"):
            raise InputError(f"mode is {mode!r}, expected 'min' or 'max'")
        if not isinstance(keep, int) or keep < 1:
            raise InputError(f"keep is {keep!r}, expected a whole number of at least 1")
        self.folder, self.monitor, self.mode, self.keep, self.tokenizer = Path(folder), monitor, mode, keep, tokenizer
        self.best = math.inf
        self.saved: list[Path] = []

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Save, where it is time to; called by Keras."""
        if self.monitor is not None:
            known = dict(logs or {})
            if self.monitor not in known:
                hint = nearest(self.monitor, list(known))
                raise InputError(f"monitor is {self.monitor!r}, expected one of {', '.join(known)}{hint}")
            value = float(known[self.monitor]) * (1 if self.mode == "min" else -1)
            if not value < self.best:
                return
            self.best = value
        folder = self.folder / f"epoch-{epoch + 1:04d}"
        save = self.model.save_pretrained if held_by(self.model) is None else partial(save_adapter, self.model)
        save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        # By when they were saved, not by name: another fit counts its epochs from one again.
        self.saved = [*(one for one in self.saved if one != folder), folder]
        while len(self.saved) > self.keep:
            shutil.rmtree(self.saved.pop(0), ignore_errors=True)


class WriteSamples(keras.callbacks.Callback):
    """Let the model write on after each epoch.

    Args:
        tokenizer, prompt: how the text begins.
        count: how many tokens are added. settings: what else ``generate`` takes; by default 40 likeliest, seed 0.
        write: gets each text; by default the terminal.
    """

    def __init__(
        self,
        tokenizer: GPT2Tokenizer,
        prompt: str,
        *,
        count: int = 40,
        settings: Mapping[str, Any] | None = None,
        write: Callable[[str], Any] = sys.stdout.write,
    ) -> None:
        super().__init__()
        self.tokenizer, self.prompt, self.count, self.write = tokenizer, prompt, count, write
        self.settings = {"do_sample": True, "top_k": 40, "seed": 0} if settings is None else dict(settings)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Write; called by Keras."""
        ids = self.tokenizer.encode(self.prompt) or [self.tokenizer.eos_token_id]
        made = self.model.generate([ids], max_new_tokens=self.count, **self.settings)
        text = self.tokenizer.decode(made[0].numpy().tolist(), skip_special_tokens=True)
        self.write(f"\nafter epoch {epoch + 1}: {text}\n")
