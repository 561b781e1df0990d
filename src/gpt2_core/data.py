"""The data of training and evaluation: token shards, batches in an order that can be resumed, examples of tasks.

    data = open_data("shards/", "train")                                 # also nanoGPT's and llm.c's files
    batches = Batches(data, batch_size=8, block_size=1024, seed=0)
    for batch in batches:
        batch.input_ids, batch.labels                                    # (8, 1024) int64 each, in numpy
    saved = batches.state();  batches.restore(saved)                     # exactly where it was

    data = read_examples("pairs.jsonl", "instruction", tokenizer)        # the same Batches take them
    write_data("texts/", "shards/", tokenizer=GPT2Tokenizer(), val_fraction=0.01)

The parts: `data_shards` (files), `data_order` (the order), `data_batches`, `data_examples` (tasks), `data_writing`.
"""

from __future__ import annotations

from gpt2_core.data_batches import IGNORED, Batch, Batches
from gpt2_core.data_examples import TASKS, Examples, read_examples
from gpt2_core.data_shards import MANIFEST, TokenData, open_data, verify_data
from gpt2_core.data_writing import SHARD_TOKENS, write_data

__all__ = [
    "IGNORED",
    "MANIFEST",
    "SHARD_TOKENS",
    "TASKS",
    "Batch",
    "Batches",
    "Examples",
    "TokenData",
    "open_data",
    "read_examples",
    "verify_data",
    "write_data",
]
