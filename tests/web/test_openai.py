"""``/v1`` with the client that OpenAI publishes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from web_server import Server

from gpt2_core.hub import EMBEDDED
from gpt2_core.reference import ReferenceModel
from gpt2_core.tokenizer import GPT2Tokenizer

openai = pytest.importorskip("openai", reason="the openai client is not installed")
TOKENIZER = GPT2Tokenizer()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def complete(client: Any, prompt: Any = "Once upon a time", **settings: Any) -> Any:
    return client.completions.create(**{"model": EMBEDDED, "prompt": prompt, "max_tokens": 6, "seed": 3, **settings})


def test_models_are_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [EMBEDDED]
    assert client.models.retrieve(EMBEDDED).object == "model"
    with pytest.raises(openai.NotFoundError, match="not on this machine"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_the_librarys_text_for_the_seed(client: Any) -> None:
    found = complete(client, ["Once upon a time", "The king"], n=2, top_p=0.9)
    model = ReferenceModel.from_pretrained(EMBEDDED)
    ids = [TOKENIZER.encode(text) for text in ("Once upon a time", "The king")]
    rows = model.generate(ids, do_sample=True, top_p=0.9, seed=3, num_return_sequences=2, max_new_tokens=6)
    assert [choice.text for choice in found.choices] == [TOKENIZER.decode(row[-6:]) for row in rows]
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in found.choices} == {"length"}
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (6, 24)
    assert (found.object, found.model) == ("text_completion", EMBEDDED)


def test_streamed_pieces_are_the_same_text(client: Any) -> None:
    whole = complete(client, n=2, max_tokens=10)
    texts, reasons = ["", ""], [None, None]
    usage = None
    for chunk in complete(client, n=2, max_tokens=10, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_ids_are_a_prompt_and_several_too(client: Any) -> None:
    text = complete(client).choices[0].text
    ids = TOKENIZER.encode("Once upon a time")
    assert complete(client, ids).choices[0].text == text
    assert complete(client, [ids, ids]).choices[0].text == text


def test_stop_texts_end_a_completion(client: Any) -> None:
    whole = complete(client, max_tokens=20).choices[0].text
    stop = whole[8:12]
    for stream in (False, True):
        found = complete(client, max_tokens=20, stop=[stop, "never"], stream=stream)
        choices = [chunk.choices[0] for chunk in found] if stream else found.choices
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_log_probabilities_are_told(client: Any) -> None:
    found = complete(client, logprobs=3).choices[0]
    assert "".join(found.logprobs.tokens) == found.text
    assert found.logprobs.text_offset[0] == len("Once upon a time")
    assert all(value <= 0 for value in found.logprobs.token_logprobs)
    assert all(len(top) == 3 for top in found.logprobs.top_logprobs)
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, logprobs=3, stream=True)]
    assert [token for each in streamed for token in each.tokens] == found.logprobs.tokens


def test_temperature_0_is_the_likeliest_and_echo_gives_the_prompt(client: Any) -> None:
    first = complete(client, temperature=0, seed=None).choices[0].text
    assert complete(client, temperature=0, seed=8, echo=True).choices[0].text == f"Once upon a time{first}"
    assert complete(client, temperature=0, top_p=0.1, extra_body={"top_k": 3}).choices[0].text == first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presence_penalty": 1.0}, "presence_penalty is 1.0"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 5}, "best_of is 5"),
        ({"echo": True, "logprobs": 1}, "echo with logprobs"),
        ({"max_tokens": 600}, "more than this model's 512 positions"),
        ({"prompt": [50257]}, "token id 50257"),
        ({"prompt": "x", "n": 9}, "n: "),
        ({"temperature": -1}, "temperature"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"prompt": ["a"] * 8, "n": 8}, "more than 32 texts"),
    ],
)
def test_what_cannot_be_done_is_named(client: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        complete(client, **settings)


def test_an_unknown_model_is_not_found(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        complete(client, model="davinci-002")
    assert refused.value.code == "model_not_found"


def test_an_abandoned_stream_stops_its_work(client: Any, server: Server) -> None:
    from web_server import wait_for

    stream = complete(client, max_tokens=400, stream=True)
    next(iter(stream))
    stream.close()
    wait_for(lambda: all(model.scheduler.load == (0, 0) for model in server.pool.loaded()))
