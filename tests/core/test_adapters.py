"""LoRA's names, shapes and sums, without a framework."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gpt2_core.adapters import (
    Lora,
    adapted,
    adapter_table,
    fitted,
    merge_all,
    merged,
    read_adapter,
    target_kernels,
    write_adapter,
)
from gpt2_core.checkpoints import safetensors
from gpt2_core.checkpoints.tensors import Tensor
from gpt2_core.conversion import open_source
from gpt2_core.errors import CheckpointError, CheckpointMismatchError, ConfigError
from gpt2_core.parameters import parameter_table
from gpt2_core.pretrained import save_pretrained
from gpt2_core.training_state import About, Progress, save_state
from models import small_config

CONFIG = small_config(n_layer=2)


def test_targets_name_layers_by_the_end_of_their_names():
    def names(*targets):
        return [row.name.removeprefix("transformer.") for row in target_kernels(CONFIG, "lm", targets)]

    assert names("attn.c_attn") == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"]
    assert len(names("c_proj")) == 4
    assert names("h.1.mlp.c_fc") == ["h.1.mlp.c_fc.weight"]
    with pytest.raises(ConfigError, match=r"did you mean 'attn\.c_attn'"):
        names("attn.c_atn")


def test_the_table_has_two_thin_matrices_a_kernel():
    rows = adapter_table(CONFIG, "lm", Lora(3, 6.0, ("mlp.c_fc",)))
    assert [(row.name.removeprefix("transformer.h.0."), row.shape, row.init) for row in rows[:2]] == [
        ("mlp.c_fc.lora_A", (3, 8), "normal"),
        ("mlp.c_fc.lora_B", (32, 3), "zeros"),
    ]
    assert len(rows) == 4


def test_merging_adds_the_product_and_takes_it_out_again():
    pick = np.random.default_rng(0)
    kernel, a, b, x = (pick.normal(size=shape) for shape in ((8, 24), (2, 8), (24, 2), (5, 8)))
    one = merged(kernel, a, b, 0.5)
    np.testing.assert_allclose(x @ one, x @ kernel + 0.5 * (x @ a.T) @ b.T, atol=1e-12)
    np.testing.assert_allclose(merged(one, a, b, 0.5, sign=-1), kernel, atol=1e-14)
    assert merged(kernel.astype(np.float16), a, b, 0.5).dtype == np.float16


def test_all_kernels_of_an_adapter_are_merged_and_no_others():
    lora = Lora(2, 2.0, ("attn.c_attn",))
    kernels = {row.name: np.zeros(row.shape) for row in parameter_table(CONFIG, "lm")}
    arrays = {row.name: np.ones(row.shape) for row in adapter_table(CONFIG, "lm", lora)}
    out = merge_all(kernels, arrays, lora.scale)
    changed = {name for name in out if out[name].any()}
    assert changed == {row.name for row in target_kernels(CONFIG, "lm", lora.targets)}
    assert not any(value.any() for value in kernels.values())
    with pytest.raises(CheckpointError, match="there is no other"):
        merge_all(kernels, {"other.lora_A": np.ones((1, 1))}, 1.0)


def test_an_adapter_is_read_as_it_was_written_and_by_peft_s_names(tmp_path):
    lora = Lora(2, 4.0, ("attn.c_attn", "mlp.c_fc"), 0.1)
    arrays = {row.name: np.random.default_rng(1).normal(size=row.shape).astype(np.float32)
              for row in adapter_table(CONFIG, "lm", lora)}  # fmt: skip
    write_adapter(tmp_path, lora, {name: Tensor.of(array) for name, array in arrays.items()}, "gpt2")
    for given in (tmp_path, tmp_path / "adapter_model.safetensors"):
        again = read_adapter(given)
        assert (again.lora, again.base) == (lora, "gpt2")
        assert all((again.arrays[name] == arrays[name]).all() for name in arrays)
    from safetensors.numpy import load_file

    theirs = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in theirs


@pytest.mark.parametrize(
    ("architecture", "head", "task", "whole"),
    [
        ("GPT2Model", "none", None, None),
        ("GPT2LMHeadModel", "lm", "CAUSAL_LM", None),
        ("GPT2DoubleHeadsModel", "double", "CAUSAL_LM", ["multiple_choice_head"]),
        ("GPT2ForSequenceClassification", "sequence", "SEQ_CLS", ["score"]),
        ("GPT2ForTokenClassification", "token", "TOKEN_CLS", ["classifier"]),
        ("GPT2ForQuestionAnswering", "qa", "QUESTION_ANS", ["qa_outputs"]),
    ],
)
def test_an_adapter_names_the_task_of_its_model_and_holds_its_head(tmp_path, architecture, head, task, whole):
    lora = Lora(2, 4.0, ("attn.c_attn",))
    table = adapter_table(CONFIG, head, lora)
    arrays = {row.name: np.random.default_rng(1).normal(size=row.shape).astype(np.float32) for row in table}
    write_adapter(tmp_path, lora, {name: Tensor.of(array) for name, array in arrays.items()}, "gpt2", architecture)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == (task, whole)
    again = fitted(read_adapter(tmp_path), CONFIG, head)
    assert again.lora == lora
    assert same(again.arrays, arrays)
    of_head = {row.name for row in parameter_table(CONFIG, head)} & set(arrays)
    assert {name.partition(".")[0] for name in of_head} == set(whole or ())


def same(one, other):
    return one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)


def test_a_head_is_trained_whole_and_taken_as_it_is(tmp_path):
    lora = Lora(2, 4.0, ("attn.c_attn",))
    kernels = {row.name: np.zeros(row.shape) for row in parameter_table(CONFIG, "sequence")}
    arrays = {row.name: np.ones(row.shape) for row in adapter_table(CONFIG, "sequence", lora)}
    assert (merge_all(kernels, arrays, lora.scale)["score.weight"] == 1).all()
    assert not merge_all(kernels, arrays, lora.scale, -1)["score.weight"].any()
    # Beside another head it stands as well, where it has none of its own.
    assert not any(name.startswith("score") for name in fitted(saved(tmp_path), CONFIG, "sequence").arrays)


NAMES = {0: "bad", 1: "good", 2: "so-so"}
THREE = CONFIG.replace(num_labels=3)


def classifier(folder, labels=NAMES, head="sequence"):
    """An adapter with a head of three classes (or another head) on disk."""
    lora = Lora(2, 4.0, ("attn.c_attn",))
    arrays = {row.name: Tensor.of(np.ones(row.shape, np.float32)) for row in adapter_table(THREE, head, lora)}
    folder.mkdir(exist_ok=True)
    write_adapter(folder, lora, arrays, "gpt2", "GPT2ForSequenceClassification", labels)
    return folder


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_the_names_of_the_classes_are_kept_with_the_head(tmp_path, head):
    folder = classifier(tmp_path, head=head)
    assert read_adapter(folder).labels == NAMES
    assert NAMES[0] not in (folder / "adapter_config.json").read_text()  # peft has no such setting
    assert fitted(read_adapter(folder), THREE, head).labels == NAMES
    assert read_adapter(classifier(tmp_path, None, head)).labels is None
    assert read_adapter(classifier(tmp_path, NAMES, "lm")).labels is None  # no classes, no names


@pytest.mark.parametrize("base", ["none", "lm", "sequence"])
def test_a_model_that_is_made_of_a_classifier_s_adapter_has_the_names_of_its_classes(tmp_path, base):
    config = THREE.replace(id2label={0: "x", 1: "y", 2: "z"}) if base == "sequence" else CONFIG
    tensors = {row.name: Tensor.of(np.zeros(row.shape, np.float32)) for row in parameter_table(config, base)}
    save_pretrained(tmp_path / "base", config, base, tensors, architecture="GPT2Model")
    with open_source(tmp_path / "base") as opened:
        again = adapted(opened, classifier(tmp_path / "adapter"))
        assert (again.head.value, again.config.num_labels, again.config.id2label) == ("sequence", 3, NAMES)
        assert again.config.to_dict()["label2id"] == {"bad": 0, "good": 1, "so-so": 2}
        unnamed = adapted(opened, classifier(tmp_path / "adapter", None)).config
        assert unnamed.id2label == config.id2label


@pytest.mark.parametrize(
    ("said", "words"), [("{", "cannot be read"), ("[]", "cannot be read"), ('{"0": "bad"}', "classes [0], expected 0")]
)
def test_names_of_classes_that_do_not_fit_are_reported(tmp_path, said, words):
    file = classifier(tmp_path) / "adapter_model.safetensors"
    with safetensors.read(file) as read:
        tensors = {name: Tensor.of(np.array(tensor.array())) for name, tensor in read.items()}
    safetensors.write(file, tensors, metadata={"id2label": said})
    with pytest.raises(CheckpointError) as error:
        read_adapter(tmp_path)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, "holds no adapter_config.json"),
        ("{}", "is of None, not of plain LoRA"),
        ("[]", "cannot be used"),
        ('{"peft_type": "LORA"}', "cannot be used ('r')"),
        ('{"r": 0, "lora_alpha": 1, "target_modules": [], "peft_type": "LORA"}', "cannot be used (r=0"),
        ('{"r": 1, "lora_alpha": 1, "target_modules": [], "peft_type": "LORA", "bias": "all"}', "bias='all'"),
        ('{"r": 1, "lora_alpha": 1, "target_modules": [], "peft_type": "LORA", "init_lora_weights": "pissa"}', "pissa"),
        ('{"r": 1, "lora_alpha": 1, "target_modules": [], "peft_type": "IA3"}', "not of plain LoRA"),
        ('{"r": 1, "lora_alpha": 1, "target_modules": [], "peft_type": "LORA", "use_dora": true}', "not of plain LoRA"),
        (
            '{"r": 1, "lora_alpha": 1, "target_modules": [], "peft_type": "LORA", "modules_to_save": ["wte"]}',
            "modules_to_save=['wte']",
        ),
    ],
)
def test_an_adapter_that_cannot_be_read_is_reported(tmp_path, settings, words):
    if settings is not None:
        (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(CheckpointError) as error:
        read_adapter(tmp_path)
    assert words in str(error.value)


def saved(folder, lora=None, config=CONFIG, head="lm", **changes):
    """An adapter on disk, with some of its arrays changed; None leaves one out."""
    lora = lora or Lora(2, 4.0, ("attn.c_attn",))
    arrays = {row.name: np.ones(row.shape, np.float32) for row in adapter_table(config, head, lora)} | changes
    folder.mkdir(exist_ok=True)
    write_adapter(folder, lora, {name: Tensor.of(each) for name, each in arrays.items() if each is not None}, "gpt2")
    return read_adapter(folder)


def test_an_adapter_of_a_model_without_a_head_fits_the_model_with_one_and_back(tmp_path):
    bare = saved(tmp_path, Lora(2, 4.0, ("h.1.attn.c_attn",)), head="none")
    assert set(bare.arrays) == {"h.1.attn.c_attn.lora_A", "h.1.attn.c_attn.lora_B"}
    headed = fitted(bare, CONFIG, "lm")
    assert set(headed.arrays) == {"transformer.h.1.attn.c_attn.lora_A", "transformer.h.1.attn.c_attn.lora_B"}
    assert set(fitted(headed, CONFIG, "none").arrays) == set(bare.arrays)


@pytest.mark.parametrize(
    ("changes", "config", "words"),
    [
        (
            {"transformer.h.0.attn.c_attn.lora_B": np.ones((8, 2), np.float32)},
            {},
            "(8, 2) in the file, expected (24, 2)",
        ),
        ({"transformer.h.0.attn.c_attn.lora_B": None}, {}, "missing (1)"),
        ({"model.layers.0.q_proj.lora_A": np.ones((2, 8), np.float32)}, {}, "unexpected (1)"),
        ({"score.weight": np.ones((2, 8), np.float32)}, {}, "unexpected (1)"),
        ({}, {"n_layer": 1}, "unexpected (2)"),
        ({}, {"n_layer": 3}, "missing (2)"),
        ({}, {"n_embd": 16}, "misshaped (4)"),
    ],
)
def test_an_adapter_of_another_model_is_refused_with_all_that_does_not_fit(tmp_path, changes, config, words):
    with pytest.raises(CheckpointMismatchError) as error:
        fitted(saved(tmp_path, **changes), CONFIG.replace(**config), "lm")
    assert words in str(error.value)
    assert "of rank 2, trained beside gpt2" in str(error.value)


def test_an_adapter_of_another_family_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("attn.c_attn", "q_proj"))
    with pytest.raises(CheckpointMismatchError, match=r"unexpected \(4\)"):
        fitted(read_adapter(tmp_path), CONFIG, "lm")


def test_the_state_of_a_run_keeps_the_names_of_its_classes(tmp_path):
    lora = Lora(2, 4.0, ("attn.c_attn",))
    tensors = {row.name: Tensor.of(np.ones(row.shape, np.float32)) for row in adapter_table(THREE, "sequence", lora)}
    about = About(THREE.replace(id2label=NAMES), "GPT2ForSequenceClassification", lora, "gpt2")
    folder = save_state(tmp_path, Progress(step=1), {"adapter": tensors, "exp_avg": tensors}, about, {})
    assert read_adapter(folder).labels == NAMES
