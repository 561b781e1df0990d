"""Text from a model. What can be decided before the model runs is decided in `gpt2_core.generation`.

Letters: B prompts, T their padded length, R texts (B * num_return_sequences), S all positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt2_core.generation import Plan, prepare
from gpt2_core.sampling import GenerationConfig, all_banned, not_numbers
from gpt2_pt.sampling import apply_rules, choose, problem


class GenerationMixin:
    """``generate`` for models with a transformer and a language-model head."""

    config: Any
    transformer: Any
    lm_head: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | list[list[int]],
        attention_mask: Tensor | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        on_token: Callable[[Tensor], Any] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Continue the prompts: (B, T) -> (B * num_return_sequences, T + new tokens).

        Texts that ended go on with the pad token; when all have ended it stops. Padding comes back on the left.
        The same seed gives the same text for row i whatever the other rows hold, and in every framework.
        Dropout is off meanwhile, also for a model in training mode.

        Args:
            input_ids: (B, T) prompts, padded on either side.
            attention_mask: (B, T), 1 for real tokens; without one, every token is real.
            generation_config: settings; keyword arguments take their place.
            on_token: called with the new tokens (R,) of each step.
            **settings: any setting of `GenerationConfig`: max_new_tokens, do_sample, temperature, top_k, top_p, seed...

        Raises: GenerationError, InputError; both before anything is computed, but for logits that are not numbers and
        rules that ban every token.
        """
        plan = prepare(
            self.config,
            input_ids.cpu().numpy() if isinstance(input_ids, Tensor) else input_ids,
            attention_mask.cpu().numpy() if isinstance(attention_mask, Tensor) else attention_mask,
            generation_config,
            settings,
        )
        # Each module's own mode is put back: a part may be frozen in evaluation mode while the rest trains.
        training = [module for module in self.transformer.modules() if module.training]
        self.transformer.eval()
        try:
            made = self._continue(plan, on_token)
        finally:
            for module in training:
                module.training = True
        return torch.from_numpy(plan.result([column.cpu().numpy() for column in made])).to(self._device)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.transformer.wte.weight.device
        return device

    def _next_logits(
        self, ids: Tensor, past: Any, mask: Tensor | None, position_ids: Tensor | None
    ) -> tuple[Tensor, Any]:
        """One pass of the one forward: the logits (rows, V) after the last token, and the new past."""
        out = self.transformer(ids, past, mask, position_ids=position_ids, use_cache=True)
        return self.lm_head(out.last_hidden_state[:, -1]), out.past

    def _continue(self, plan: Plan, on_token: Callable[[Tensor], Any] | None) -> list[Tensor]:
        """The loop: prefill the prompts once, then a token a step. Returns the new tokens, a column (R,) a step."""
        device = self._device

        def put(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device)

        ids, mask = put(plan.ids[:, plan.start :]), put(plan.mask[:, plan.start :])
        padded = not bool(plan.mask[:, plan.start :].all())
        logits, past = self._next_logits(ids, None, mask if padded else None, None)
        if len(plan.rows) > len(ids):
            rows = put(plan.rows)
            logits, past, ids, mask = logits[rows], past.reorder(rows), ids[rows], mask[rows]
        history = ids.masked_fill(~mask, -1)  # (R, n)
        uniforms = None if plan.uniforms is None else put(plan.uniforms)
        eos_ids = torch.tensor(plan.eos_ids, dtype=torch.int64, device=device)
        limits = put(plan.limits)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=device)

        made: list[Tensor] = []
        while True:
            step = len(made)
            scores = apply_rules(logits, history, plan.settings, step, plan.eos_ids)
            self._check(logits, scores, finished, step)
            new = choose(scores, None if uniforms is None else uniforms[:, step])
            new = new.masked_fill(finished, plan.pad_id)  # (R,)
            made.append(new)
            if on_token is not None:
                on_token(new.clone())
            finished = finished | torch.isin(new, eos_ids) | (step + 1 >= limits)
            if finished.all():
                return made
            history = torch.cat((history, new.unsqueeze(1)), dim=1)
            position_ids = None
            if padded:
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)  # (R, S)
                position_ids = put(plan.positions(step, self.config.n_positions))
            logits, past = self._next_logits(new.unsqueeze(1), past, mask if padded else None, position_ids)

    @staticmethod
    def _check(logits: Tensor, scores: Tensor, finished: Tensor, step: int) -> None:
        """Raises: GenerationError, for logits that are not numbers, or where the rules leave no token."""
        # Rules may turn nan into -inf, so the logits are looked at too.
        wrong = torch.maximum(problem(scores), torch.where(problem(logits) == 1, 3, 0)).masked_fill(finished, 0)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise all_banned(row, step) if int(wrong[row]) == 2 else not_numbers(row, step)
