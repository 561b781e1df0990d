"""The searches' engine over the reference model: float64 numpy, one row at a time, by the rules as they are specified.

It is written to be read, and to hold the frameworks' engines to. Letters: as in engine.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gpt2_core import sampling
from gpt2_core.engine import ALL_BANNED, NOT_NUMBERS, Candidates, Engine, Ids, Moment, Numbers, Real
from gpt2_core.inputs import check_past, check_past_shape

if TYPE_CHECKING:
    from gpt2_core.reference import ReferenceModel


class ReferenceEngine(Engine):
    """Rows of text that a reference model has read."""

    def __init__(self, model: ReferenceModel, *args: Any, **options: Any) -> None:
        self.model = model
        super().__init__(model.config, *args, **options)

    def _run(self, ids: Ids, mask: Real | None, positions: Ids | None, every: bool) -> None:
        out = self.model(
            ids, self.past, mask, position_ids=positions, use_cache=True, output_hidden_states=self.keep_hidden
        )
        self.past = out.past
        self.logits = out.logits if every else out.logits[:, -1:]
        if self.keep_hidden:
            new = out.hidden_states[-1]
            self.hidden = new if self.hidden is None else np.concatenate((self.hidden, new), axis=1)

    def _read_past(self, past: Any) -> tuple[Any, int, int]:
        layers = tuple((np.asarray(key, np.float64), np.asarray(value, np.float64)) for key, value in past)
        check_past(self.config, len(layers))
        rows, _, length, _ = layers[0][0].shape
        for layer, pair in enumerate(layers):
            for each in pair:
                wanted = (rows, self.config.heads_of(layer), length, self.config.head_dim)
                check_past_shape(layer, each.shape, wanted)
        return layers, rows, length

    def _reorder(self, rows: Ids, lead: int) -> None:
        self.past = tuple((key[rows, :, lead:], value[rows, :, lead:]) for key, value in self.past)
        self.logits = None if self.logits is None else self.logits[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows, lead:]

    def _shorten(self, width: int) -> None:
        self.past = tuple((key[:, :, :width], value[:, :, :width]) for key, value in self.past)
        self.hidden = None if self.hidden is None else self.hidden[:, :width]

    def _rules(self, scores: Numbers, moment: Moment, row: int) -> Numbers:
        history = np.zeros(0, np.int64) if moment.history is None else moment.history[row]
        return sampling.apply_rules(
            scores, history[history >= 0], self.settings, int(moment.made[row]), self.eos_ids, int(moment.limits[row]),
            self.processors,
        )  # fmt: skip

    def choose(self, moments: Sequence[Moment], uniforms: Numbers | None) -> Ids:
        """See `Engine.choose`."""
        R, t, _ = self.logits.shape
        out = np.empty((R, t), np.int64)
        for i, moment in enumerate(moments):
            scores = np.stack([self._rules(self.logits[row, i], moment, row) for row in range(R)])
            for row in range(R):
                uniform = None if uniforms is None else float(uniforms[row, i])
                out[row, i] = _problem(self.logits[row, i], scores[row]) or sampling.choose(scores[row], uniform)
            self.scores = scores
        return out

    def candidates(self, moment: Moment, k: int, *, normalise_first: bool) -> Candidates:
        """See `Engine.candidates`."""
        rows = []
        for row, logits in enumerate(self.logits[:, -1]):
            own = sampling.log_softmax(logits)
            ruled = self._rules(own if normalise_first else logits, moment, row)
            scores = ruled if normalise_first else sampling.log_softmax(ruled)
            ids = sampling.best(scores, k)
            rows.append((_marked(ids, _problem(logits, ruled)), scores[ids], own[ids]))
        return Candidates(*(np.stack(part) for part in zip(*rows, strict=True)))

    def drawn(self, moment: Moment, uniforms: Numbers) -> Candidates:
        """See `Engine.drawn`."""
        rows = []
        for row, logits in enumerate(self.logits[:, -1]):
            own = sampling.log_softmax(logits)
            scores = self._rules(own, moment, row)
            ids, masses = sampling.draw_several(sampling.softmax(scores), uniforms[row])
            total = scores.max() - sampling.log_softmax(scores).max()
            rows.append((_marked(ids, _problem(logits, scores)), scores[ids], own[ids], masses, total))
        return Candidates(*(np.stack(part) for part in zip(*rows, strict=True)))

    def draft(self, moment: Moment, uniforms: Numbers) -> Ids:
        """See `Engine.draft`."""
        R = len(self.logits)
        scores = np.stack([self._rules(self.logits[row, -1], moment, row) for row in range(R)])
        self.drafted.append(np.stack([sampling.softmax(row) for row in scores]))
        tokens = [
            _problem(self.logits[row, -1], scores[row]) or sampling.draw(self.drafted[-1][row], float(uniforms[row]))
            for row in range(R)
        ]
        return np.array(tokens, np.int64)

    def verify(
        self, moments: Sequence[Moment], by: Engine, drafted: Ids, accept: Numbers, redraws: Numbers, draws: Numbers
    ) -> tuple[Ids, Ids]:
        """See `Engine.verify`."""
        R = len(drafted)
        counts, tokens = np.zeros(R, np.int64), np.zeros(R, np.int64)
        for row in range(R):
            there = int((drafted[row] >= 0).sum())
            scores = [self._rules(self.logits[row, i], moment, row) for i, moment in enumerate(moments[: there + 1])]
            p = [sampling.softmax(each) for each in scores]
            q = [each[row] for each in by.drafted]
            counts[row], tokens[row] = sampling.verify(
                p, q, drafted[row, :there], accept[row], redraws[row], float(draws[row, there])
            )
            tokens[row] = _problem(self.logits[row, counts[row]], scores[counts[row]]) or tokens[row]
        return counts, tokens

    def log_probs(self, tokens: Ids) -> Numbers:
        """See `Engine.log_probs`."""
        return np.array(
            [
                [float(sampling.log_softmax(logits)[token]) for logits, token in zip(row, ids, strict=True)]
                for row, ids in zip(self.logits, tokens, strict=True)
            ]
        )

    def likeness(self) -> Numbers:
        """See `Engine.likeness`."""
        unit = self.hidden / np.linalg.norm(self.hidden, axis=-1, keepdims=True)  # (R, S, C)
        cosines = (unit[:, :-1] @ unit[:, -1, :, None])[:, :, 0]  # (R, S - 1)
        out: Numbers = np.where(self.real[:, :-1], cosines, -np.inf).max(axis=1)
        return out

    def tensor(self, array: Any) -> Any:
        """See `Engine.tensor`."""
        return array


def _problem(logits: Numbers, scores: Numbers) -> int:
    """The mark of a row in which nothing can be chosen; 0 where all is well."""
    for each in (logits, scores):  # rules may turn nan into -inf, so the logits are looked at too
        if np.isnan(each).any() or np.isposinf(each).any():
            return NOT_NUMBERS
    return ALL_BANNED if np.isneginf(scores).all() else 0


def _marked(ids: Ids, problem: int) -> Ids:
    return np.concatenate(([problem], ids[1:])) if problem else ids
