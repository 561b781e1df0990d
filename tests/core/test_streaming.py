"""Streams: the same text in pieces, with and without an event loop, and left half-way."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from gpt2_core import GPT2Tokenizer, ReferenceModel
from gpt2_core.errors import GenerationError
from gpt2_core.generation import generate, stream
from models import ordinary_parameters, random_ids, small_config

TOKENIZER = GPT2Tokenizer()
CONFIG = small_config(vocab_size=50257, n_embd=4, n_head=1, n_layer=1, n_positions=40)
MODEL = ReferenceModel(CONFIG, ordinary_parameters(CONFIG, "lm"))
PROMPT = TOKENIZER.encode("The old man")
SAMPLED = {"do_sample": True, "seed": 3, "max_new_tokens": 20, "eos_token_id": ()}


@pytest.mark.parametrize("search", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_the_pieces_together_are_the_text(search):
    expected = generate(MODEL, [PROMPT], tokenizer=TOKENIZER, return_dict=True, **SAMPLED, **search)
    writing = stream(MODEL, [PROMPT], tokenizer=TOKENIZER, return_dict=True, **SAMPLED, **search)
    pieces = list(writing)
    assert len(pieces) > 10 and all(isinstance(piece, str) and piece for piece in pieces)
    assert "".join(pieces) == expected.texts[0]
    assert writing.output.sequences.tolist() == expected.sequences.tolist()
    assert writing.output.texts == expected.texts


def test_a_stream_says_what_is_written_so_far_and_why_it_ended():
    expected = generate(MODEL, [PROMPT], **SAMPLED)[0, len(PROMPT) :].tolist()
    writing = stream(MODEL, [PROMPT], **SAMPLED)
    for place, _ in enumerate(writing, 1):
        (text,) = writing.written
        assert list(text.ids) == expected[:place]
        assert text.finish == ("length" if place == len(expected) else "")


def test_several_texts_come_side_by_side():
    prompts = [PROMPT, PROMPT[:2]]
    expected = generate(MODEL, prompts, tokenizer=TOKENIZER, return_dict=True, **SAMPLED).texts
    pieces = list(stream(MODEL, prompts, tokenizer=TOKENIZER, **SAMPLED))
    assert all(isinstance(piece, tuple) and len(piece) == 2 for piece in pieces)
    assert tuple("".join(column) for column in zip(*pieces, strict=True)) == expected


def test_without_a_tokenizer_ids_come():
    expected = generate(MODEL, [PROMPT, PROMPT[:2]], **SAMPLED)
    columns = list(stream(MODEL, [PROMPT, PROMPT[:2]], **SAMPLED))
    assert np.stack(columns, axis=1).tolist() == expected[:, len(PROMPT) :].tolist()


def test_a_stop_string_never_shows_and_ends_the_text():
    text = generate(MODEL, [PROMPT], tokenizer=TOKENIZER, return_dict=True, **SAMPLED).texts[0]
    stop = text[12:17]
    out = generate(MODEL, [PROMPT], tokenizer=TOKENIZER, return_dict=True, stop_strings=[stop], **SAMPLED)
    assert out.texts[0] == text[: text.find(stop)]
    assert out.finish_reasons == ("stop",)
    # The ids go on to the token in which the stop string ends.
    new = out.sequences[0, len(PROMPT) :].tolist()
    assert stop in TOKENIZER.decode(new) and stop not in TOKENIZER.decode(new[:-1])
    pieces = list(stream(MODEL, [PROMPT], tokenizer=TOKENIZER, stop_strings=stop, **SAMPLED))
    assert "".join(pieces) == out.texts[0]


def test_a_stop_string_that_never_comes_leaves_the_text_to_its_limit():
    out = generate(MODEL, [PROMPT], tokenizer=TOKENIZER, return_dict=True, stop_strings="\0\0\0", **SAMPLED)
    assert out.finish_reasons == ("length",)
    assert out.sequences.shape[1] == len(PROMPT) + 20


def test_beams_stop_at_stop_strings_too():
    plain = generate(MODEL, [PROMPT], tokenizer=TOKENIZER, num_beams=3, max_new_tokens=8, return_dict=True)
    stop = plain.texts[0][4:7]
    out = generate(
        MODEL, [PROMPT], tokenizer=TOKENIZER, num_beams=3, max_new_tokens=8, stop_strings=stop, length_penalty=-5.0,
        early_stopping="never", return_dict=True, num_return_sequences=3,
    )  # fmt: skip
    for text, why in zip(out.texts, out.finish_reasons, strict=True):
        assert stop not in text
        assert why in ("stop", "length")
    assert "stop" in out.finish_reasons


def test_leaving_a_stream_stops_the_model(monkeypatch):
    count = 0
    real = ReferenceModel.__call__

    def call(model, *arguments, **named):
        nonlocal count
        count += 1
        return real(model, *arguments, **named)

    monkeypatch.setattr(ReferenceModel, "__call__", call)
    writing = stream(MODEL, [PROMPT], **SAMPLED)
    assert count == 0  # nothing runs before the first piece is asked for
    for place, _ in enumerate(writing):
        if place == 3:
            break
    assert count == 4
    with pytest.raises(GenerationError, match="the stream has not ended"):
        _ = writing.output
    writing.close()
    assert list(writing) == []
    assert count == 4
    with stream(MODEL, [PROMPT], **SAMPLED) as writing:
        next(writing)
    assert list(writing) == []


def test_an_event_loop_goes_on_between_pieces_and_the_text_is_the_same():
    expected = list(stream(MODEL, [PROMPT], tokenizer=TOKENIZER, **SAMPLED))
    threads = set()

    class Watched(GPT2Tokenizer):
        def decode_bytes(self, *arguments, **named):
            threads.add(threading.get_ident())
            return super().decode_bytes(*arguments, **named)

    async def collect(tokenizer):
        return [piece async for piece in stream(MODEL, [PROMPT], tokenizer=tokenizer, **SAMPLED)]

    async def two():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        both = await asyncio.gather(collect(Watched()), collect(TOKENIZER))
        ticking.cancel()
        return both, ticks

    both, ticks = asyncio.run(two())
    assert both == [expected, expected]
    assert ticks > 10
    assert threading.get_ident() not in threads


def test_a_task_that_is_cancelled_leaves_the_model_usable():
    async def leave():
        task = asyncio.create_task(collect())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def collect():
        async for _ in stream(MODEL, [PROMPT], tokenizer=TOKENIZER, **SAMPLED):
            pass
        await asyncio.sleep(60)

    asyncio.run(leave())
    assert "".join(stream(MODEL, [PROMPT], tokenizer=TOKENIZER, **SAMPLED))


def test_what_is_known_only_at_the_end_cannot_be_streamed():
    for search, name in (({"num_beams": 2}, "num_beams"), ({"do_sample": True, "best_of": 2}, "best_of")):
        with pytest.raises(GenerationError, match=rf"stream\(\) passes tokens on as they are made, but with {name}"):
            stream(MODEL, [PROMPT], max_new_tokens=3, **search)


class Listener:
    """What the field calls a streamer."""

    def __init__(self, fail_at=None):
        self.heard, self.ended, self.fail_at = [], 0, fail_at

    def put(self, ids):
        if len(self.heard) == self.fail_at:
            raise RuntimeError("the listener left")
        self.heard.append(np.asarray(ids).tolist())

    def end(self):
        self.ended += 1


def test_a_streamer_hears_the_prompt_each_token_and_the_end():
    listener = Listener()
    ids = random_ids(CONFIG, 2, 3)
    out = generate(MODEL, ids, streamer=listener, **SAMPLED)
    assert listener.heard[0] == ids.tolist()
    assert [list(column) for column in zip(*listener.heard[1:], strict=True)] == out[:, 3:].tolist()
    assert listener.ended == 1


def test_a_streamer_that_fails_is_told_the_end_and_the_model_goes_on_working():
    listener = Listener(fail_at=4)
    with pytest.raises(RuntimeError, match="the listener left"):
        generate(MODEL, [PROMPT], streamer=listener, **SAMPLED)
    assert listener.ended == 1
    assert generate(MODEL, [PROMPT], **SAMPLED).shape == (1, len(PROMPT) + 20)
