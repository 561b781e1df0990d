"""Adapters as Python has them: saved and read again in each framework and across, prepared, merged, refused."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from gpt2_core.adapters import Lora, read_adapter
from gpt2_core.errors import InputError
from models import ordinary_parameters, random_ids, small_config
from parity.frameworks import FRAMEWORKS
from tolerances import error

CONFIG = small_config(
    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, summary_first_dropout=0.0, id2label={0: "bad", 1: "good"}
)
LORA = Lora(2, 6.0, ("c_attn", "mlp.c_proj"), 0.25)


def adapters_of(framework):
    return importlib.import_module(f"gpt2_{framework.name}.adapters")


def learnt(framework, head="lm", dtype="float32", config=CONFIG):
    """A model with an adapter that has learnt something."""
    model = framework.build(config, head, ordinary_parameters(config, head, 0), dtype)
    pick = np.random.default_rng(1)
    for value in adapters_of(framework).attach(model, LORA).values():
        array = pick.normal(0, 0.3, tuple(value.shape)).astype(np.float32)
        if framework.name == "pt":
            value.data.copy_(framework.torch.from_numpy(array))
        else:
            value.assign(framework.tf.cast(array, value.dtype))
    return model


def logits(framework, model):
    shape = (3, 2, 6) if model.head.value == "double" else (3, 6)
    out = framework.run(model, input_ids=random_ids(model.config, *shape))
    return framework.numpy(out.mc_logits if model.head.value == "double" else out.logits)


@pytest.mark.parametrize("head", ["lm", "double", "sequence"])
def test_a_saved_adapter_stands_beside_the_model_again_in_every_framework(framework, head, tmp_path):
    made = learnt(framework, head)
    folder = adapters_of(framework).save_adapter(made, tmp_path / "one" / "adapter", "the small one")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == "the small one"
    heads = {"lm": None, "double": ["multiple_choice_head"], "sequence": ["score"]}
    assert settings["modules_to_save"] == heads[head]
    names = read_adapter(folder).labels
    assert (names is not None) == (head == "sequence")
    assert names is None or dict(names) == dict(CONFIG.id2label)
    expected = logits(framework, made)
    for other in (make() for make in FRAMEWORKS.values()):
        again = other.build(CONFIG, head, ordinary_parameters(CONFIG, head, 0), "float32")
        assert error(logits(other, again), expected) > 1e-2
        adapters_of(other).attach_saved(again, folder)
        assert error(logits(other, again), expected) <= 1e-5
        if other.name == framework.name:
            adapters_of(other).save_adapter(again, tmp_path / "two", "the small one")
    for file in folder.iterdir():
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()


def test_an_adapter_of_another_number_format_is_saved_as_it_is(framework, tmp_path):
    made = learnt(framework, dtype="bfloat16")
    adapters_of(framework).save_adapter(made, tmp_path)
    again = framework.build(CONFIG, "lm", ordinary_parameters(CONFIG, "lm", 0), "bfloat16")
    adapters_of(framework).attach_saved(again, tmp_path)
    assert np.array_equal(logits(framework, again), logits(framework, made))


def test_a_model_is_not_saved_without_the_adapter_that_it_holds(framework, tmp_path):
    adapters = adapters_of(framework)
    model = learnt(framework)
    with pytest.raises(
        InputError, match=r"holds a LoRA adapter, .* merge\(model\), or .* save_adapter\(model, folder\)"
    ):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    expected = logits(framework, model)
    adapters.merge(model)
    model.save_pretrained(tmp_path / "model")
    assert error(logits(framework, framework.classes["lm"].from_pretrained(tmp_path / "model")), expected) <= 1e-5
    with pytest.raises(InputError, match="has no adapter to save"):
        adapters.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def written(framework, model, **options):
    """What a model, or one prepared from it, writes after three tokens, and how likely each token was."""
    ids = np.array([[3, 4, 5]])
    ids = framework.torch.from_numpy(ids) if framework.name == "pt" else framework.tf.constant(ids)
    return np.array(model.generate(ids, max_new_tokens=8, eos_token_id=[], **options)).tolist()


def test_a_prepared_model_writes_what_the_model_writes_with_its_adapter(framework):
    model = learnt(framework)
    beside = written(framework, model)
    prepared = [model.prepare_for_generation()]
    if framework.name == "pt":
        prepared.append(model.prepare_for_generation(dtype="int8"))
    assert [written(framework, one) for one in prepared] == [beside] * len(prepared)
    assert written(framework, model) == beside  # the kernels are as they were
    adapters_of(framework).detach(model)
    alone = written(framework, model)
    assert alone != beside
    assert written(framework, framework.build(CONFIG, "lm", ordinary_parameters(CONFIG, "lm", 0), "float32")) == alone


def test_a_model_never_writes_on_by_what_was_traced_before_an_adapter_came_or_went(framework):
    adapters = adapters_of(framework)
    model = framework.build(CONFIG, "lm", ordinary_parameters(CONFIG, "lm", 0), "float32")
    alone = written(framework, model)
    made = adapters.attach(model, LORA)
    assert written(framework, model) == alone  # B starts at zero
    for value, other in zip(made.values(), adapters.adapter_parameters(learnt(framework)).values(), strict=True):
        if framework.name == "pt":
            value.data.copy_(other.data)
        else:
            value.assign(other)
    beside = written(framework, model)
    assert beside != alone
    arrays = {name: framework.numpy(value) for name, value in made.items()}
    adapters.merge(model)
    assert written(framework, model) == beside
    adapters.unmerge(model, LORA, arrays)
    adapters.attach(model, LORA)
    adapters.detach(model)
    assert written(framework, model) == alone
