"""``model.export(folder)``: a SavedModel that plain TensorFlow runs, with no package of ours.

A language model is exported as two functions, each a signature too:

    prefill(input_ids (B, T), attention_mask (B, T))                       -> logits (B, V), past
    decode(input_ids (B, 1), past, attention_mask (B, S), S one longer)    -> logits (B, V), past

``past`` is one tensor (n_layer, 2, B, H, S, D); where pruning has left unlike numbers of heads, one tensor a layer,
``past_0`` (2, B, H, S, D) and so on. Logits are those after each row's last real token, in float32 at least.

Letters: B batch, T tokens of a prompt, S all positions, H heads, D head width, V vocabulary.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from gpt2_core.config import GPT2Config
from gpt2_core.errors import InputError
from gpt2_core.files import atomic_folder
from gpt2_core.parameters import Head
from gpt2_tf.layers import Tensor

_IDS = tf.TensorSpec((None, None), tf.int32, name="input_ids")
_MASK = tf.TensorSpec((None, None), tf.int32, name="attention_mask")
#: Files of a SavedModel, which a new one replaces; by TensorFlow's own conventions.
_OURS = ("saved_model.pb", "fingerprint.pb", "variables", "assets", "assets.extra")


class ExportingMixin:
    """``export`` for every model."""

    config: GPT2Config
    head: Head

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        *,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Path:
        """Write the model as a SavedModel for ``tf.saved_model.load`` or TensorFlow Serving.

        A language model gets the signatures ``prefill`` (also ``serving_default``) and ``decode``, the double-heads
        model ``choose`` besides: (B, N, T) ids and mask -> mc_logits (B, N). Any other model has ``serving_default``
        alone: (B, T) ids and mask -> every output but ``past``. Ids and masks are int32; sizes are free. The config is
        written to assets.extra/config.json.

        Args:
            filepath: the folder, written as a whole or not at all; a SavedModel that is there is replaced.
            format: "tf_saved_model", or what else Keras exports to.
            input_signature: what the model takes, as Keras's ``export`` wants it said, for one signature of one's own,
                ``serve``: to every output but ``past``.
            verbose, kwargs: for Keras, which does the work with such a signature or another format.
            tokenizer: a `TFGPT2Tokenizer` to export along, as the signatures ``tokenize`` (texts (B,) -> input_ids and
                attention_mask) and ``detokenize`` (the two -> texts (B,)).

        Raises: InputError, for a tokenizer that TensorFlow cannot hold; WriteError, where the system refuses.
        """
        folder = Path(filepath)
        if format != "tf_saved_model":
            super().export(filepath, format, verbose, input_signature, **kwargs)  # type: ignore[misc]
            return folder
        if input_signature is not None:
            archive = keras.export.ExportArchive()
            archive.track(self)
            archive.add_endpoint("serve", self._tensors, input_signature)
            archive.write_out(filepath, verbose=verbose)
            return folder
        functions = self._functions()
        if tokenizer is not None:
            functions |= _text_functions(tokenizer)
        module = tf.Module()
        # What the functions hold has to be found by TensorFlow, which does not look into Keras's models.
        module.parameters = [variable.value for variable in self.variables]  # type: ignore[attr-defined]
        module.tokenizer = tokenizer
        signatures = {}
        for name, (function, *specs) in functions.items():
            traced = tf.function(function, input_signature=specs, autograph=False)
            setattr(module, name, traced)
            signatures[name] = traced.get_concrete_function()
        if "prefill" in signatures:
            signatures["serving_default"] = signatures["prefill"]
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=True)
        with atomic_folder(folder, replaces=lambda name: name.split("/")[0] in _OURS) as stage:
            tf.saved_model.save(module, str(stage), signatures=signatures, options=options)
            self.config.save_pretrained(stage / "assets.extra")
        return folder

    def _functions(self) -> dict[str, tuple[Any, ...]]:
        """What to export: a function and what it takes, by name."""
        if self.head is Head.LM:
            return self._text_writing()
        if self.head is Head.DOUBLE:
            choices = [tf.TensorSpec((None, None, None), tf.int32, name=spec.name) for spec in (_IDS, _MASK)]

            def choose(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
                return {"mc_logits": _wide(self(input_ids, attention_mask=attention_mask).mc_logits)}  # type: ignore[operator]

            return self._text_writing() | {"choose": (choose, *choices)}

        def serve(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return self._tensors({"input_ids": input_ids, "attention_mask": attention_mask})

        return {"serving_default": (serve, _IDS, _MASK)}

    def _tensors(self, *inputs: Any) -> dict[str, Tensor]:
        """The outputs that are one tensor, by name."""
        out = self(*inputs, use_cache=False, training=False)  # type: ignore[operator]
        return {name: _wide(value) for name, value in out.items() if tf.is_tensor(value)}

    def _text_writing(self) -> dict[str, tuple[Any, ...]]:
        """``prefill`` and ``decode``."""
        config = self.config
        heads = [config.heads_of(layer) for layer in range(config.n_layer)]
        together = len(set(heads)) == 1
        kind = self.compute_dtype  # type: ignore[attr-defined]
        if together:
            shape = (config.n_layer, 2, None, heads[0], None, config.head_dim)
            pasts = [tf.TensorSpec(shape, kind, name="past")]
        else:
            pasts = [
                tf.TensorSpec((2, None, H, None, config.head_dim), kind, name=f"past_{layer}")
                for layer, H in enumerate(heads)
            ]

        def after(input_ids: Tensor, past: Any, attention_mask: Tensor) -> dict[str, Tensor]:
            fits = tf.debugging.assert_less_equal(
                tf.reduce_max(tf.reduce_sum(attention_mask, axis=-1)),
                config.n_positions,
                message=f"a row has more tokens than the {config.n_positions} positions of this model; shorten it",
            )
            with tf.control_dependencies([fits]):
                out = self.transformer(input_ids, past, attention_mask, use_cache=True, training=False)  # type: ignore[attr-defined]
                x = _at_last_real(out.last_hidden_state, attention_mask)
                made = {"logits": _wide(self.lm_head(x))}  # type: ignore[attr-defined]
            layers = [tf.stack(pair) for pair in out.past]
            if together:
                return made | {"past": tf.stack(layers)}
            return made | {f"past_{layer}": pair for layer, pair in enumerate(layers)}

        def prefill(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
            return after(input_ids, None, attention_mask)

        def decode(input_ids: Tensor, *more: Tensor) -> dict[str, Tensor]:
            *past, attention_mask = more
            return after(input_ids, past[0] if together else past, attention_mask)

        one = tf.TensorSpec((None, 1), tf.int32, name="input_ids")
        return {"prefill": (prefill, _IDS, _MASK), "decode": (decode, one, *pasts, _MASK)}


def _at_last_real(x: Tensor, attention_mask: Tensor) -> Tensor:
    """Each row's hidden state (B, C) at its last real token, of (B, T, C) under a mask (B, S)."""
    T = tf.shape(x)[1]
    real = tf.not_equal(attention_mask[:, -T:], 0)
    return tf.gather(x, tf.reduce_max(tf.where(real, tf.range(T), 0), axis=-1), batch_dims=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


def _text_functions(tokenizer: Any) -> dict[str, tuple[Any, ...]]:
    from gpt2_tf.text import TFGPT2Tokenizer

    if not isinstance(tokenizer, TFGPT2Tokenizer):
        raise InputError(
            f"tokenizer is a {type(tokenizer).__name__}, expected a TFGPT2Tokenizer, which TensorFlow can hold; make "
            "one that follows yours: TFGPT2Tokenizer(tokenizer)"
        )

    def detokenize(input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"texts": tokenizer.detokenize(input_ids, attention_mask)}

    texts = tf.TensorSpec((None,), tf.string, name="texts")
    return {"tokenize": (tokenizer.call, texts), "detokenize": (detokenize, _IDS, _MASK)}
