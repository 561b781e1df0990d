"""The table of parameters: counts, names, shapes, initial distributions, decay."""

from __future__ import annotations

import math

import pytest

from gpt2_core.config import PRESETS, GPT2Config
from gpt2_core.errors import ConfigError
from gpt2_core.parameters import PREFIX, Head, count_parameters, parameter_table

CONFIG = GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("distilgpt2", 81_912_576),
    ],
)
def test_the_released_models_have_their_published_number_of_parameters(name, count):
    assert count_parameters(PRESETS[name]) == count
    assert count_parameters(PRESETS[name], Head.NONE) == count


def test_names_and_shapes_are_the_released_ones():
    rows = {row.name: row.shape for row in parameter_table(CONFIG)}
    assert rows["transformer.wte.weight"] == (11, 6)
    assert rows["transformer.wpe.weight"] == (8, 6)
    assert rows["transformer.h.1.attn.c_attn.weight"] == (6, 18)  # (in, out)
    assert rows["transformer.h.1.attn.c_proj.weight"] == (6, 6)
    assert rows["transformer.h.0.mlp.c_fc.weight"] == (6, 24)
    assert rows["transformer.h.0.mlp.c_proj.weight"] == (24, 6)
    assert rows["transformer.ln_f.bias"] == (6,)
    assert "lm_head.weight" not in rows
    assert len(rows) == 2 + 2 * 12 + 2


def test_the_order_is_that_of_the_forward_pass():
    names = [row.name for row in parameter_table(CONFIG, Head.NONE)]
    assert names[:4] == ["wte.weight", "wpe.weight", "h.0.ln_1.weight", "h.0.ln_1.bias"]
    assert names[-2:] == ["ln_f.weight", "ln_f.bias"]
    assert names.index("h.0.mlp.c_proj.bias") < names.index("h.1.ln_1.weight")


def test_the_bare_transformer_has_the_same_rows_without_the_prefix():
    bare = [(row.name, row.shape) for row in parameter_table(CONFIG, Head.NONE)]
    assert [(row.name.removeprefix(PREFIX), row.shape) for row in parameter_table(CONFIG, Head.LM)] == bare


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("lm", {}),
        ("double", {"multiple_choice_head.summary.weight": (1, 6), "multiple_choice_head.summary.bias": (1,)}),
        ("sequence", {"score.weight": (4, 6)}),
        ("token", {"classifier.weight": (4, 6), "classifier.bias": (4,)}),
        ("qa", {"qa_outputs.weight": (2, 6), "qa_outputs.bias": (2,)}),
    ],
)
def test_each_head_adds_its_own_parameters_as_out_by_in(head, expected):
    config = CONFIG.replace(num_labels=4)
    added = {row.name: row.shape for row in parameter_table(config, head) if not row.name.startswith(PREFIX)}
    assert added == expected


def test_an_untied_head_is_a_parameter_of_its_own():
    config = CONFIG.replace(tie_word_embeddings=False)
    for head in (Head.LM, Head.DOUBLE):
        rows = {row.name: row.shape for row in parameter_table(config, head)}
        assert rows["lm_head.weight"] == (11, 6)
    assert count_parameters(config) == count_parameters(CONFIG) + 66


def test_pruned_heads_narrow_both_attention_kernels():
    rows = {row.name: row.shape for row in parameter_table(CONFIG.replace(pruned_heads={1: [0, 2]}), Head.NONE)}
    assert rows["h.1.attn.c_attn.weight"] == (6, 6)
    assert rows["h.1.attn.c_attn.bias"] == (6,)
    assert rows["h.1.attn.c_proj.weight"] == (2, 6)
    assert rows["h.0.attn.c_attn.weight"] == (6, 18)


def test_what_projects_into_the_residual_stream_starts_smaller():
    for row in parameter_table(CONFIG, Head.NONE):
        if row.name.endswith("c_proj.weight"):
            assert row.std == pytest.approx(0.02 / math.sqrt(2 * CONFIG.n_layer))
        elif row.init == "normal":
            assert row.std == 0.02


def test_weights_decay_and_biases_and_gains_do_not():
    for row in parameter_table(CONFIG.replace(tie_word_embeddings=False, num_labels=3), Head.LM):
        assert row.decay == (len(row.shape) == 2), row.name
        assert row.init == (
            "normal" if row.decay else "ones" if ".ln_" in row.name and "weight" in row.name else "zeros"
        )


def test_an_unknown_head_and_a_choice_head_of_several_numbers_are_refused():
    with pytest.raises(ConfigError, match="head is 'lmm', expected one of none, lm"):
        parameter_table(CONFIG, "lmm")
    with pytest.raises(ConfigError, match="needs one score per choice"):
        parameter_table(CONFIG.replace(summary_proj_to_labels=False), Head.DOUBLE)
    with pytest.raises(ConfigError, match="needs one score per choice"):
        parameter_table(CONFIG.replace(summary_use_proj=False), Head.DOUBLE)
