"""Text from a model. What can be decided before the model runs is decided in `gpt2_core.generation`.

Letters: B prompts, T their padded length, R texts (B * num_return_sequences), S all positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from gpt2_core.generation import Plan, prepare
from gpt2_core.sampling import GenerationConfig, all_banned, not_numbers
from gpt2_tf.layers import Tensor
from gpt2_tf.sampling import apply_rules, choose, problem


class GenerationMixin:
    """``generate`` for models with a transformer and a language-model head."""

    config: Any
    transformer: Any
    lm_head: Any
    _pass: Any = None

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        generation_config: GenerationConfig | None = None,
        on_token: Callable[[Tensor], Any] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue the prompts: (B, T) -> (B * num_return_sequences, T + new tokens), int64.

        Texts that ended go on with the pad token; when all have ended it stops. Padding comes back on the left.
        The same seed gives the same text for row i whatever the other rows hold, and in every framework.

        Args:
            input_ids: (B, T) prompts, padded on either side.
            attention_mask: (B, T), 1 for real tokens; without one, every token is real.
            generation_config: settings; keyword arguments take their place.
            on_token: called with the new tokens (R,) of each step.
            **settings: any setting of `GenerationConfig`: max_new_tokens, do_sample, temperature, top_k, top_p, seed...

        Raises: GenerationError, InputError; both before anything is computed, but for logits that are not numbers and
        rules that ban every token.
        """
        plan = prepare(self.config, _as_numpy(input_ids), _as_numpy(attention_mask), generation_config, settings)
        made = self._continue(plan, on_token)
        return tf.convert_to_tensor(plan.result([column.numpy() for column in made]))

    def _next_logits(
        self, ids: Tensor, past: Any, mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Any]:
        """One pass of the one forward: the logits (rows, V) after the last token, and the new past."""
        if self._pass is None:
            # Traced once for each kind of step: with and without past, with and without padding.
            self._pass = tf.function(self._last_logits, reduce_retracing=True, autograph=False)
        logits, past = self._pass(ids, past, mask, position_ids)
        return logits, past

    def _last_logits(self, ids: Tensor, past: Any, mask: Tensor | None, position_ids: Tensor | None) -> Any:
        out = self.transformer(ids, past, mask, position_ids=position_ids, use_cache=True, training=False)
        return self.lm_head(out.last_hidden_state[:, -1]), tuple(out.past)

    def _parameters_replaced(self) -> None:
        self._pass = None  # what was traced holds the old ones
        super()._parameters_replaced()  # type: ignore[misc]

    def _continue(self, plan: Plan, on_token: Callable[[Tensor], Any] | None) -> list[Tensor]:
        """The loop: prefill the prompts once, then a token a step. Returns the new tokens, a column (R,) a step."""
        ids = tf.constant(plan.ids[:, plan.start :])
        mask = tf.constant(plan.mask[:, plan.start :])
        padded = not bool(plan.mask[:, plan.start :].all())
        logits, past = self._next_logits(ids, None, mask if padded else None, None)
        if len(plan.rows) > len(plan.ids):
            rows = tf.constant(plan.rows)
            logits, ids, mask = tf.gather(logits, rows), tf.gather(ids, rows), tf.gather(mask, rows)
            past = tuple((tf.gather(key, rows), tf.gather(value, rows)) for key, value in past)
        history = tf.where(mask, ids, -1)  # (R, n)
        uniforms = None if plan.uniforms is None else tf.constant(plan.uniforms)
        finished = np.zeros(len(plan.rows), np.bool_)

        made: list[Tensor] = []
        while True:
            step = len(made)
            scores = apply_rules(logits, history, plan.settings, step, plan.eos_ids)
            self._check(logits, scores, finished, step)
            new = choose(scores, None if uniforms is None else uniforms[:, step])
            new = tf.where(finished, tf.constant(plan.pad_id, tf.int64), new)  # (R,)
            made.append(new)
            if on_token is not None:
                on_token(new)
            finished = finished | plan.ended(new.numpy(), step)
            if finished.all():
                return made
            history = tf.concat((history, new[:, None]), axis=1)
            position_ids = None
            if padded:
                mask = tf.concat((mask, tf.ones((len(plan.rows), 1), tf.bool)), axis=1)  # (R, S)
                position_ids = tf.constant(plan.positions(step, self.config.n_positions))
            logits, past = self._next_logits(new[:, None], past, mask if padded else None, position_ids)

    @staticmethod
    def _check(logits: Tensor, scores: Tensor, finished: Any, step: int) -> None:
        """Raises: GenerationError, for logits that are not numbers, or where the rules leave no token."""
        # Rules may turn nan into -inf, so the logits are looked at too.
        wrong = tf.maximum(problem(scores), tf.where(problem(logits) == 1, 3, 0)).numpy()
        wrong[finished] = 0
        if wrong.any():
            row = int(wrong.nonzero()[0][0])
            raise all_banned(row, step) if int(wrong[row]) == 2 else not_numbers(row, step)


def _as_numpy(value: Any) -> Any:
    return value.numpy() if tf.is_tensor(value) else value
