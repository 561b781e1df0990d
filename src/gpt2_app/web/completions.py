"""``/v1/completions`` and ``/v1/models`` as OpenAI's clients know them.

Source: platform.openai.com/docs/api-reference/completions. What GPT-2 has no counterpart for is refused by name, so
that nobody takes it for done.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from gpt2_app.web.models import Entry, LoadedModel, Pool
from gpt2_app.web.picking import Rules
from gpt2_app.web.scheduler import Ask, Event, Step, Token
from gpt2_app.web.schemas import MOST_TEXTS, Completion, ErrorBody
from gpt2_app.web.serving import EventStream, Jobs, event, hold, unless_gone
from gpt2_app.writing import drawn_seed
from gpt2_core.errors import Gpt2Error, InputError
from gpt2_core.stopping import spell
from gpt2_core.texts import LENGTH, TIME
from gpt2_core.uniforms import SEED_LIMIT

router = APIRouter(prefix="/v1", tags=["OpenAI"])

_REFUSALS: dict[int | str, dict[str, Any]] = {code: {"model": ErrorBody} for code in (400, 404, 429, 503)}


class Unsupported(InputError):
    """A setting that is not had here; ``param`` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass
class _Text:
    """One choice of the answer as it grows."""

    index: int
    prompt: str
    text: str = ""
    finish: str | None = None
    tokens: list[str] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top: list[dict[str, float]] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, token: Token, model: LoadedModel) -> None:
        self.offsets.append(len(self.prompt) + len(self.text))
        self.text += token.text
        self.tokens.append(_spelling(model, token.pick.token))
        self.log_probs.append(token.pick.log_prob)
        self.top.append({_spelling(model, index): log_prob for index, log_prob in token.pick.choices})
        if token.finish is not None:
            self.finish = _finish(token.finish)

    def choice(self, text: str, start: int, finish: str | None, with_log_probs: bool) -> dict[str, Any]:
        """What clients get, of the tokens from ``start`` on."""
        log_probs = None
        if with_log_probs:
            log_probs = {
                "tokens": self.tokens[start:],
                "token_logprobs": self.log_probs[start:],
                "top_logprobs": self.top[start:],
                "text_offset": self.offsets[start:],
            }
        return {"text": text, "index": self.index, "logprobs": log_probs, "finish_reason": finish}


def _finish(why: str) -> str:
    return "length" if why in (LENGTH, TIME) else "stop"


def _spelling(model: LoadedModel, index: int) -> str:
    """As OpenAI spells a token that is no text of its own: its bytes."""
    if index in model.tokenizer.all_special_ids:
        return str(model.tokenizer.convert_ids_to_tokens(index))
    raw = spell(model.tokenizer, index)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


# -- what was asked for ----------------------------------------------------------------------------------------


def _check(body: Completion) -> None:
    for name in ("presence_penalty", "frequency_penalty", "logit_bias", "suffix"):
        if getattr(body, name):
            raise Unsupported(name, f"{name} is {getattr(body, name)!r}, which GPT-2 here does not have; leave it out")
    if body.best_of not in (None, 1, body.n):
        raise Unsupported("best_of", f"best_of is {body.best_of}, expected n ({body.n}) or nothing; leave it out")
    if body.echo and body.logprobs is not None:
        raise Unsupported(
            "echo", "echo with logprobs would take those of the prompt, which are not kept; leave one out"
        )


def _prompts(body: Completion) -> list[str | list[int]]:
    prompt: Any = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt)


def _asks(model: LoadedModel, body: Completion, arrived: float) -> tuple[list[Ask], list[str]]:
    """A request for each prompt, and the prompts' texts."""
    _check(body)
    prompts, n = _prompts(body), body.n or 1
    if len(prompts) * n > MOST_TEXTS:
        raise Unsupported("n", f"{len(prompts)} prompts with n={n} are more than {MOST_TEXTS} texts; ask for fewer")
    rules = Rules(1.0 if body.temperature is None else body.temperature, body.top_k, body.top_p or 1.0)
    seed = drawn_seed() if body.seed is None else body.seed % SEED_LIMIT
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    asks, texts = [], []
    for number, prompt in enumerate(prompts):
        ids = _ids(model, prompt)
        texts.append(prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt))
        asks.append(
            Ask(
                tuple(ids), rules, seed, _length(model, len(ids), body.max_tokens), arrived + body.max_time,
                samples=n, first_row=number * n, stops=stops, choices=body.logprobs or 0,
            )
        )  # fmt: skip
    return asks, texts


def _ids(model: LoadedModel, prompt: str | list[int]) -> list[int]:
    config = model.config
    ids = list(model.tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt
    if not ids:
        ids = [next((t for t in (config.bos_token_id, *config.eos_token_ids) if t is not None), 0)]
    most = min(config.vocab_size, len(model.tokenizer))
    if max(ids) >= most:
        raise InputError(
            f"the prompt holds the token id {max(ids)}, expected ids below {most}, this model's vocabulary"
        )
    return ids


def _length(model: LoadedModel, prompt: int, wanted: int | None) -> int:
    """How many tokens a text gets. Raises: InputError, where they do not fit."""
    window = model.config.n_positions
    length = 16 if wanted is None else wanted
    if prompt + length > window:
        raise InputError(
            f"the prompt of {prompt} tokens and max_tokens={length} are {prompt + length} together, more than this "
            f"model's {window} positions; shorten the prompt or ask for fewer"
        )
    return length


# -- the answers -------------------------------------------------------------------------------------------------


@router.post(
    "/completions",
    response_class=Response,
    responses={
        200: {
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "text/event-stream": {"schema": {"type": "string"}},
            }
        },
        **_REFUSALS,
    },
)
async def completions(body: Completion, request: Request) -> Response:
    """Continue prompts, as OpenAI's completions do; ``top_k``, ``framework`` and ``max_time`` (seconds) are ours."""
    arrived = time.monotonic()
    pool: Pool = request.app.state.pool
    jobs = Jobs()
    model = await hold(pool, body.model, body.framework)
    try:
        asks, prompts = await asyncio.to_thread(_asks, model, body, arrived)
        jobs.submit(model, asks)
    finally:
        pool.release(model)
    n = body.n or 1
    texts = [_Text(i, prompts[i // n]) for i in range(len(prompts) * n)]
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.entry.name,
        "system_fingerprint": f"{model.framework}-{asks[0].seed}",
    }
    if body.stream:
        return EventStream(_stream(body, model, asks, texts, head, jobs), jobs)
    await unless_gone(request, _collect(model, asks, texts, jobs), jobs)
    choices = [
        text.choice(
            (text.prompt if body.echo else "") + text.text, 0, text.finish or "length", body.logprobs is not None
        )
        for text in texts
    ]
    return JSONResponse({**head, "choices": choices, "usage": _usage(asks, texts)})


async def _collect(model: LoadedModel, asks: list[Ask], texts: list[_Text], jobs: Jobs) -> None:
    async for number, what in jobs.events():
        _added(model, asks, texts, number, what)


def _added(model: LoadedModel, asks: list[Ask], texts: list[_Text], number: int, what: Event) -> list[_Text]:
    """Add an event's tokens to their texts; which they are."""
    if not isinstance(what, Step):
        return []
    changed = []
    for token in what.tokens:
        text = texts[asks[number].first_row + token.sample]
        text.add(token, model)
        changed.append(text)
    return changed


async def _stream(
    body: Completion, model: LoadedModel, asks: list[Ask], texts: list[_Text], head: dict[str, Any], jobs: Jobs
) -> AsyncIterator[str]:
    with_log_probs = body.logprobs is not None
    try:
        if body.echo:
            for text in texts:
                yield event(None, {**head, "choices": [text.choice(text.prompt, 0, None, False)]})
        async for number, what in jobs.events():
            before = [len(text.text) for text in texts]
            for text in _added(model, asks, texts, number, what):
                piece, start = text.text[before[text.index] :], len(text.tokens) - 1
                if piece or text.finish or with_log_probs:
                    yield event(None, {**head, "choices": [text.choice(piece, start, text.finish, with_log_probs)]})
    except Gpt2Error as error:
        yield event(None, {"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})
        return
    for text in texts:
        if text.finish is None:  # time was up before its next token
            yield event(None, {**head, "choices": [text.choice("", len(text.tokens), "length", with_log_probs)]})
    if body.stream_options is not None and body.stream_options.include_usage:
        yield event(None, {**head, "choices": [], "usage": _usage(asks, texts)})
    yield "data: [DONE]\n\n"


def _usage(asks: list[Ask], texts: list[_Text]) -> dict[str, int]:
    read, made = sum(len(ask.ids) for ask in asks), sum(len(text.tokens) for text in texts)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


# -- models ------------------------------------------------------------------------------------------------------


def _model(entry: Entry) -> dict[str, Any]:
    return {"id": entry.name, "object": "model", "created": 0, "owned_by": "gpt2-duet"}


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that can be asked for."""
    pool: Pool = request.app.state.pool
    return {"object": "list", "data": [_model(entry) for entry in pool.catalogue.values()]}


@router.get("/models/{name:path}", responses={404: {"model": ErrorBody}})
async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    pool: Pool = request.app.state.pool
    return _model(pool.catalogue[name])
