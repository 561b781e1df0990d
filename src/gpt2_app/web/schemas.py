"""What the HTTP interface takes and gives, with the limits of every field."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from gpt2_core.uniforms import SEED_LIMIT

LONGEST_TEXT = 1_000_000  # characters of a document, or of a context
LONGEST_TITLE = 200
MOST_SAMPLES = 3
MOST_NEW = 512  # tokens of one suggestion
MOST_SECONDS = 60.0
MOST_PROMPTS = 16
MOST_TEXTS = 32  # of one completion: prompts times n
MOST_MARKS = 10_000
MOST_TOP_K = 1000


def _plain(text: str) -> str:
    """NUL ends texts elsewhere. (Half a surrogate pair, which is no character, is refused before this is asked.)"""
    if "\x00" in text:
        raise ValueError("holds a NUL character; leave it out")
    return text


Plain = AfterValidator(_plain)
Text = Annotated[str, Field(max_length=LONGEST_TEXT), Plain]
Title = Annotated[str, Field(max_length=LONGEST_TITLE), Plain]
Name = Annotated[str, Field(max_length=200), Plain]
Seed = Annotated[int, Field(ge=0, lt=SEED_LIMIT)]
Temperature = Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=0, le=MOST_TOP_K)]
Framework = Literal["pt", "tf", "numpy"]


class Strict(BaseModel):
    """No field that is not known, and no text for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


# -- autocomplete --------------------------------------------------------------------------------------------


class Autocomplete(Strict):
    """A text, and how it is to be continued. max_time is in seconds; temperature 0 takes the likeliest tokens."""

    context: Text = Field(description="The text before the caret; the model reads the end of it.")
    n_samples: int = Field(MOST_SAMPLES, ge=1, le=MOST_SAMPLES)
    length: int = Field(20, ge=1, le=MOST_NEW, description="The most new tokens of each continuation.")
    max_time: float = Field(10.0, gt=0, le=MOST_SECONDS, allow_inf_nan=False)
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    top_k: TopK = 40
    model: Name | None = None
    framework: Framework | None = None
    seed: Seed | None = Field(None, description="The same seed gives the same continuations; without one it is drawn.")


class Count(Strict):
    """A text to be counted."""

    text: Text
    model: Name | None = None
    length: int = Field(20, ge=1, le=MOST_NEW, description="How many new tokens there should be room for.")


class Counted(BaseModel):
    """tokens of the text; the model's window; where the model begins to read, in UTF-16 units as browsers count."""

    tokens: int
    window: int
    start: int


# -- documents -----------------------------------------------------------------------------------------------

Place = Annotated[int, Field(ge=0, le=LONGEST_TEXT)]
LogProb = Annotated[float, Field(le=0, ge=-1e6, allow_inf_nan=False)]


class Choice(Strict):
    """A token that might have come: its text, and its log-probability."""

    text: Annotated[str, Field(max_length=500), Plain]
    log_probability: LogProb


class Mark(Strict):
    """Characters from ``start`` to ``end`` that a model wrote, and how likely they were, where that is known."""

    start: Place
    end: Place
    log_probability: LogProb | None = None
    choices: Annotated[list[Choice], Field(max_length=10)] = Field(default_factory=list)


Marks = Annotated[list[Mark], Field(max_length=MOST_MARKS)]


class Settings(Strict):
    """What a document is written with."""

    model: Name | None = None
    framework: Framework | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    length: Annotated[int, Field(ge=1, le=MOST_NEW)] | None = None
    max_time: Annotated[float, Field(gt=0, le=MOST_SECONDS, allow_inf_nan=False)] | None = None
    seed: Seed | None = None


class Draft(Strict):
    """A document as it is written."""

    title: Title = ""
    text: Text = ""
    marks: Marks = Field(default_factory=list)
    settings: Settings = Settings()


class Save(Draft):
    """A document that takes the place of version ``base``; any other version is a conflict."""

    base: int = Field(ge=1, lt=1 << 53)


class Restore(Strict):
    """Which version is to come back, and in the place of which."""

    version: int = Field(ge=1, lt=1 << 53)
    base: int = Field(ge=1, lt=1 << 53)


class Brief(BaseModel):
    """A document in a list; times are seconds since 1970."""

    id: str
    title: str
    opening: str
    words: int
    version: int
    updated: float


class Document(BaseModel):
    """A document."""

    id: str
    title: str
    text: str
    marks: list[Any]
    settings: dict[str, Any]
    version: int
    created: float
    updated: float


class Version(BaseModel):
    """An older state of a document."""

    version: int
    saved: float
    title: str
    words: int
    opening: str


# -- completions, as OpenAI's clients ask for them --------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 16)]
Stop = Annotated[str, Field(min_length=1, max_length=200), Plain]


class StreamOptions(BaseModel):
    """include_usage: a last chunk says how many tokens there were."""

    include_usage: bool = False


class Completion(BaseModel):
    """A request of ``/v1/completions``; what GPT-2 does not have is refused rather than ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Name
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS)]
    ) = ""
    max_tokens: int | None = Field(16, ge=1, le=4096)
    temperature: Temperature | None = 1.0
    top_p: TopP | None = 1.0
    n: int | None = Field(1, ge=1, le=8)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = False
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    best_of: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, float] | None = None
    suffix: str | None = None
    user: str | None = None
    # Ours: OpenAI's clients pass them on in extra_body.
    top_k: TopK = 0
    framework: Framework | None = None
    max_time: float = Field(MOST_SECONDS, gt=0, le=MOST_SECONDS, allow_inf_nan=False)


class Problem(BaseModel):
    """What went wrong, in the words of OpenAI's interface."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error."""

    error: Problem
