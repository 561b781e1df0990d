"""GPT-2's tokenizer as a Keras layer: strings to ids and back inside a TensorFlow graph.

    tokenizer = TFGPT2Tokenizer(pad_token_id=50256)
    batch = tokenizer(["Hello world", "One.\n\nTwo"])      # input_ids and attention_mask, (2, 5)
    tokenizer.detokenize(batch["input_ids"], batch["attention_mask"])

The ids are those of GPT2Tokenizer, whatever the text. The work is done in `gpt2_tf.text_graph`, in TensorFlow's own
operations; here are the arguments, the rows of equal length, the way back, and what Keras needs to save the layer.
"""

from __future__ import annotations

import base64
import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from gpt2_core.errors import TokenizerError
from gpt2_core.tokenizer import SPECIAL, GPT2Tokenizer, _repair
from gpt2_core.tokenizer_files import ROLES, AddedToken, TokenizerParts
from gpt2_core.vocabulary import Vocabulary, build_vocabulary, gpt2_vocabulary
from gpt2_tf.text_graph import GraphTokenizer, spread

Tensor = Any

_SIDES = ("right", "left")
_LONGEST = 1 << 31


@keras.saving.register_keras_serializable(package="gpt2_tf")
class TFGPT2Tokenizer(keras.layers.Layer):
    """A layer that turns a string tensor into ids, and ids into strings, as the given GPT2Tokenizer does.

    tokenizer: whose vocabulary, added tokens and settings to follow; GPT-2's own if None. What is changed in it
        afterwards is not seen.
    max_length: where rows are cut, in tokens; None for the tokenizer's model_max_length.
    padding: "longest" or True, to the longest row of the batch; "max_length", to max_length; False for ragged rows.
    padding_side, truncation_side: "right" or "left"; the tokenizer's own if None.
    truncation: whether rows are cut to max_length.
    pad_token_id: what fills short rows; the tokenizer's own if None. GPT-2 has no pad token: take its eos token,
        50256. The attention mask tells padding from real tokens.
    add_prefix_space: whether texts that do not start with a space get one; the tokenizer's own if None.
    special: what special tokens inside a text are. "allow": recognised; "text": text like any other; "forbid": an
        error. Tokens added with ``add_tokens`` are always recognised.
    native: False runs the GPT2Tokenizer itself, in Python: on one core it is quicker, in tf.data too, but it cannot be
        exported, and several Python functions do not run at a time.

    Called with strings of shape (B,), or one string of shape (), it returns ``input_ids`` and ``attention_mask``, int32
    of shape (B, T) or (T,). Bytes that are not UTF-8 become U+FFFD, as ``bytes.decode("utf-8", "replace")`` does it.

    Raises: TokenizerError for arguments that are unknown or do not go together; inside a graph, where no text is known
    yet, TensorFlow's InvalidArgumentError with the same words.
    """

    def __init__(
        self,
        tokenizer: GPT2Tokenizer | None = None,
        *,
        max_length: int | None = None,
        padding: bool | str = "longest",
        padding_side: str | None = None,
        truncation: bool = False,
        truncation_side: str | None = None,
        pad_token_id: int | None = None,
        add_prefix_space: bool | None = None,
        special: str = "allow",
        native: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        follows = _copied(tokenizer)
        self.padding = _padding(padding)
        self.padding_side = _choice("padding_side", padding_side or follows.padding_side, _SIDES)
        self.truncation = bool(truncation)
        self.truncation_side = _choice("truncation_side", truncation_side or follows.truncation_side, _SIDES)
        self.max_length = _max_length(max_length, self.padding, self.truncation, follows)
        self.pad_token_id = _pad_token_id(pad_token_id, self.padding, follows)
        self.add_prefix_space = follows.add_prefix_space if add_prefix_space is None else bool(add_prefix_space)
        self.special = _choice("special", special, SPECIAL)
        self.native = bool(native)
        self._is_default = tokenizer is None
        self._follows = follows
        self._graph = GraphTokenizer(follows, self.special) if self.native else None
        with tf.init_scope(), tf.device("CPU:0"):
            self._token_bytes = tf.constant(follows._token_bytes)
        self.built = True

    # ---- text to ids -------------------------------------------------------------------------------------------------

    def __call__(self, texts: Any, **kwargs: Any) -> Any:
        """The ids and the mask of a string tensor, a string, or a list or array of strings."""
        return super().__call__(texts, **kwargs) if isinstance(texts, keras.KerasTensor) else self.call(texts)

    def call(self, texts: Any) -> dict[str, Any]:
        """The same as calling the layer."""
        texts = _string_tensor(texts)
        rank = texts.shape.rank
        if rank is None or rank > 1:
            raise TokenizerError(
                f"the texts have the shape {texts.shape}; expected (), one text, or (B,), a batch of them; give them "
                f"that shape first: tf.reshape(texts, [-1])"
            )
        try:
            batch = self._traced(texts if rank else texts[None])
        except tf.errors.InvalidArgumentError as cause:
            self._explain(texts, cause)
        if rank == 0:
            return {name: rows[0] for name, rows in batch.items()}
        if self.padding and tf.is_symbolic_tensor(texts) and texts.shape[0] is not None:
            return {name: tf.ensure_shape(rows, [texts.shape[0], self._width]) for name, rows in batch.items()}
        return dict(batch)

    def compute_output_spec(self, texts: Any) -> dict[str, Any]:
        """The shapes and types of what calling the layer returns, for Keras."""
        shape = (*texts.shape, self._width)
        ragged = {} if self.padding else {"ragged": True}
        return {name: keras.KerasTensor(shape, "int32", **ragged) for name in ("input_ids", "attention_mask")}

    @property
    def _width(self) -> int | None:
        return self.max_length if self.padding == "max_length" else None

    @functools.cached_property
    def _traced(self) -> Any:
        """`_batch` as a graph, made when it is first called: a second or so, once."""
        with tf.init_scope():
            function = tf.function(self._batch, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
            return function.get_concrete_function()

    def _batch(self, texts: Tensor) -> dict[str, Tensor]:
        with tf.device("CPU:0"):  # strings live there
            ids, splits = (
                self._in_python(texts) if self._graph is None else self._graph.encode(texts, self.add_prefix_space)
            )
            lengths = splits[1:] - splits[:-1]
            kept = lengths
            if self.truncation and self.max_length is not None:
                kept = tf.minimum(lengths, self.max_length)
            starts = splits[:-1] + (lengths - kept if self.truncation_side == "left" else 0)
            return self._padded(ids, starts, kept) if self.padding else _ragged(ids, starts, kept)

    def _padded(self, ids: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        width = tf.reduce_max(tf.concat([lengths, [0]], 0))
        if self._width is not None:
            words = [_too_long("a row is longer than max_length", self._width)]
            with tf.control_dependencies([tf.debugging.Assert(width <= self._width, words)]):
                width = tf.constant(self._width, tf.int64)
        columns = tf.range(width)[None, :]
        if self.padding_side == "left":
            columns -= (width - lengths)[:, None]
        real = (columns >= 0) & (columns < lengths[:, None])
        places = tf.where(real, starts[:, None] + columns, 0)
        rows = tf.where(real, tf.gather(tf.concat([ids, [0]], 0), places), self.pad_token_id)
        return {"input_ids": rows, "attention_mask": tf.cast(real, tf.int32)}

    def _in_python(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        ids, splits = tf.numpy_function(self._encode_in_python, [texts], [tf.int32, tf.int64], stateful=False)
        return tf.ensure_shape(ids, [None]), tf.ensure_shape(splits, [None])

    def _encode_in_python(self, texts: NDArray[np.object_]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        if not len(texts):
            return np.zeros(0, np.int32), np.zeros(1, np.int64)
        strings = [text.decode("utf-8", "replace") for text in texts.tolist()]
        ids = self._follows._ids(strings, self.special, self.add_prefix_space, 1)
        between = np.flatnonzero(ids < 0)  # -1 stands between texts
        splits = np.zeros(len(texts) + 1, np.int64)
        splits[1:-1] = between - np.arange(len(between))
        splits[-1] = len(ids) - len(between)
        return ids[ids >= 0], splits

    def _explain(self, texts: Tensor, cause: Exception) -> NoReturn:
        """Raise what GPT2Tokenizer would have raised for texts that the graph has refused."""
        strings = [text.decode("utf-8", "replace") for text in texts.numpy().reshape(-1).tolist()]
        rows = self._follows.encode_batch(strings, special=self.special, add_prefix_space=self.add_prefix_space)
        longest = max(map(len, rows), default=0)
        if self._width is not None and not self.truncation and longest > self._width:
            raise TokenizerError(_too_long(f"a row is {longest} tokens long", self._width)) from cause
        raise cause

    # ---- ids to text -------------------------------------------------------------------------------------------------

    def detokenize(self, ids: Any, attention_mask: Any = None, skip_special_tokens: bool = False) -> Tensor:
        """The bytes of ids of shape (..., T), also ragged: strings of shape (...).

        attention_mask: where it is 0, as at padding, there is nothing. skip_special_tokens: so for special tokens.
        The strings are the tokens' bytes as they are, also where they are not UTF-8.

        Raises: TokenizerError for ids that are no integers or that the tokenizer does not have; in a graph
        TensorFlow's InvalidArgumentError.
        """
        with tf.device("CPU:0"):
            ids, real = _id_tensor(ids), _id_tensor(attention_mask)
            ragged = ids if isinstance(ids, tf.RaggedTensor) else None
            if ragged is not None:
                ids = ragged.flat_values
                real = real.flat_values if isinstance(real, tf.RaggedTensor) else real
            if real is not None:
                ids = tf.where(real != 0, ids, 0)
            strings = tf.gather(self._token_bytes, self._checked(ids))
            if real is not None:
                strings = tf.where(real != 0, strings, "")
            if skip_special_tokens:
                special = tf.constant(self._follows.all_special_ids, ids.dtype)
                strings = tf.where(tf.reduce_any(ids[..., None] == special, -1), "", strings)
            if ragged is not None:
                strings = ragged.with_flat_values(strings).to_tensor("")
            return tf.strings.reduce_join(strings, axis=-1) if strings.shape.rank != 0 else strings

    def _checked(self, ids: Tensor) -> Tensor:
        wrong = (ids < 0) | (ids >= len(self._follows))
        if not tf.is_symbolic_tensor(ids):
            wrong_ids = tf.boolean_mask(tf.reshape(ids, [-1]), tf.reshape(wrong, [-1]))
            self._follows.decode_bytes(wrong_ids.numpy()[:1])  # names the id, if there is one
            return ids
        words = (
            f"an id is not in the vocabulary; expected 0 to {len(self._follows) - 1}; check that model and tokenizer "
            f"belong together (a model's vocab_size may be padded), and give the attention_mask if rows are padded"
        )
        with tf.control_dependencies([tf.debugging.Assert(~tf.reduce_any(wrong), [words])]):
            return tf.identity(ids)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Everything that the layer is made of, the vocabulary too if it is not GPT-2's own."""
        config: dict[str, Any] = super().get_config()
        return config | {
            "tokenizer": None if self._is_default else _to_config(self._follows),
            "max_length": self.max_length,
            "padding": self.padding,
            "padding_side": self.padding_side,
            "truncation": self.truncation,
            "truncation_side": self.truncation_side,
            "pad_token_id": self.pad_token_id,
            "add_prefix_space": self.add_prefix_space,
            "special": self.special,
            "native": self.native,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TFGPT2Tokenizer:
        """The layer that `get_config` describes."""
        described = config["tokenizer"]
        return cls(**{**config, "tokenizer": None if described is None else _from_config(described)})

    def _trackable_children(self, save_type: str = "checkpoint", **kwargs: Any) -> Any:
        if save_type == "savedmodel" and not self.native:
            raise TokenizerError(
                "this TFGPT2Tokenizer has native=False: it runs Python, which no SavedModel can hold; expected one of "
                "TensorFlow's own operations; make it with native=True"
            )
        return super()._trackable_children(save_type, **kwargs)


# ---- arguments ---------------------------------------------------------------------------------------------------


def _choice(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise TokenizerError(f"{name} is {value!r}; expected {' or '.join(map(repr, choices))}")
    return str(value)


def _padding(padding: bool | str | None) -> bool | str:
    known = {True: "longest", "longest": "longest", "max_length": "max_length"}
    if padding in (False, None, "do_not_pad"):
        return False
    if padding not in known:
        raise TokenizerError(f'padding is {padding!r}; expected True, False, "longest" or "max_length"')
    return known[padding]


def _max_length(max_length: int | None, padding: bool | str, truncation: bool, follows: GPT2Tokenizer) -> int | None:
    used = truncation or padding == "max_length"
    if max_length is None:
        limit = follows.model_max_length
        if padding == "max_length" and limit > _LONGEST:
            raise TokenizerError('padding="max_length" needs a max_length: this tokenizer has no model_max_length')
        return limit if used and limit <= _LONGEST else None
    if not isinstance(max_length, (int, np.integer)) or isinstance(max_length, bool) or not 0 <= max_length <= _LONGEST:
        raise TokenizerError(f"max_length is {max_length!r}; expected a number of tokens, 0 or more")
    if not used:
        raise TokenizerError(
            f"max_length is {max_length}, but nothing is cut or filled to it; expected truncation=True or "
            f'padding="max_length" with it; give one of them, or leave max_length out'
        )
    return int(max_length)


def _pad_token_id(pad_token_id: int | None, padding: bool | str, follows: GPT2Tokenizer) -> int | None:
    index = follows.pad_token_id if pad_token_id is None else pad_token_id
    if index is None and padding:
        raise TokenizerError(
            "padding was asked for, but this tokenizer has no pad token (GPT-2 was trained without one); give "
            f"pad_token_id={follows.eos_token_id}, its eos token, since the attention mask tells padding from real "
            "tokens; or padding=False for ragged rows"
        )
    if index is not None and (not isinstance(index, (int, np.integer)) or not 0 <= index < len(follows)):
        raise TokenizerError(f"pad_token_id is {index!r}; expected an id of the tokenizer, 0 to {len(follows) - 1}")
    return None if index is None else int(index)


def _too_long(what: str, width: int) -> str:
    return (
        f"{what}, which does not fit into max_length={width}; expected shorter texts; cut them with truncation=True, "
        f'or use padding="longest"'
    )


def _string_tensor(texts: Any) -> Tensor:
    if not tf.is_tensor(texts):
        kind = type(texts).__name__
        texts = texts.tolist() if isinstance(texts, np.ndarray) else texts
        try:
            texts = tf.nest.map_structure(lambda text: _repair(text) if isinstance(text, str) else text, texts)
            texts = tf.convert_to_tensor(texts, tf.string)
        except (TypeError, ValueError) as cause:
            raise TokenizerError(
                f"the texts are of type {kind}, which makes no tensor of strings ({cause}); expected a string, a list "
                f"of strings or a string tensor"
            ) from cause
    if texts.dtype != tf.string or isinstance(texts, (tf.RaggedTensor, tf.SparseTensor)):
        raise TokenizerError(
            f"the texts are a {type(texts).__name__} of {texts.dtype.name}; expected a dense tensor of strings; to "
            f"turn ids into text use detokenize"
        )
    return texts


def _id_tensor(ids: Any) -> Tensor:
    if ids is None:
        return None
    if not isinstance(ids, tf.RaggedTensor):
        try:
            ids = tf.convert_to_tensor(ids)
        except (TypeError, ValueError) as cause:
            raise TokenizerError(
                f"the ids make no tensor ({cause}); expected integers in rows of equal length, or a RaggedTensor"
            ) from cause
        if tf.size(ids) == 0 if not tf.is_symbolic_tensor(ids) else False:
            ids = tf.cast(ids, tf.int32)  # an empty list is one of floats
    if not ids.dtype.is_integer:
        raise TokenizerError(f"the ids are {ids.dtype.name}; expected integers; to turn text into ids call the layer")
    return ids


def _ragged(ids: Tensor, starts: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    rows = tf.RaggedTensor.from_row_lengths(tf.gather(ids, spread(starts, lengths)), lengths, validate=False)
    return {"input_ids": rows, "attention_mask": tf.ones_like(rows)}


# ---- the tokenizer that is followed ------------------------------------------------------------------------------

_SETTINGS = ("errors", "padding_side", "truncation_side", "add_prefix_space", "model_max_length", *ROLES)


def _copied(tokenizer: GPT2Tokenizer | None) -> GPT2Tokenizer:
    if tokenizer is None:
        return GPT2Tokenizer()
    if not isinstance(tokenizer, GPT2Tokenizer):
        raise TokenizerError(
            f"tokenizer is of type {type(tokenizer).__name__}; expected a GPT2Tokenizer, or None for GPT-2's own "
            f"vocabulary; for a name or a folder: GPT2Tokenizer.from_pretrained(...)"
        )
    added = sorted(tokenizer._added.values(), key=lambda token: token.id)
    return _made(tokenizer._vocabulary, added, {name: getattr(tokenizer, name) for name in _SETTINGS})


def _made(vocabulary: Vocabulary, added: list[AddedToken], settings: Mapping[str, Any]) -> GPT2Tokenizer:
    tokenizer = GPT2Tokenizer.__new__(GPT2Tokenizer)
    tokenizer._setup(TokenizerParts(vocabulary, added, dict(settings)), settings)
    return tokenizer


def _to_config(tokenizer: GPT2Tokenizer) -> dict[str, Any]:
    vocabulary = tokenizer._vocabulary
    added = sorted(tokenizer._added.values(), key=lambda token: token.id)
    packed = None
    if not vocabulary.is_gpt2:
        content = json.dumps({"ids": vocabulary.token_ids, "merges": vocabulary.merges()})
        packed = base64.b64encode(zlib.compress(content.encode("utf-8"))).decode("ascii")
    return {
        "vocabulary": packed,
        "added": [[token.content, token.id, token.special] for token in added],
        "settings": {name: getattr(tokenizer, name) for name in _SETTINGS},
    }


def _from_config(config: Mapping[str, Any]) -> GPT2Tokenizer:
    vocabulary = gpt2_vocabulary()
    if config["vocabulary"] is not None:
        content = json.loads(zlib.decompress(base64.b64decode(config["vocabulary"])))
        merges = [merge.split(" ") for merge in content["merges"]]
        vocabulary = build_vocabulary(content["ids"], merges, source="the layer's configuration")
    added = [AddedToken(content, index, special) for content, index, special in config["added"]]
    return _made(vocabulary, added, config["settings"])
