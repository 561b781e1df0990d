"""TFGPT2Model: the transformer without a head. The forward pass is `TFGPT2Model.call`, and there is only one.

Letters: B batch, T new positions, S all positions (cached and new), H heads, D head width, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from gpt2_core.config import GPT2Config
from gpt2_core.inputs import (
    POSITIONS_REMEDY,
    VOCABULARY_REMEDY,
    bad_head_mask,
    check_labels_shape,
    check_length,
    check_mask,
    check_not_empty,
    check_one_input,
    check_one_past,
    check_rank,
    check_whole_numbers,
    out_of_range,
)
from gpt2_core.parameters import Head
from gpt2_tf.attention import visible
from gpt2_tf.block import Block
from gpt2_tf.cache import Recorder, read_past
from gpt2_tf.layers import LayerNorm, Part, Tensor, dims, dropout, is_concrete, known
from gpt2_tf.outputs import BaseOutput
from gpt2_tf.weights import PreTrainedModel, inputs_together, registered


@tf.custom_gradient  # type: ignore[untyped-decorator]
def _rows(table: Tensor, ids: Tensor) -> tuple[Tensor, Any]:
    """The rows ``ids`` of ``table``, whose gradient is one dense sum.

    TensorFlow's own is a list of rows, in which a row looked up twice stands twice: Keras's optimizers take the square
    of each instead of their sum's, and would train the table wrongly.
    """

    def gradient(upstream: Tensor) -> tuple[Tensor, None]:
        flat = tf.reshape(upstream, (-1, table.shape[-1]))
        wide = tf.cast(flat, tf.float32) if flat.dtype.size < 4 else flat
        summed = tf.math.unsorted_segment_sum(wide, tf.reshape(ids, (-1,)), table.shape[0])
        return tf.cast(summed, table.dtype), None

    return tf.gather(table, ids), gradient


class Embedding(Part):
    """A table of rows whose out-of-range error names the ids, the range and the remedy."""

    label = "input_ids"
    remedy = VOCABULARY_REMEDY

    def __init__(self, rows: int, width: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = self.parameter("weight", rows, width)

    def call(self, ids: Tensor, label: str | None = None) -> Tensor:
        """(...) whole numbers -> (..., C); ``label`` is what the caller knows them as.

        Raises: InputError for ids outside the table, where they can be looked at without a wait: outside tf.function,
        on the CPU. Inside tf.function the CPU stops with TensorFlow's own error.
        """
        check_whole_numbers(label or self.label, ids.dtype.name, index=True)
        table = tf.convert_to_tensor(self.weight)
        if not is_concrete(ids):
            return tf.cast(_rows(table, ids), self.compute_dtype)
        try:
            return tf.cast(_rows(table, ids), self.compute_dtype)
        except tf.errors.InvalidArgumentError:
            found = ids.numpy()
            rows = int(self.weight.shape[0])
            if found.min() >= 0 and found.max() < rows:
                raise
            raise out_of_range(label or self.label, int(found.min()), int(found.max()), rows, self.remedy) from None


class PositionEmbedding(Embedding):
    """The learned positions."""

    label = "position_ids"
    remedy = POSITIONS_REMEDY


def positions_from(attention_mask: Tensor | None, T: Any, S: Any) -> Tensor:
    """Position ids (1 or B, T) of the new tokens: with a mask, the count of real tokens before each one."""
    if attention_mask is None:
        return tf.range(S - T, S)[None, :]
    counted = tf.cumsum(tf.cast(attention_mask, tf.int32), axis=-1) - 1
    return tf.maximum(counted, 0)[:, S - T :]


def layer_head_masks(head_mask: Tensor | None, config: GPT2Config, B: Any, T: Any, S: Any) -> list[Tensor | None]:
    """One mask a layer, broadcastable to (B, H, T, S), from (H,), (n_layer, H) or (n_layer, B, H, T, S).

    Raises: InputError for any other shape.
    """
    if head_mask is None:
        return [None] * config.n_layer
    shape = known(head_mask)
    if len(shape) == 1:
        masks = [head_mask[None, :, None, None]] * config.n_layer
    elif len(shape) in (2, 5) and shape[0] == config.n_layer:
        masks = [
            layer[None, :, None, None] if layer.shape.rank == 1 else layer
            for layer in tf.unstack(head_mask, num=config.n_layer)
        ]
    else:
        raise bad_head_mask(config, shape)
    for i, mask in enumerate(masks):
        wanted = [size if isinstance(size, int) else None for size in (B, config.heads_of(i), T, S)]
        if any(None not in (got, want) and got not in (1, want) for got, want in zip(known(mask), wanted, strict=True)):
            raise bad_head_mask(config, shape)
    return list(masks)


@registered
class TFGPT2Model(PreTrainedModel):
    """The bare transformer: token ids in, hidden states out.

    ``TFGPT2Model(config, seed=0)`` starts from the project's seeded initial values, the same bits in every framework.

    Source: Radford et al. 2019, section 2.3.
    """

    head = Head.NONE

    def _build(self, config: GPT2Config) -> None:
        policy = self.dtype_policy
        self.wte = Embedding(config.vocab_size, config.n_embd, name="wte", dtype=policy)
        self.wpe = PositionEmbedding(config.n_positions, config.n_embd, name="wpe", dtype=policy)
        self.h = [Block(config, layer, name=f"h_{layer}", dtype=policy) for layer in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon, name="ln_f", dtype=policy)
        self.seed_generator = keras.random.SeedGenerator(name="seed_generator")
        self.gradient_checkpointing = False

    @inputs_together
    def call(
        self,
        input_ids: Any = None,
        past: Any = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        *,
        past_key_values: Any = None,
        training: bool | None = None,
    ) -> BaseOutput:
        """Run the transformer over new tokens, after those in ``past``.

        Args:
            input_ids: (B, T) token ids from 0 to vocab_size - 1; or give ``inputs_embeds``. A dict of arguments by
                name, or a list of them in this order, may stand in its place.
            past: what an earlier call returned as ``past``; ``past_key_values`` is the same argument.
            attention_mask: (B, S), 1 for real tokens and 0 for padding, cached tokens included.
            token_type_ids: (B, T) ids embedded through the token table and added.
            position_ids: (B, T) from 0 to n_positions - 1; by default counted, over real tokens where there is a mask.
            head_mask: (H,), (n_layer, H) or (n_layer, B, H, T, S), multiplied into the attention probabilities.
            inputs_embeds: (B, T, C) instead of ``input_ids``.
            use_cache: return ``past``; by default as the config says.
            output_attentions: return the probabilities, n_layer of (B, H, T, S).
            output_hidden_states: return n_layer + 1 of (B, T, C).
            training: switch dropout on; Keras sets it in ``fit``.

        Raises: InputError, for shapes, ids or lengths that this model cannot take.
        """
        config = self.config
        past = check_one_past(past, past_key_values)
        check_one_input(input_ids, inputs_embeds)
        if input_ids is not None:
            check_rank("input_ids", known(input_ids), "(batch, position)", 2)
            shape, (B, T) = known(input_ids), dims(input_ids)
        else:
            assert inputs_embeds is not None
            check_rank("inputs_embeds", known(inputs_embeds), "(batch, position, n_embd)", 3)
            shape, (B, T) = known(inputs_embeds)[:2], dims(inputs_embeds)[:2]
            check_labels_shape("inputs_embeds", known(inputs_embeds), (*shape, config.n_embd))
        check_not_empty(shape)
        past = read_past(past, config, shape[0])
        start = past.length if past is not None else 0
        S = start + T
        known_start = known(past[0][0])[2] if past is not None else 0
        if position_ids is None:
            check_length(config, shape[1], known_start)
        elif known(position_ids) not in ((shape[1],), (1, shape[1])):
            check_labels_shape("position_ids", known(position_ids), shape)
        if token_type_ids is not None:
            check_labels_shape("token_type_ids", known(token_type_ids), shape)
        if attention_mask is not None:
            check_mask(known(attention_mask), shape[0], shape[1], known_start)
            attention_mask = tf.not_equal(attention_mask, tf.zeros((), attention_mask.dtype))

        use_cache = config.use_cache if use_cache is None else use_cache
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        checkpointing = self.gradient_checkpointing and bool(training)
        seeds = self._seeds() if training else None

        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        if position_ids is None:
            position_ids = positions_from(attention_mask, T, S)
        x = x + self.wpe(position_ids)
        if token_type_ids is not None:
            x = x + self.wte(token_type_ids, "token_type_ids")
        x = dropout(x, config.embd_pdrop, None if seeds is None else seeds[0])

        # None means plain causal attention over T = S positions, or one query that sees everything.
        mask: Tensor | None = None
        if attention_mask is not None or (past is not None and shape[1] != 1):
            mask = visible(T, S, attention_mask)
        elif past is None and tf.executing_eagerly():
            # Once for all layers: outside a graph each small operation costs as much as a large one.
            mask = visible(T, S, None)
        masks = layer_head_masks(head_mask, config, B, T, S)
        recorder = Recorder(past, T, config, keep=bool(use_cache) and not checkpointing)

        hidden: list[Tensor] = []
        attentions: list[Tensor] = []
        for i, block in enumerate(self.h):
            if output_hidden_states:
                hidden.append(x)

            def run(x: Tensor, i: int = i, block: Any = block) -> Any:
                def remember(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                    return recorder.remember(i, k, v)

                of_block = None if seeds is None else tuple(seeds[1 + 3 * i : 4 + 3 * i])
                return block(x, mask, past is None, masks[i], remember, output_attentions, of_block)

            if checkpointing:
                x, probs = _recomputed(run, x, bool(output_attentions))
            else:
                x, probs = run(x)
            if output_attentions:
                attentions.append(probs)
        x = self.ln_f(x)
        if output_hidden_states:
            hidden.append(x)
        return BaseOutput(
            last_hidden_state=x,
            past=recorder.result(),
            hidden_states=tuple(hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _seeds(self) -> list[Tensor]:
        """A seed (2,) for each place of dropout in one pass: the embeddings, then three a block."""
        places = 1 + 3 * self.config.n_layer
        seed = tf.cast(self.seed_generator.next(), tf.int32)
        drawn = tf.random.stateless_uniform((places, 2), seed, minval=None, maxval=None, dtype=tf.int32)
        return tf.unstack(drawn, num=places)  # type: ignore[no-any-return]


def _recomputed(run: Any, x: Tensor, with_probs: bool) -> tuple[Tensor, Tensor | None]:
    """``run(x)`` whose activations are computed again for the gradients instead of kept."""
    if with_probs:
        x, probs = tf.recompute_grad(run)(x)
        return x, probs
    return tf.recompute_grad(lambda x: run(x)[0])(x), None
