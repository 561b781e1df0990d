"""The embedded model writes the same texts in PyTorch and in TensorFlow, in float32; where not, rounding decided.

A text may part only where the number that draws a token lies within rounding of the boundary between two tokens, or
where rounding decides which tokens are among the top k. Both are shown with the reference model, in float64.
"""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core import GPT2Tokenizer, ReferenceModel
from gpt2_core.sampling import GenerationConfig, apply_rules, softmax
from gpt2_core.uniforms import uniforms

#: Half of what the frameworks' float32 logits of this model may differ by from exact ones: measured below 2e-5.
ROUNDING = 5e-5
BEGINNINGS = [
    "Once upon a time", "The king", "There was an old woman who", "“Where are you going?” said the fox", "A poor man",
    "In a far country", "The wolf", "When the sun had set", "Long ago", "Hans", "The youngest daughter", "But the bird",
    "Deep in the forest", "“I will", "Every morning", "The two brothers", "She", "At last they came", "An owl", "Snow",
]  # fmt: skip
SETTINGS = GenerationConfig(do_sample=True, temperature=0.9, top_k=40, seed=2024, eos_token_id=())


def written(each: int, length: int) -> tuple[list[list[int]], dict[str, list[list[int]]]]:
    """Prompts, and ``each`` texts of every prompt, written by both."""
    pytest.importorskip("torch")
    pytest.importorskip("tensorflow")
    import gpt2_pt
    import gpt2_tf

    prompts = [GPT2Tokenizer().encode(text) for text in BEGINNINGS]
    out = {}
    for name, cls in (("pt", gpt2_pt.GPT2LMHeadModel), ("tf", gpt2_tf.TFGPT2LMHeadModel)):
        model = cls.from_pretrained("gpt2-tales")
        texts = model.generate(
            prompts, generation_config=SETTINGS, max_new_tokens=length, num_return_sequences=each, pad_token_id=0
        )
        out[name] = np.asarray(texts)[:, -length:].tolist()
    return prompts, out


def is_a_tie(reference: ReferenceModel, text: list[int], row: int, step: int, tokens: set[int]) -> bool:
    """Whether rounding may draw any of ``tokens`` after ``text``, as new token ``step`` of text ``row``."""
    logits = reference([text]).logits[0, -1]
    p = softmax(apply_rules(logits, text, SETTINGS))
    edges = np.cumsum(p)
    number = uniforms(SETTINGS.seed or 0, [row], [step])[0, 0] * edges[-1]
    # Logits that are off by so much move every boundary by at most as much, at this temperature.
    near = np.abs(edges - number) < 2 * ROUNDING / SETTINGS.temperature
    between = {int(token) for edge in np.flatnonzero(near) for token in np.flatnonzero(p)[[
        max(0, int(np.searchsorted(np.flatnonzero(p), edge))),
        min((p > 0).sum() - 1, int(np.searchsorted(np.flatnonzero(p), edge, side="right"))),
    ]]}  # fmt: skip
    ranked = np.sort(logits)[::-1]
    return tokens <= between or ranked[SETTINGS.top_k - 1] - ranked[SETTINGS.top_k] < 2 * ROUNDING


def compare(each: int, length: int) -> None:
    prompts, texts = written(each, length)
    assert len(texts["pt"]) == len(texts["tf"]) == each * len(prompts)
    assert len({tuple(text) for text in texts["pt"]}) == len(texts["pt"])
    parted = [row for row in range(len(texts["pt"])) if texts["pt"][row] != texts["tf"][row]]
    assert len(parted) < 0.05 * len(texts["pt"]) * length / 20
    if parted:
        reference = ReferenceModel.from_pretrained("gpt2-tales")
    for row in parted:
        one, other = texts["pt"][row], texts["tf"][row]
        step = next(i for i in range(length) if one[i] != other[i])
        text = [*prompts[row // each], *one[:step]]
        assert is_a_tie(reference, text, row, step, {one[step], other[step]}), f"text {row} parts at token {step}"


def test_both_frameworks_write_the_same_texts():
    compare(1, 24)


@pytest.mark.slow
def test_both_frameworks_write_the_same_two_hundred_texts_of_two_hundred_tokens():
    compare(10, 200)
