"""The recipe: what it takes, what it refuses and in which words, and the files that it is kept in."""

from __future__ import annotations

import json

import pytest

from gpt2_core.errors import ConfigError
from gpt2_core.parameters import Head
from gpt2_core.recipe import (
    FREE,
    SECTIONS,
    SETTINGS,
    Recipe,
    differences,
    frozen,
    overridden,
    read_recipe,
    to_toml,
    write_recipe,
)

TOML = """
[model]
model = "gpt2"            # what a comment says
config = {n_layer = 6}
freeze = ["transformer.wte.*"]

[optimizer]
lr = 3e-4
steps = 100

[data]
data = "a.bin"
"""


def written(tmp_path, text, name="recipe.toml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_by_section(tmp_path):
    recipe = read_recipe(written(tmp_path, TOML))
    assert (recipe.model, recipe.lr, recipe.steps, recipe.data) == ("gpt2", 3e-4, 100, "a.bin")
    assert recipe.config == (("n_layer", 6),)
    assert recipe.freeze == ("transformer.wte.*",)
    assert recipe.head is Head.LM


def test_settings_may_stand_outside_of_any_table(tmp_path):
    assert read_recipe(written(tmp_path, "lr = 0.5\n")).lr == 0.5


def test_what_the_command_line_says_comes_after_the_file(tmp_path):
    overrides = {
        "lr": "1e-4",
        "optimizer.beta2": "0.5",
        "epochs": "2",
        "config.n_head": "4",
        "data": "7",
        "dropout": "0",
    }
    recipe = read_recipe(written(tmp_path, TOML), overrides)
    assert (recipe.lr, recipe.beta2, recipe.epochs, recipe.steps, recipe.dropout) == (1e-4, 0.5, 2.0, None, 0.0)
    assert recipe.config == (("n_head", 4), ("n_layer", 6))
    assert recipe.data == "7"


def test_lists_are_typed_with_commas():
    recipe = overridden({}, {"lora_rank": "4", "lora_targets": "attn.c_attn, mlp.c_fc"})
    assert recipe.lora_targets == ("attn.c_attn", "mlp.c_fc")


def test_none_can_be_typed():
    assert overridden({"dropout": 0.5}, {"dropout": "none"}).dropout is None


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(lr=1e-5, config={"n_layer": 2, "scale_attn_weights": False}, steps=10, freeze=["a", "b"], epochs=None),
        Recipe(sample_prompt='A "quote", a \\ and\na line\x7f\x01 – 語 😀', data="C:\\data", lr=1.0, ema_decay=0.999),
        Recipe(lora_rank=2, lora_targets=["mlp.c_fc"], patience=3, eval_every=2, data="x", validation="y"),
    ],
)
@pytest.mark.parametrize("name", ["recipe.toml", "recipe.json"])
def test_what_is_written_is_read_as_the_same_recipe(tmp_path, recipe, name):
    write_recipe(tmp_path / name, recipe)
    assert read_recipe(tmp_path / name) == recipe


def test_every_setting_stands_in_one_section_and_is_told_of():
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(SETTINGS)
    assert all(name in (Recipe.__doc__ or "") for name in SETTINGS)
    assert set(SETTINGS) >= FREE


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lrr": 1.0}, "no setting 'lrr'; did you mean 'lr'?"),
        ({"learning_rate": 1.0}, "called 'lr' here"),
        ({"lr": 0}, "lr is 0, expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": True}, "lr is True"),
        ({"lr": "fast"}, "lr is 'fast'"),
        ({"beta1": 1.0}, "from 0 to below 1"),
        ({"steps": 0}, "steps is 0, expected a whole number of at least 1"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": -1}, "seed is -1"),
        ({"schedule": "cosin"}, "expected one of cosine, linear, constant; did you mean 'cosine'?"),
        ({"dtype": "float64"}, "expected one of float32, bfloat16, float16"),
        ({"task": "chat"}, "expected one of lm, instruction"),
        ({"freeze": [1]}, "expected a list of patterns"),
        ({"config": {"n_layer": object()}}, "expected a table"),
        ({"config": {"n_layer": 1, "n_inner": None}}, "'n_inner' is None, which no recipe can hold; leave it out"),
        ({"config": {"n_layer": 1, "x": [1.0, float("inf")]}}, "'x' is [1.0, inf], which no recipe can hold"),
        ({"config": {"x": {"y": float("nan")}}}, "'x' is {'y': nan}, which no recipe can hold"),
        ({"steps": 5, "epochs": 1}, "both steps=5 and epochs=1.0"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "min_lr=0.001 is more than lr=0.0001"),
        ({"schedule": "constant", "lr": 1.0, "min_lr": 0.1}, "without cooldown_steps"),
        ({"cooldown_steps": 5}, "no effect on schedule='cosine'"),
        ({"steps": 5, "warmup_steps": 6}, "are more than steps=5"),
        ({"patience": 2}, "no effect without evaluations"),
        ({"optimizer": "moun"}, "expected one of adamw, muon; did you mean 'muon'?"),
        ({"optimizer": "muon", "momentum": 1.0}, "momentum is 1.0, expected a number from 0 to below 1"),
        ({"momentum": 0.9}, "momentum=0.9 has no effect on optimizer='adamw'"),
        ({"optimizer": "muon", "lora_rank": 2}, "which lora_rank freezes; set it to 'adamw'"),
        ({"optimizer": "muon", "parallel": "fsdp"}, "needs whole kernels, which parallel='fsdp' shares out"),
        ({"task": "double_heads", "val_fraction": 0.0, "eval_every": 2}, "nothing to evaluate on"),
        ({"lora_rank": 2, "freeze": ["*"]}, "freezes every weight"),
        ({"compile": 1}, "compile is 1, expected true or false"),
    ],
)
def test_what_cannot_be_is_refused_in_words(settings, words):
    with pytest.raises(ConfigError) as error:
        Recipe(**settings)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optimiser]\nlr = 1.0\n", "no table [optimiser]; expected model, data"),
        ("[optimiser]\nlr = 1.0\n", "did you mean 'optimizer'?"),
        ("[data]\nlr = 1.0\n", "lr stands in [data], expected in [optimizer]"),
        ("lr = 1.0\n[optimizer]\nlr = 1.0\n", "lr is given twice"),
        ("lr = \n", "is not valid TOML"),
        ("[optimizer]\nweigth_decay = 0.1\n", "did you mean 'weight_decay'?"),
    ],
)
def test_a_file_with_a_mistake_is_named_with_it(tmp_path, text, words):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_recipe(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_and_one_that_is_no_text_are_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist; expected a recipe in TOML"):
        read_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not text"):
        read_recipe(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match="holds a list"):
        read_recipe(written(tmp_path, "[1]", "list.json"))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ({"optimiser.lr": "1"}, "did you mean 'optimizer'?"),
        ({"data.lr": "1"}, "write optimizer.lr"),
        ({"batchsize": "1"}, "did you mean 'batch_size'?"),
    ],
)
def test_a_mistyped_override_gives_the_nearest_name(typed, words):
    with pytest.raises(ConfigError) as error:
        overridden({}, typed)
    assert words in str(error.value)


def test_replacing_checks_and_epochs_take_the_place_of_steps():
    recipe = Recipe(steps=5)
    assert recipe.replace(epochs=2).steps is None
    assert recipe.replace(lr=0.5).steps == 5
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        recipe.replace(step=3)


def test_differences_name_what_a_resumed_run_may_not_change():
    old = Recipe(lr=0.1, steps=5)
    assert differences(old, old.replace(lr=0.2, steps=7)) == ["lr is 0.2, and was 0.1"]


def test_json_holds_every_setting():
    data = json.loads(json.dumps(Recipe(config={"n_layer": 1}).to_dict()))
    assert set(data) == set(SETTINGS)
    assert Recipe.from_dict(data) == Recipe(config={"n_layer": 1})
    assert "lr = 0.0001" in to_toml(Recipe())


def test_patterns_freeze_parameters():
    names = [f"transformer.h.{layer}.{leaf}" for layer in range(12) for leaf in ("a.weight", "b.bias")]
    assert frozen(names, ["transformer.h.[01].*"]) == {
        n for n in names if n.startswith(("transformer.h.0.", "transformer.h.1."))
    }
    assert frozen(names, []) == frozenset()
    with pytest.raises(ConfigError, match="fits no parameter"):
        frozen(names, ["transformer.h.12.*"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        frozen(names, ["*"])
