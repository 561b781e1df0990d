"""`gpt2 generate`: text to the terminal as it is written, or a JSON object for each text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gpt2_app import backends, generate_settings, generate_view, terminal, writing
from gpt2_app.generate_settings import CANDIDATES, FILL, LENGTH, NAMES, TEMPERATURE, TOP_K
from gpt2_app.sources import check_argument
from gpt2_app.vocabularies import DEFAULT_MODEL, load_tokenizer

if TYPE_CHECKING:
    from gpt2_core.sampling import GenerationConfig

__all__ = ["OPTIONS", "TEMPERATURE", "TOP_K", "command"]

# How what the library's messages name is typed here; sentences come first, as they hold names.
OPTIONS = {
    "pass sliding_window=True": ("use --sliding-window half",),
    "pass its id as eos_token_id=": ("use --eos ",),
    "pass do_sample=True or num_beams": ("leave out --greedy, or pass --beams",),
    "pass do_sample=True": ("leave out --greedy",),
    "leave out do_sample": ("use --greedy",),
    'use "gpt2"': ("use --tokenizer gpt2",),
    **NAMES,
    "do_sample": ("--sample",),
    "assistant_model": ("--assistant",),
    "dtype": ("--dtype",),
    "compile": ("--compile",),
    "device": ("--device",),
    "framework": ("--framework",),
}
_TOKENS, _SEARCH, _END = "Which token", "Which text", "Where it ends"
_FAST, _SHOWN = "How it is computed", "What is shown"


def command(
    prompt: Annotated[
        str | None, typer.Argument(help="How the text begins; without it, --file or standard input.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from a file.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE", help="Read several prompts: one a line; of a .jsonl strings, or {prompt: ...}."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", metavar="NAME|FOLDER|FILE", help="gpt2-tales ships with the package.")
    ] = DEFAULT_MODEL,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME|FOLDER", help="Whose vocabulary, where the model's folder has none."),
    ] = None,
    settings_file: Annotated[
        Path | None,
        typer.Option(
            "--settings", metavar="FILE", help="Start from a generation_config.json; options take the place of its own."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            "--max-new-tokens",
            "-n",
            help=f"How many tokens to add; {FILL} fills the model's window. Default: {LENGTH}, or what fits.",
            rich_help_panel=_END,
        ),
    ] = None,
    min_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="No end of text before so many new tokens.", rich_help_panel=_END),
    ] = None,
    max_time: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="End after so long, with what there is.", rich_help_panel=_END),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text; may be given again.", rich_help_panel=_END),
    ] = None,
    eos: Annotated[
        list[int] | None,
        typer.Option(
            "--eos",
            metavar="ID",
            help="End with this token, in place of the model's own; may be given again.",
            rich_help_panel=_END,
        ),
    ] = None,
    sliding_window: Annotated[
        str | None,
        typer.Option(
            metavar="half|N",
            help="Go on beyond the model's window, reading at least this many of the last tokens.",
            rich_help_panel=_END,
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest token every time.", rich_help_panel=_TOKENS)
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            "-t",
            help=f"Lower is safer, higher is wilder. Default: {TEMPERATURE}.",
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help=f"Draw from the K likeliest tokens; 0 from all. Default: {TOP_K}.",
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Draw from the likeliest tokens that together have this share.", rich_help_panel=_TOKENS
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Leave out tokens less likely than this share of the likeliest.", rich_help_panel=_TOKENS
        ),
    ] = None,
    typical_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Draw from the most typical tokens that have this share.", rich_help_panel=_TOKENS
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Above 1: tokens that came up already are made less likely.", rich_help_panel=_TOKENS
        ),
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None,
        typer.Option(metavar="N", help="No N tokens in a row come up twice.", rich_help_panel=_TOKENS),
    ] = None,
    bad_words: Annotated[
        list[str] | None,
        typer.Option("--bad-words", metavar="TEXT", help="Not this text; may be given again.", rich_help_panel=_TOKENS),
    ] = None,
    suppress: Annotated[
        list[int] | None,
        typer.Option("--suppress", metavar="ID", help="Not this token; may be given again.", rich_help_panel=_TOKENS),
    ] = None,
    begin_suppress: Annotated[
        list[int] | None,
        typer.Option(
            "--begin-suppress", metavar="ID", help="Not this token as the first one.", rich_help_panel=_TOKENS
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            "-s",
            help="The same seed gives the same text. Default: a fresh one, shown.",
            rich_help_panel=_TOKENS,
        ),
    ] = None,
    beams: Annotated[
        int | None,
        typer.Option(
            "--beams", "--num-beams", metavar="N", help="Follow so many beginnings at once.", rich_help_panel=_SEARCH
        ),
    ] = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw, also with --beams.", rich_help_panel=_SEARCH)] = False,
    beam_groups: Annotated[
        int | None,
        typer.Option(
            "--beam-groups",
            "--num-beam-groups",
            metavar="N",
            help="Groups of beams that keep apart.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    diversity_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="What a token costs that an earlier group chose.", rich_help_panel=_SEARCH),
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Above 1 longer texts rank higher, below 1 shorter.", rich_help_panel=_SEARCH),
    ] = None,
    early_stopping: Annotated[
        str | None,
        typer.Option(
            metavar="yes|no|never",
            help="Whether beams end with the first texts that are done.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    penalty_alpha: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help=f"Contrastive search: how much likeness to the text counts, among --top-k ({CANDIDATES}) candidates.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    best_of: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draw so many texts and keep the likeliest.", rich_help_panel=_SEARCH),
    ] = None,
    num_return_sequences: Annotated[
        int | None,
        typer.Option(metavar="N", help="So many texts of each prompt, written at once.", rich_help_panel=_SEARCH),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(
            "--samples",
            "-N",
            min=1,
            help="So many texts, one after the other; each has the next seed.",
            rich_help_panel=_SEARCH,
        ),
    ] = 1,
    framework: Annotated[
        str | None,
        typer.Option(
            "--framework",
            "-F",
            metavar=backends.CHOICES,
            help="Default: the first that is installed.",
            rich_help_panel=_FAST,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cpu, cuda, ... Default: a GPU if there is one.", rich_help_panel=_FAST),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Number format: float32, bfloat16, int8, ... or auto, the file's own.",
            rich_help_panel=_FAST,
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model's step first.", rich_help_panel=_FAST)
    ] = False,
    assistant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FOLDER|FILE",
            help="A smaller model with this vocabulary, which drafts.",
            rich_help_panel=_FAST,
        ),
    ] = None,
    assistant_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="How many tokens it drafts at a time.", rich_help_panel=_FAST)
    ] = None,
    prompt_lookup: Annotated[
        int | None,
        typer.Option(metavar="N", help="Draft up to N tokens from the text itself.", rich_help_panel=_FAST),
    ] = None,
    max_matching_ngram: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many tokens must agree for that, at most.", rich_help_panel=_FAST),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many of --prompts at a time.", rich_help_panel=_FAST)
    ] = 16,
    no_prompt: Annotated[
        bool, typer.Option("--no-prompt", help="Print the new text alone.", rich_help_panel=_SHOWN)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a text, when it is done.", rich_help_panel=_SHOWN)
    ] = False,
    log_probs: Annotated[
        bool, typer.Option("--log-probs", help="With --json: of each new token.", rich_help_panel=_SHOWN)
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No remarks on stderr.", rich_help_panel=_SHOWN)] = False,
) -> None:
    """Continue a text, and show it as it is written.

    One line feed at the end of a prompt from a file or standard input is dropped. An empty prompt begins a new text,
    from the token that stands between texts. Every sample can be had again alone, with the seed shown beside it.
    """
    if log_probs and not as_json:
        raise typer.BadParameter("--log-probs has no effect without --json; pass --json, or leave it out")
    if prompts is not None and samples > 1:
        raise typer.BadParameter(
            f"--samples {samples} is for one prompt; for several texts of each of --prompts use --num-return-sequences"
        )
    words = [check_argument(word, "--bad-words") for word in bad_words or ()]
    if "" in words:
        raise typer.BadParameter("--bad-words is an empty text, which every text holds; give at least one character")
    settings = generate_settings.settings_of(
        {
            "max_new_tokens": length,
            "min_new_tokens": min_new_tokens,
            "max_time": max_time,
            "stop_strings": generate_settings.stop_texts(stop),
            "eos_token_id": tuple(eos) if eos else None,
            "sliding_window": generate_settings.sliding_window(sliding_window),
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "repetition_penalty": repetition_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "suppress_tokens": suppress or None,
            "begin_suppress_tokens": begin_suppress or None,
            "seed": seed,
            "num_beams": beams,
            "num_beam_groups": beam_groups,
            "diversity_penalty": diversity_penalty,
            "length_penalty": length_penalty,
            "early_stopping": generate_settings.early_stopping(early_stopping),
            "penalty_alpha": penalty_alpha,
            "best_of": best_of,
            "num_return_sequences": num_return_sequences,
            "num_assistant_tokens": assistant_tokens,
            "prompt_lookup_num_tokens": prompt_lookup,
            "max_matching_ngram_size": max_matching_ngram,
        },
        greedy=greedy,
        sample=sample,
        samples=samples,
        base=_base(settings_file),
    )
    backends.check_dtype(backends.choose(framework), dtype)
    beginnings = generate_settings.prompts_of(prompt, file, prompts)
    with terminal.busy(f"loading {model} ...", quiet=quiet):
        vocabulary = load_tokenizer(tokenizer or model)
        runner = backends.load(framework, model, device, dtype, compiled=compiled)
        helper = None if assistant is None else backends.load_assistant(runner, assistant, device, dtype)
    ids = [writing.prompt_ids(runner, vocabulary, each) for each in beginnings]
    settings = generate_settings.fitted(settings, length, min(writing.room(runner, each) for each in ids))
    if words:
        listed = (*(settings.bad_words_ids or ()), *generate_settings.banned(vocabulary, words))
        settings = settings.replace(bad_words_ids=listed)
    settings = writing.with_padding(runner, settings)
    writing.check(runner, vocabulary, ids, settings, helper)
    job = generate_view.Job(
        runner, vocabulary, model, beginnings, ids, settings, samples, batch_size, helper, log_probs
    )
    if as_json:
        generate_view.write_json(job)
    else:
        generate_view.write_text(job, show_prompt=not no_prompt, quiet=quiet, seed_given=seed is not None)


def _base(file: Path | None) -> GenerationConfig | None:
    if file is None:
        return None
    from gpt2_core.sampling import GenerationConfig

    return GenerationConfig.from_json_file(file)
