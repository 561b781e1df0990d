"""What transformers 4's Flax classes write and compute, for tests that run without them.

Runs in an environment of its own, which has transformers 4.57, flax and jax (and not this project):

    pip install "transformers==4.57.*" flax "jax[cpu]"
    python make_flax.py make flax/                     # the archives beside this file
    python make_flax.py answer FOLDER answers.npz      # loads a folder that somebody else wrote

`make` writes one archive for each of CASES: flax_model.msgpack (or shards and their index), config.json, and
answers.npz with the ids and what the model returned. Weights come from a seed, far from initial values, so that gains,
biases and transposes all show.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
import transformers

transformers.logging.set_verbosity_error()

CONFIG = {
    "vocab_size": 13,
    "n_positions": 8,
    "n_embd": 6,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 7,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
#: Case: class, the most bytes of a shard, the number format, other settings.
CASES = {
    "lm": ("FlaxGPT2LMHeadModel", None, "float32", {}),
    "lm-untied": ("FlaxGPT2LMHeadModel", None, "float32", {"tie_word_embeddings": False}),
    "lm-sharded": ("FlaxGPT2LMHeadModel", "1KB", "float32", {}),
    "lm-bfloat16": ("FlaxGPT2LMHeadModel", None, "bfloat16", {}),
    "none": ("FlaxGPT2Model", None, "float32", {}),
}
IDS = np.array([[1, 12, 3, 5, 7, 11, 2, 0], [4, 4, 9, 8, 1, 6, 10, 3]])


def main() -> None:
    if sys.argv[1] == "make":
        for name in CASES:
            make(name, Path(sys.argv[2]) / f"{name}.zip")
    else:
        model = transformers.FlaxGPT2LMHeadModel.from_pretrained(sys.argv[2])
        ids = np.asarray([[1, 2, 3, 4, 5]])
        np.savez(sys.argv[3], ids=ids, out=np.asarray(model(ids).logits))


def make(name: str, archive: Path) -> None:
    kind, shard, dtype, settings = CASES[name]
    config = transformers.GPT2Config(**CONFIG, **settings)
    model = getattr(transformers, kind)(config, seed=0)
    chance = np.random.default_rng(0)
    params = jax.tree_util.tree_map(
        lambda leaf: jnp.asarray(chance.normal(0.1, 0.4, leaf.shape), dtype), flax.core.unfreeze(model.params)
    )
    out = model(IDS, params=jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), params))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, params=params, **({"max_shard_size": shard} if shard else {}))
        np.savez(Path(folder) / "answers.npz", ids=IDS, out=np.asarray(out[0]))
        archive.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for file in sorted(Path(folder).iterdir()):
                target.writestr(zipfile.ZipInfo(file.name), file.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
