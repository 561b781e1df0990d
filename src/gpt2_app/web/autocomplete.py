"""``POST /api/autocomplete``: up to three continuations of a text, as they are written, and ranked when they are done.

The events of the stream, each with JSON:

    start   {model, framework, seed, context_tokens, context_start, length, max_time}
    tokens  {tokens: [{sample, text, log_probability, choices: [{text, log_probability}], finish}]}
    done    {continuations: [{sample, text, log_probability, mean_log_probability, finish, tokens}], seconds}
    error   {message}

Log-probabilities are those of the model itself, before temperature, top-k and top-p. Continuations are ranked by their
mean log-probability. A context that ends in spaces is continued with words that begin after a space.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gpt2_app.web.models import LoadedModel, Pool
from gpt2_app.web.picking import Rules
from gpt2_app.web.scheduler import Ask, Step, Token
from gpt2_app.web.schemas import Autocomplete, Count, Counted, ErrorBody
from gpt2_app.web.serving import EventStream, Jobs, event, hold, tail
from gpt2_app.writing import drawn_seed
from gpt2_core.errors import Gpt2Error, InputError
from gpt2_core.texts import TIME

router = APIRouter(prefix="/api", tags=["writing"])

_CHOICES = 5
_REFUSALS: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorBody}, 422: {"model": ErrorBody}, 429: {"model": ErrorBody}, 503: {"model": ErrorBody}
}  # fmt: skip


@dataclass
class _Continuation:
    """One sample as it grows."""

    sample: int
    skip: bool  # the space that the context has already
    tokens: list[dict[str, Any]] = field(default_factory=list)
    finish: str = TIME
    count: int = 0
    log_prob: float = 0.0

    def add(self, token: Token, model: LoadedModel) -> dict[str, Any]:
        text = token.text
        if self.skip and text:
            text, self.skip = text.removeprefix(" "), False
        self.count += 1
        self.log_prob += token.pick.log_prob
        self.finish = token.finish or self.finish
        spelt = {
            "text": text,
            "log_probability": round(token.pick.log_prob, 5),
            "choices": [
                {"text": model.spelling(index), "log_probability": round(log_prob, 5)}
                for index, log_prob in token.pick.choices
            ],
        }
        self.tokens.append(spelt)
        return {"sample": self.sample, **spelt, "finish": token.finish}

    @property
    def mean(self) -> float:
        return self.log_prob / self.count if self.count else 0.0

    def result(self) -> dict[str, Any]:
        return {
            "sample": self.sample,
            "text": "".join(token["text"] for token in self.tokens),
            "log_probability": round(self.log_prob, 5),
            "mean_log_probability": round(self.mean, 5),
            "finish": self.finish,
            "tokens": self.tokens,
        }


@router.post(
    "/autocomplete",
    response_class=Response,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **_REFUSALS},
)
async def autocomplete(body: Autocomplete, request: Request) -> Response:
    """Continue a text: server-sent events ``start``, ``tokens``, ``done`` and ``error``."""
    arrived = time.monotonic()
    pool: Pool = request.app.state.pool
    jobs = Jobs()
    model = await hold(pool, body.model, body.framework)
    try:
        ask, head = await asyncio.to_thread(_ask, model, body, arrived)
        jobs.submit(model, [ask])
    finally:
        pool.release(model)
    return EventStream(_stream(request, model, ask, head, jobs, arrived), jobs)


def _ask(model: LoadedModel, body: Autocomplete, arrived: float) -> tuple[Ask, dict[str, Any]]:
    """The request, and what its stream begins with."""
    config, window = model.config, model.config.n_positions
    length = min(body.length, window // 2)  # at least half of the window is for reading
    text = body.context.rstrip(" ")
    begins_word = text != body.context
    ids = tail(model.tokenizer, text, window - length)
    start = max(0, len(text) - len(model.tokenizer.decode(ids))) if len(ids) == window - length else 0
    if not ids:
        first = next(
            (t for t in (config.bos_token_id, *config.eos_token_ids) if t is not None and t < config.vocab_size), None
        )
        if first is None:
            raise InputError("the text is empty, and this model has no token to begin one with; write a few words")
        ids = [first]
    seed = drawn_seed() if body.seed is None else body.seed
    rules = Rules(body.temperature, body.top_k, body.top_p)
    ask = Ask(
        tuple(ids), rules, seed, length, arrived + body.max_time,
        samples=1 if rules.is_greedy else body.n_samples, choices=_CHOICES, begins_word=begins_word,
    )  # fmt: skip
    head = {
        "model": model.entry.name,
        "framework": model.framework,
        "seed": seed,
        "context_tokens": len(ids),
        "context_start": start,
        "length": length,
        "max_time": body.max_time,
    }
    return ask, head


async def _stream(
    request: Request, model: LoadedModel, ask: Ask, head: dict[str, Any], jobs: Jobs, arrived: float
) -> AsyncIterator[str]:
    yield event("start", head)
    texts = [_Continuation(sample, ask.begins_word) for sample in range(ask.samples)]
    is_first = True
    try:
        async for _, what in jobs.events():
            if isinstance(what, Step):
                if is_first:
                    request.app.state.metrics.observe("gpt2_first_token_seconds", time.monotonic() - arrived)
                    is_first = False
                yield event("tokens", {"tokens": [texts[token.sample].add(token, model) for token in what.tokens]})
    except Gpt2Error as error:
        yield event("error", {"message": str(error)})
        return
    except Exception:  # whatever a framework raises; the scheduler has logged it
        yield event("error", {"message": "the model failed; the server's log says why"})
        return
    ranked = sorted((text for text in texts if text.tokens), key=lambda text: -text.mean)
    seconds = round(time.monotonic() - arrived, 4)
    yield event("done", {"continuations": [text.result() for text in ranked], "seconds": seconds})


@router.post("/count", responses={404: {"model": ErrorBody}, 422: {"model": ErrorBody}})
def count(body: Count, request: Request) -> Counted:
    """How many tokens a text has, and from where on the model reads it."""
    pool: Pool = request.app.state.pool
    entry, _ = pool.check(body.model, None)
    tokenizer = pool.tokenizer(entry.name)
    ids = tokenizer.encode_array(body.text, special="text")
    window = entry.config.n_positions
    most = window - min(body.length, window // 2)
    start = max(0, len(body.text) - len(tokenizer.decode(ids[-most:]))) if len(ids) > most else 0
    return Counted(tokens=len(ids), window=window, start=len(body.text[:start].encode("utf-16-le")) // 2)
