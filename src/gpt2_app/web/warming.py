"""The first suggestion should not wait for what is done once: loading a model, tracing its graph."""

from __future__ import annotations

import threading
import time

from gpt2_app.web.models import Pool
from gpt2_app.web.picking import Rules
from gpt2_app.web.scheduler import Ask, Ended, Event, Failed


def warm(pool: Pool) -> None:
    """Load the default model and let it write a few tokens."""
    model = pool.hold()
    done = threading.Event()

    def tell(event: Event) -> None:
        if isinstance(event, (Ended, Failed)) or event.done:
            done.set()

    try:
        ids = tuple(model.tokenizer.encode("Once upon a time"))
        for samples in (3, 1):
            done.clear()
            rules = Rules(0.8, 40, 0.95)
            model.scheduler.submit(Ask(ids, rules, 0, 2, time.monotonic() + 60, samples=samples, choices=5), tell)
            done.wait(60)
    finally:
        pool.release(model)
