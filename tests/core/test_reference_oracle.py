"""The reference against another implementation: transformers' GPT-2 classes, run in float64."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gpt2_core.config import ACTIVATIONS, GPT2Config
from gpt2_core.parameters import parameter_table
from gpt2_core.reference import ReferenceModel

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FLOAT64 = 1e-10
THEIR_LOSS = 1e-6  # their language-model loss is taken in float32 whatever the model is in
FLOAT32 = 2e-5  # the bound for float32 weights and arithmetic

CLASSES = {
    "none": "GPT2Model",
    "lm": "GPT2LMHeadModel",
    "double": "GPT2DoubleHeadsModel",
    "sequence": "GPT2ForSequenceClassification",
    "token": "GPT2ForTokenClassification",
    "qa": "GPT2ForQuestionAnswering",
}


def random_config(seed: int, **changes) -> GPT2Config:
    """A small config; ``seed`` picks everything that changes the numbers."""
    pick = random.Random(seed)
    n_head = pick.choice([1, 2, 3])
    values = {
        "vocab_size": pick.choice([11, 37]),
        "n_positions": 16,
        "n_embd": n_head * pick.choice([4, 6]),
        "n_layer": pick.choice([1, 2, 3]),
        "n_head": n_head,
        "n_inner": pick.choice([None, 7, 40]),
        "activation_function": ACTIVATIONS[seed % len(ACTIVATIONS)],
        "layer_norm_epsilon": pick.choice([1e-5, 1e-3, 0.1]),
        "scale_attn_weights": pick.random() < 0.7,
        "scale_attn_by_inverse_layer_idx": pick.random() < 0.5,
        "reorder_and_upcast_attn": pick.random() < 0.3,
        "tie_word_embeddings": pick.random() < 0.6,
        "summary_activation": pick.choice([None, "tanh"]),
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    return GPT2Config(**(values | changes))


def random_parameters(config: GPT2Config, head: str, seed: int) -> dict[str, np.ndarray]:
    """Values far from any initial ones, so that gains, biases and transposes all show."""
    generator = np.random.default_rng(seed)
    return {row.name: generator.normal(0.1, 0.4, row.shape).astype(np.float32) for row in parameter_table(config, head)}


def pair(config: GPT2Config, head: str, seed: int = 0, dtype=None):
    """The same weights in the reference and in transformers' model."""
    parameters = random_parameters(config, head, seed)
    settings = {key: value for key, value in config.to_dict().items() if key not in ("n_ctx", "pruned_heads")}
    if dtype is None:  # upcasting means float32 to them; in float64 it changes nothing, so they do without
        settings["reorder_and_upcast_attn"] = False
    theirs_config = transformers.GPT2Config(**settings, attn_implementation="eager")
    theirs = getattr(transformers, CLASSES[head])(theirs_config).eval().to(dtype or torch.float64)
    state = {name: torch.from_numpy(value) for name, value in parameters.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    assert "lm_head.weight" not in missing or config.tie_word_embeddings
    return ReferenceModel(config, parameters, head), theirs


def ids_of(config: GPT2Config, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape)


def close(ours, theirs, tolerance: float = FLOAT64) -> None:
    np.testing.assert_allclose(ours, theirs.detach().double().numpy(), rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(18))
def test_the_language_model_agrees_in_everything_it_returns(seed):
    config = random_config(seed)
    ours, theirs = pair(config, "lm", seed)
    ids = ids_of(config, (2, 9), seed)
    out = ours(ids, labels=ids, output_attentions=True, output_hidden_states=True)
    tensor = torch.from_numpy(ids)
    expected = theirs(tensor, labels=tensor, output_attentions=True, output_hidden_states=True)
    close(out.logits, expected.logits)
    close(out.loss, expected.loss, THEIR_LOSS)
    close(out.loss, torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), tensor[:, 1:].flatten()))
    assert len(out.hidden_states) == len(expected.hidden_states) == config.n_layer + 1
    for mine, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        close(mine, other)
    for mine, other in zip(out.attentions, expected.attentions, strict=True):
        close(mine, other)
    layers = expected.past_key_values.layers
    assert len(layers) == len(out.past)
    for (key, value), layer in zip(out.past, layers, strict=True):
        close(key, layer.keys)
        close(value, layer.values)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(9))
def test_float32_weights_and_arithmetic_stay_within_the_published_bound(seed):
    # Initial values rather than wild ones: the bound is for a model as GPT-2 is, whose logits are of ordinary size.
    config = random_config(seed, initializer_range=0.1)
    ours = ReferenceModel.from_seed(config, "lm", seed)
    _, theirs = pair(config, "lm", seed, torch.float32)
    theirs.load_state_dict(
        {n: torch.from_numpy(v.astype(np.float32)) for n, v in ours.parameters.items()}, strict=False
    )
    ids = ids_of(config, (2, 16), seed)
    close(ours(ids).logits, theirs(torch.from_numpy(ids)).logits, FLOAT32)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_a_cached_continuation_with_padding_and_token_types_agrees(seed):
    config = random_config(seed + 50)
    ours, theirs = pair(config, "lm", seed)
    ids = ids_of(config, (2, 8), seed)
    mask = np.ones((2, 8), np.int64)
    mask[0, :3] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    types = ids_of(config, (2, 8), seed + 1)
    first = ours(ids[:, :5], attention_mask=mask[:, :5], token_type_ids=types[:, :5])
    out = ours(ids[:, 5:], first.past, mask, types[:, 5:])
    expected = theirs(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=torch.from_numpy(positions),
        token_type_ids=torch.from_numpy(types),
    )
    close(out.logits, expected.logits[:, 5:])
    close(first.logits[mask[:, :5] == 1], expected.logits[:, :5][torch.from_numpy(mask[:, :5] == 1)])


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_double_heads_agree_in_both_logits_and_both_losses(seed):
    # Only summary_type "cls_index" can be compared: theirs takes the other types along the axis of choices.
    config = random_config(seed + 20)
    ours, theirs = pair(config, "double", seed)
    ids = ids_of(config, (2, 3, 6), seed)
    at, right = ids_of(config, (2, 3), seed + 1) % 6, np.array([2, 0])
    labels = ids.copy()
    labels[:, :, :2] = -100
    out = ours(ids, mc_token_ids=at, labels=labels, mc_labels=right)
    expected = theirs(
        torch.from_numpy(ids),
        mc_token_ids=torch.from_numpy(at),
        labels=torch.from_numpy(labels),
        mc_labels=torch.from_numpy(right),
    )
    close(out.logits, expected.logits)
    close(out.mc_logits, expected.mc_logits)
    close(out.lm_loss, expected.loss, THEIR_LOSS)
    close(out.mc_loss, expected.mc_loss)
    assert out.loss == out.lm_loss + out.mc_loss


@torch.no_grad()
@pytest.mark.parametrize(
    ("num_labels", "problem_type"),
    [
        (1, None),
        (3, None),
        (3, "single_label_classification"),
        (3, "multi_label_classification"),
        (3, "regression"),
        (1, "regression"),
    ],
)
def test_a_sequence_classifier_agrees_for_every_kind_of_problem(num_labels, problem_type):
    config = random_config(num_labels, num_labels=num_labels, problem_type=problem_type, pad_token_id=0)
    ours, theirs = pair(config, "sequence")
    ids = ids_of(config, (4, 7)) % (config.vocab_size - 1) + 1
    ids[1, 4:] = 0  # padding on the right: the last real token is read
    kind = problem_type or ("regression" if num_labels == 1 else "single_label_classification")
    generator = np.random.default_rng(3)
    if kind == "single_label_classification":
        labels = generator.integers(0, num_labels, 4)
    elif kind == "multi_label_classification":
        labels = generator.integers(0, 2, (4, num_labels)).astype(np.float64)
    else:
        labels = generator.normal(size=(4,) if num_labels == 1 else (4, num_labels))
    out = ours(ids, labels=labels)
    expected = theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels))
    close(out.logits, expected.logits)
    close(out.loss, expected.loss)


@torch.no_grad()
def test_token_classification_and_question_answering_agree():
    config = random_config(31, num_labels=4)
    ids = ids_of(config, (3, 7))
    ours, theirs = pair(config, "token")
    labels = ids % 4
    labels[0, :3] = -100
    out = ours(ids, labels=labels)
    expected = theirs(torch.from_numpy(ids), labels=torch.from_numpy(labels))
    close(out.logits, expected.logits)
    close(out.loss, expected.loss)

    ours, theirs = pair(config, "qa")
    start, end = np.array([0, 3, 99]), np.array([2, 6, 99])  # 99 lies outside the text and does not count
    out = ours(ids, start_positions=start, end_positions=end)
    expected = theirs(
        torch.from_numpy(ids), start_positions=torch.from_numpy(start), end_positions=torch.from_numpy(end)
    )
    close(out.start_logits, expected.start_logits)
    close(out.end_logits, expected.end_logits)
    close(out.loss, expected.loss)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_greedy_generation_from_a_left_padded_batch_agrees(seed):
    config = random_config(seed + 70, vocab_size=37, n_positions=32)
    ours, theirs = pair(config, "lm", seed)
    ids = ids_of(config, (3, 6), seed) % 35 + 2
    mask = np.ones_like(ids)
    mask[0, :4], mask[1, :1] = 0, 0
    expected = theirs.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=12, do_sample=False, pad_token_id=0
    ).numpy()
    out = ours.generate(ids, mask, max_new_tokens=12, pad_token_id=0)
    assert out[:, : expected.shape[1]].tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("repetition_penalty", lambda p: p.RepetitionPenaltyLogitsProcessor(penalty=1.7)),
        ("no_repeat_ngram_size", lambda p: p.NoRepeatNGramLogitsProcessor(2)),
        ("bad_words_ids", lambda p: p.NoBadWordsLogitsProcessor([[3], [4, 5], [1, 2, 6]], eos_token_id=[0])),
        ("suppress_tokens", lambda p: p.SuppressTokensLogitsProcessor([2, 9])),
        ("temperature", lambda p: p.TemperatureLogitsWarper(0.6)),
        ("top_k", lambda p: p.TopKLogitsWarper(5)),
        ("top_p", lambda p: p.TopPLogitsWarper(0.7)),
        ("min_p", lambda p: p.MinPLogitsWarper(0.3)),
        ("typical_p", lambda p: p.TypicalLogitsWarper(0.6)),
    ],
)
def test_each_sampling_rule_agrees_where_there_are_no_ties(name, build):
    from gpt2_core.sampling import GenerationConfig, apply_rules

    settings = {
        "repetition_penalty": {"repetition_penalty": 1.7},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
        "bad_words_ids": {"bad_words_ids": [[3], [4, 5], [1, 2, 6]]},
        "suppress_tokens": {"suppress_tokens": [2, 9]},
        "temperature": {"do_sample": True, "temperature": 0.6},
        "top_k": {"do_sample": True, "top_k": 5},
        "top_p": {"do_sample": True, "top_p": 0.7},
        "min_p": {"do_sample": True, "min_p": 0.3},
        "typical_p": {"do_sample": True, "typical_p": 0.6},
    }[name]
    rule = build(transformers.generation.logits_process)
    generator = np.random.default_rng(0)
    for _ in range(50):
        scores = generator.normal(0, 2, 12)
        history = generator.integers(0, 12, generator.integers(1, 20))
        if name == "bad_words_ids":
            history[-2:] = [1, 2][-len(history) :]
        mine = apply_rules(scores, history, GenerationConfig(**settings))
        other = rule(torch.from_numpy(history)[None], torch.from_numpy(scores)[None].clone())[0].numpy()
        np.testing.assert_allclose(mine, other, rtol=1e-12)
