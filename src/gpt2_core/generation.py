"""Text from a model: what every framework's `generate` shares, and the plain loop over the reference model.

    prepare(config, input_ids, attention_mask, generation_config, settings) -> Plan      everything that can be decided
                                                                                         before the model runs
    generate(model, input_ids, attention_mask=None, *, generation_config=None, on_token=None, **settings) -> ids
    next_ids(plan, logits (R, V), made [(R,), ...], finished (R,)) -> (R,)               one step, by the numpy rules

Letters: B prompts, T their padded length, R texts (B * num_return_sequences), N steps, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpt2_core.config import GPT2Config
from gpt2_core.errors import GenerationError, InputError
from gpt2_core.inputs import VOCABULARY_REMEDY, check_ids, check_length, check_mask, check_not_empty, check_rank
from gpt2_core.sampling import DEFAULT_NEW_TOKENS, GenerationConfig, apply_rules, check_scores, choose, resolve
from gpt2_core.uniforms import fresh_seed, uniforms

if TYPE_CHECKING:
    from gpt2_core.reference import ReferenceModel

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """One call of `generate`, decided and checked before the model runs.

    settings: the resolved settings; the seed is filled in where tokens are drawn.
    ids (B, T), mask (B, T): the prompts with their padding moved to the left; mask is True for real tokens.
    start: columns before this one are padding in every row: the model runs on ``ids[:, start:]``.
    lengths (R,): real tokens of each text's prompt.
    rows (R,): which prompt each text continues; prefill B prompts, then repeat ``past`` and logits by it.
    limits (R,): how many new tokens each text may get; ``steps`` is the most of them.
    eos_ids: the tokens that end a text. pad_id: what ended texts go on with.
    uniforms (R, N): the number that draws each token, or None for the likeliest.
    """

    settings: GenerationConfig
    ids: Ids
    mask: NDArray[np.bool_]
    start: int
    lengths: Ids
    rows: Ids
    limits: Ids
    eos_ids: tuple[int, ...]
    pad_id: int
    uniforms: NDArray[np.float64] | None

    @property
    def steps(self) -> int:
        """The most new tokens any text gets."""
        return int(self.limits.max())

    def prompt(self, text: int) -> Ids:
        """The real tokens of text ``text``'s prompt, (n,)."""
        row = int(self.rows[text])
        ids: Ids = self.ids[row, self.mask[row]]
        return ids

    def ended(self, new: ArrayLike, step: int) -> NDArray[np.bool_]:
        """Which texts end with the tokens ``new`` (R,) made at step ``step`` (from 0): by end-of-text or by limit."""
        return np.isin(np.asarray(new), self.eos_ids) | (step + 1 >= self.limits)

    def positions(self, step: int, n_positions: int) -> Ids:
        """The position (R, 1) of each text's new token ``step``; those of ended texts stay within the table."""
        return np.minimum(self.lengths + step, n_positions - 1)[:, None]

    def result(self, made: Sequence[ArrayLike]) -> Ids:
        """Prompts and new tokens side by side: (R, T + steps taken)."""
        new = np.stack([np.asarray(column, np.int64) for column in made], axis=1)
        return np.concatenate((self.ids[self.rows], new), axis=1)


def prepare(
    config: GPT2Config,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    generation_config: GenerationConfig | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Check prompts and settings against the model and each other, and decide all that can be decided beforehand.

    Args:
        config: the model's.
        input_ids: (B, T) prompts, padded on either side.
        attention_mask: (B, T), 1 for real tokens; without one, every token is real.
        generation_config: settings; those in ``settings`` take their place.
        settings: as `generate`'s keyword arguments.

    Raises: GenerationError for settings, InputError for prompts that this model cannot take.
    """
    chosen = resolve(generation_config, settings or {})
    ids, mask = _prompts(config, input_ids, attention_mask)
    lengths = mask.sum(axis=1)  # (B,)
    rows = np.repeat(np.arange(len(ids)), chosen.num_return_sequences)  # (R,)
    limits = _limits(config, chosen, lengths)[rows]
    eos_ids = _eos_ids(config, chosen)
    _check_listed_ids(config, chosen)
    numbers = None
    if chosen.do_sample:
        chosen = chosen.replace(seed=fresh_seed()) if chosen.seed is None else chosen
        assert chosen.seed is not None
        numbers = uniforms(chosen.seed, range(len(rows)), range(int(limits.max())))
    return Plan(
        settings=chosen,
        ids=ids,
        mask=mask,
        start=ids.shape[1] - int(lengths.max()),
        lengths=lengths[rows],
        rows=rows,
        limits=limits,
        eos_ids=eos_ids,
        pad_id=_pad_id(config, chosen, eos_ids, limits),
        uniforms=numbers,
    )


def left_padded(ids: Ids, mask: NDArray[np.bool_]) -> tuple[Ids, NDArray[np.bool_]]:
    """Move the real tokens of each row to the right, in their order: (B, T), (B, T) -> (B, T), (B, T).

    New tokens can then follow the text directly. The model's numbers do not change, as positions follow the mask.

    >>> left_padded(np.array([[5, 6, 0]]), np.array([[True, True, False]]))[0]
    array([[0, 5, 6]])
    """
    order = np.argsort(mask, axis=1, kind="stable")  # False before True, otherwise as they were
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)


def _prompts(
    config: GPT2Config, input_ids: ArrayLike, attention_mask: ArrayLike | None
) -> tuple[Ids, NDArray[np.bool_]]:
    try:
        given = np.asarray(input_ids)
    except ValueError:
        raise InputError(
            "input_ids has rows of different lengths, expected (batch, position); "
            "pad them (tokenizer(texts, padding=True)) and pass attention_mask"
        ) from None
    check_rank("input_ids", given.shape, "(batch, position)", 2)
    check_not_empty(given.shape)
    ids = check_ids("input_ids", given, config.vocab_size, VOCABULARY_REMEDY)
    if attention_mask is None:
        mask = np.ones(ids.shape, np.bool_)
    else:
        mask = np.asarray(attention_mask) != 0
        check_mask(mask.shape, ids.shape[0], ids.shape[1], 0)
    empty = np.flatnonzero(~mask.any(axis=1))
    if len(empty):
        raise InputError(
            f"row {empty[0]} of attention_mask marks no real token, expected at least one in each row. "
            "To generate from nothing, start with the end-of-text token, bos_token_id"
        )
    check_length(config, int(mask.sum(axis=1).max()), 0)
    return left_padded(ids, mask)


def _limits(config: GPT2Config, settings: GenerationConfig, lengths: Ids) -> Ids:
    """How many new tokens each prompt gets, (B,)."""
    longest = int(lengths.max())
    if settings.max_length is not None:
        limits = settings.max_length - lengths
        if limits.min() < 1:
            raise GenerationError(
                f"max_length={settings.max_length} leaves no room after a prompt of {longest} tokens, expected at "
                f"least {longest + 1}: max_length counts the prompt; max_new_tokens leaves it out"
            )
        if settings.min_new_tokens > limits.min():
            raise GenerationError(
                f"min_new_tokens={settings.min_new_tokens} is more than the {limits.min()} new tokens that "
                f"max_length={settings.max_length} leaves after a prompt of {longest}; raise max_length"
            )
    else:
        new = DEFAULT_NEW_TOKENS if settings.max_new_tokens is None else settings.max_new_tokens
        limits = np.full_like(lengths, new)
    total = int((lengths + limits).max())
    if total > config.n_positions:
        room = config.n_positions - longest
        remedy = f"ask for at most max_new_tokens={room}" if room > 0 else "shorten the prompt"
        raise GenerationError(
            f"the text may get {total} tokens long, prompt of {longest} included, but this model has "
            f"{config.n_positions} positions; {remedy}" + (", or shorten the prompt" if room > 0 else "")
        )
    return limits


def _eos_ids(config: GPT2Config, settings: GenerationConfig) -> tuple[int, ...]:
    value = settings.eos_token_id
    if value is None:
        # The model's own may lie outside a small vocabulary, where it just never comes up.
        return tuple(token for token in config.eos_token_ids if token < config.vocab_size)
    return value if isinstance(value, tuple) else (value,)


def _pad_id(config: GPT2Config, settings: GenerationConfig, eos_ids: tuple[int, ...], limits: Ids) -> int:
    for token in (settings.pad_token_id, config.pad_token_id, *eos_ids, *config.eos_token_ids):
        if token is not None and token < config.vocab_size:
            return token
    if (limits != limits[0]).any():
        raise GenerationError(
            "the texts end at different lengths, but neither the model nor the settings name a token to fill the "
            "shorter ones with; pass pad_token_id"
        )
    return 0  # never seen: without an end-of-text token all texts end at the same step


def _check_listed_ids(config: GPT2Config, settings: GenerationConfig) -> None:
    eos = settings.eos_token_id
    listed = {
        "eos_token_id": eos if isinstance(eos, tuple) else (eos,),
        "pad_token_id": (settings.pad_token_id,),
        "suppress_tokens": settings.suppress_tokens or (),
        "bad_words_ids": tuple(token for word in settings.bad_words_ids or () for token in word),
    }
    for name, tokens in listed.items():
        for token in tokens:
            if token is not None and token >= config.vocab_size:
                raise GenerationError(
                    f"{name} names token {token}, expected ids from 0 to {config.vocab_size - 1}: {VOCABULARY_REMEDY}"
                )


def next_ids(plan: Plan, logits: ArrayLike, made: Sequence[Ids], finished: NDArray[np.bool_]) -> Ids:
    """The next token of each text, by the numpy rules: logits (R, V), earlier tokens [(R,), ...] -> (R,).

    Raises: GenerationError, where logits are not numbers or the rules ban every token.
    """
    step = len(made)
    new = np.full(len(plan.rows), plan.pad_id, np.int64)
    for text, row_logits in enumerate(np.asarray(logits, np.float64)):
        if finished[text]:
            continue
        history = np.concatenate((plan.prompt(text), [column[text] for column in made])).astype(np.int64)
        check_scores(row_logits, text, step)
        scores = apply_rules(row_logits, history, plan.settings, step, plan.eos_ids)
        check_scores(scores, text, step)
        new[text] = choose(scores, None if plan.uniforms is None else float(plan.uniforms[text, step]))
    return new


def generate(
    model: ReferenceModel,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    on_token: Callable[[Ids], Any] | None = None,
    **settings: Any,
) -> Ids:
    """Continue the prompts with the reference model: (B, T) -> (B * num_return_sequences, T + new tokens).

    Texts that ended go on with the pad token; when all have ended the loop stops. Padding comes back on the left.
    The same seed gives the same text for row i whatever the other rows hold.

    Args:
        model: a reference model with a language-model head.
        input_ids: (B, T) prompts, padded on either side.
        attention_mask: (B, T), 1 for real tokens; without one, every token is real.
        generation_config: settings; keyword arguments take their place.
        on_token: called with the new tokens (R,) of each step.
        **settings: any setting of `GenerationConfig`.

    Raises: GenerationError, InputError; both before anything is computed, but for logits that are not numbers and
    rules that ban every token.
    """
    model = model.language_model()
    plan = prepare(model.config, input_ids, attention_mask, generation_config, settings)
    rows, mask = plan.rows, plan.mask[:, plan.start :]
    out = model(plan.ids[:, plan.start :], attention_mask=mask, use_cache=True)
    past: Any = tuple((key[rows], value[rows]) for key, value in out.past)
    logits, mask = out.logits[rows, -1], mask[rows]  # (R, V), (R, S)

    finished = np.zeros(len(rows), np.bool_)
    made: list[Ids] = []
    while True:
        new = next_ids(plan, logits, made, finished)  # (R,)
        made.append(new)
        if on_token is not None:
            on_token(new.copy())
        step = len(made) - 1
        finished |= plan.ended(new, step)
        if finished.all():
            return plan.result(made)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=True)
        position_ids = plan.positions(step, model.config.n_positions)
        out = model(new[:, None], past, mask, position_ids=position_ids, use_cache=True)
        past, logits = out.past, out.logits[:, -1]
