"""Beam search: several beginnings of each text at once, and in the end the texts with the best scores.

A beam's score is the sum of its tokens' log-probabilities, as the rules left them. At each step every beam offers its
best continuations (or some that are drawn); those that end a text become candidates for the result, with their score
divided by their number of tokens to the power of ``length_penalty``, and the best of the others are the next beams.

Diverse beam search splits the beams into groups that take turns: a token that an earlier group has just chosen costs
``diversity_penalty`` each time.

Letters: R rows of the engine, K beams of a pool, k candidates of a beam.

Sources: Graves 2012, "Sequence transduction with recurrent neural networks", section 2.6 (beams); Wu et al. 2016,
section 7 (the length penalty, here as the field has it: a plain power); Vijayakumar et al. 2018, "Diverse beam search",
section 3 (groups, Hamming diversity).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gpt2_core.engine import ALL_BANNED, Candidates, Engine, Ids, Moment, Numbers, check_tokens, padded
from gpt2_core.errors import GenerationError
from gpt2_core.plan import Plan
from gpt2_core.sampling import all_banned
from gpt2_core.stopping import StopFinder
from gpt2_core.texts import END, LENGTH, STOP, TIME, Clock, Written
from gpt2_core.uniforms import BEAM_DRAW, BEAM_PICK, uniforms

if TYPE_CHECKING:
    from gpt2_core.tokenizer import GPT2Tokenizer


@dataclass(frozen=True)
class Beam:
    """A beginning that is followed: its new tokens, its score, and the engine's row that has read it."""

    row: int
    ids: tuple[int, ...] = ()
    score: float = 0.0
    log_probs: tuple[float, ...] = ()
    finder: StopFinder | None = None

    def then(self, token: int, score: float, log_prob: float) -> Beam:
        """This beam and one more token; the row is still that of what it begins with."""
        finder = None if self.finder is None else self.finder.after(token)
        return Beam(self.row, (*self.ids, token), score, (*self.log_probs, log_prob), finder)


@dataclass
class Pool:
    """The beams of one prompt, or of one group among them."""

    prompt: int
    group: int
    size: int
    live: list[Beam]
    done: list[Written] = field(default_factory=list)
    open: bool = True


class BeamSearch:
    """One call: every prompt's pools, advanced together."""

    def __init__(self, plan: Plan, tokenizer: GPT2Tokenizer | None = None) -> None:
        settings = plan.settings
        self.plan, self.settings = plan, settings
        self.clock = Clock(settings.max_time)
        self.size = settings.num_beams // settings.num_beam_groups
        # So many continuations leave a full set of beams even where all end-of-text tokens are among the best.
        self.keep = max(2, 1 + len(plan.eos_ids)) * self.size
        finder = None
        if settings.stop_strings and tokenizer is not None:
            finder = StopFinder(tokenizer, settings.stop_strings)
        self.pools = [
            Pool(prompt, group, self.size, [Beam(prompt, finder=finder)])
            for prompt in range(len(plan.ids))
            for group in range(settings.num_beam_groups)
        ]

    def run(self, engine: Engine) -> Iterator[None]:
        """All steps over an engine that has read the prompts, a row for each."""
        beams = [Beam(prompt) for prompt in range(len(self.plan.ids))]  # what each row of the engine has read
        owners = np.arange(len(self.plan.ids))  # and the prompt it belongs to
        while True:
            found = self._continuations(engine, beams, owners)
            self._grow(found)
            if self.clock.is_up():
                self._end_all()
            yield
            live = [(pool.prompt, beam) for pool in self.pools if pool.open for beam in pool.live]
            if not live:
                return
            owners = np.array([prompt for prompt, _ in live])
            beams = [beam for _, beam in live]
            self._read(engine, beams, owners)

    def _continuations(self, engine: Engine, beams: Sequence[Beam], owners: Ids) -> Candidates:
        """What each row of the engine offers."""
        moment = self._moment(beams, owners, engine.reads_history)
        if self.settings.do_sample:
            found = engine.drawn(moment, self._numbers(owners, int(moment.made[0])))
        else:
            # Tokens that earlier groups chose may fall back: enough more to make up for them.
            more = self.settings.num_beams - self.size
            found = engine.candidates(moment, self.keep + more, normalise_first=True)
        # A beam without a way on just ends; that there is none for any is noticed later.
        check_tokens(np.where(found.ids[:, 0] == ALL_BANNED, 0, found.ids[:, 0]), owners, moment.made)
        return found

    def _moment(self, beams: Sequence[Beam], owners: Ids, with_history: bool) -> Moment:
        made = np.array([len(beam.ids) for beam in beams])
        history = None
        if with_history:
            ids, real = padded([self._text(beam, prompt) for beam, prompt in zip(beams, owners, strict=True)])
            history = np.where(real, ids, -1)
        return Moment(made, self.plan.prompt_limits[owners], history)

    def _text(self, beam: Beam, prompt: int) -> Ids:
        return np.concatenate((self.plan.prompt_of(prompt), np.array(beam.ids, np.int64)))

    def _numbers(self, owners: Ids, step: int) -> Numbers:
        """The uniform numbers (R, keep) by which each row's continuations are drawn, keyed by prompt and beam."""
        seed = self.settings.seed or 0
        steps = range(step * self.keep, (step + 1) * self.keep)
        place = np.arange(len(owners)) - np.searchsorted(owners, owners)  # which beam of its prompt each row is
        return uniforms(seed, owners * self.settings.num_beams + place, steps, BEAM_DRAW)

    # -- one step -----------------------------------------------------------------------------------------------

    def _grow(self, found: Candidates) -> None:
        """Every open pool's next beams; the engine's rows are those of the beams in order, or of the prompts."""
        chosen: dict[int, Counter[int]] = {}  # by prompt: the tokens of the groups before
        for pool in self.pools:
            if not pool.open:
                continue
            others = chosen.setdefault(pool.prompt, Counter())
            made = len(pool.live[0].ids)
            pool.live, ended = self._sorted_out(pool, self._offers(pool, found, others))
            # A token counts as chosen where the text would go on with it, also if its length ends it here.
            going = [beam.ids for beam in pool.live] + [text.ids for text in ended if text.finish == LENGTH]
            others.update(ids[-1] for ids in going)
            self._settle(pool, ended)
            if not pool.live and not pool.done:
                raise all_banned(pool.prompt, made)

    def _offers(self, pool: Pool, found: Candidates, others: Counter[int]) -> list[Beam]:
        """The pool's continuations: the best ones in order, or some drawn."""
        if self.settings.do_sample:
            return self._draw(pool, found)
        offers = []
        for beam in pool.live:
            rows = (found.ids[beam.row].tolist(), found.scores[beam.row].tolist(), found.log_probs[beam.row].tolist())
            for token, score, log_prob in zip(*rows, strict=True):
                if score > -np.inf:
                    fine = self.settings.diversity_penalty * others[token] if others else 0.0
                    offers.append(beam.then(token, beam.score + (score - fine), log_prob))
        return sorted(offers, key=lambda beam: -beam.score)[: self.keep]

    def _draw(self, pool: Pool, found: Candidates) -> list[Beam]:
        """Continuations drawn without putting back, in proportion to the exponents of their scores.

        Each beam has drawn from its own; here is drawn from which beam the next one comes, by what is left of each.
        """
        assert found.masses is not None and found.totals is not None
        rows = np.array([beam.row for beam in pool.live])
        weights = np.array([beam.score for beam in pool.live]) + found.totals[rows]
        dead = found.ids[rows, 0] < 0
        weights = np.where(dead, 0.0, np.exp(weights - weights[~dead].max(initial=-np.inf)))
        made = len(pool.live[0].ids)
        steps = range(made * self.keep, (made + 1) * self.keep)
        numbers = uniforms(self.settings.seed or 0, [pool.prompt], steps, BEAM_PICK)[0]
        used = np.zeros(len(rows), np.int64)
        offers = []
        for number in numbers:
            # A beam of which all was drawn that may be looked at has had as many as can be asked for.
            left = np.where(dead, 0.0, weights * found.masses[rows, used.clip(max=self.keep - 1)])
            cumulative = np.cumsum(left)
            if cumulative[-1] <= 0:
                break
            pick = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
            beam, at = pool.live[pick], int(used[pick])
            used[pick] += 1
            token = int(found.ids[beam.row, at])
            offers.append(
                beam.then(token, beam.score + float(found.scores[beam.row, at]), float(found.log_probs[beam.row, at]))
            )
        return offers

    def _sorted_out(self, pool: Pool, offers: Sequence[Beam]) -> tuple[list[Beam], list[Written]]:
        """The next beams, the best first, and the texts that are done."""
        limit = int(self.plan.prompt_limits[pool.prompt])
        going, ended = [], []
        for rank, beam in enumerate(offers):
            why = self._end_of(beam, limit)
            if why is None:
                going.append(beam)
            elif rank < pool.size:  # what lies behind would not have been followed either
                ended.append(self._scored(beam, why))
        return sorted(going, key=lambda beam: -beam.score)[: pool.size], ended

    def _end_of(self, beam: Beam, limit: int) -> str | None:
        if beam.ids[-1] in self.plan.eos_ids:
            return END
        if beam.finder is not None and beam.finder.found:
            return STOP
        return LENGTH if len(beam.ids) >= limit else None

    def _scored(self, beam: Beam, why: str) -> Written:
        score = beam.score / len(beam.ids) ** self.settings.length_penalty
        return Written(beam.ids, why, beam.log_probs, score)

    def _settle(self, pool: Pool, ended: Sequence[Written]) -> None:
        """Keep the best texts that are done, and end the pool where no beam may better them."""
        pool.done = sorted([*pool.done, *ended], key=_by_score)[: pool.size]
        full = len(pool.done) == pool.size
        pool.open = bool(pool.live) and not (full and self._is_settled(pool))

    def _is_settled(self, pool: Pool) -> bool:
        """Whether a full pool is to end: early_stopping says how sure that must be."""
        early, penalty = self.settings.early_stopping, self.settings.length_penalty
        if early is True:
            return True
        best = pool.live[0]
        # A score grows with length where the penalty is positive: "never" reckons with the longest there can be.
        longest = int(self.plan.prompt_limits[pool.prompt]) if early == "never" and penalty > 0 else len(best.ids)
        return bool(best.score / longest**penalty <= (pool.done[-1].score or 0.0))

    def _end_all(self) -> None:
        for pool in self.pools:
            if pool.open:
                self._settle(pool, [self._scored(beam, TIME) for beam in pool.live])
                pool.open = False

    def _read(self, engine: Engine, beams: list[Beam], owners: Ids) -> None:
        """Let the engine read each beam's last token, in the row that has read what it begins with."""
        engine.take(np.array([beam.row for beam in beams]))
        if (engine.lengths >= engine.config.n_positions).any():  # only where the window slides
            texts = [self._text(beam, prompt) for beam, prompt in zip(beams, owners, strict=True)]
            engine.restart()
            engine.read(*padded([text[self.plan.window_start(len(text)) :] for text in texts]))
        else:
            engine.read(np.array([[beam.ids[-1]] for beam in beams]))
        row = 0
        for pool in self.pools:
            if pool.open:
                pool.live = [
                    Beam(row + i, beam.ids, beam.score, beam.log_probs, beam.finder) for i, beam in enumerate(pool.live)
                ]
                row += len(pool.live)

    # -- the result ---------------------------------------------------------------------------------------------

    def written(self) -> list[Written]:
        """The best texts of each prompt, the best first.

        Raises: GenerationError, where there are fewer than were asked for.
        """
        out: list[Written] = []
        wanted = self.settings.num_return_sequences
        for prompt in range(len(self.plan.ids)):
            found = [text for pool in self.pools if pool.prompt == prompt for text in pool.done]
            if len(found) < wanted:
                raise GenerationError(
                    f"beam search found {len(found)} different texts for prompt {prompt}, expected "
                    f"num_return_sequences={wanted}; ask for fewer, or relax the rules that ban tokens"
                )
            out += sorted(found, key=_by_score)[:wanted]
        return out


def _by_score(text: Written) -> float:
    return -(text.score or 0.0)
