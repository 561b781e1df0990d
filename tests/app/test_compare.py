"""`gpt2 compare` finds what differs, names it, and says so with its exit code."""

from __future__ import annotations

import importlib
import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from app_process import Run, child, environment

from gpt2_app import backends, compare, main, running
from gpt2_core.checkpoints import Tensor, configs
from gpt2_core.comparison import AXES, Key, Report, named, rounded
from gpt2_core.config import GPT2Config
from gpt2_core.parameters import Head
from gpt2_core.pretrained import save_pretrained
from gpt2_core.reference import ReferenceModel
from models import HEADS, ordinary_parameters, random_ids, small_config
from tolerances import REFERENCE

CONFIG = small_config(n_positions=24)
KERNEL = "transformer.h.1.attn.c_proj.weight"
NUMPY = ("--framework", "numpy", "--against", "numpy")
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not here")


def has(framework: str) -> bool:
    """Whether a framework and its package can run models here."""
    if framework not in backends.BACKENDS or not backends.BACKENDS[framework].is_installed():
        return False
    return framework != "tf" or hasattr(importlib.import_module("gpt2_tf"), "TFGPT2LMHeadModel")


needs_torch = pytest.mark.skipif(not has("pt"), reason="PyTorch is not here")
FRAMEWORKS = [pytest.param(name, marks=pytest.mark.skipif(not has(name), reason="not here")) for name in ("pt", "tf")]


def save(
    folder: Path, config: GPT2Config = CONFIG, head: str = "lm", dtype: str = "float32", seed: int = 0, **changes: Any
) -> str:
    """A small model on disk; ``changes`` replace parameters (dots written as two underscores)."""
    values = ordinary_parameters(config, head, seed)
    values |= {name.replace("__", "."): value for name, value in changes.items()}
    stored = {name: Tensor.of(rounded(value, dtype)) for name, value in values.items()}
    save_pretrained(folder, config, Head(head), stored, architecture="GPT2LMHeadModel")
    return str(folder)


@pytest.fixture
def one(tmp_path: Path) -> str:
    return save(tmp_path / "one")


@pytest.fixture
def compared(gpt2: Run) -> Run:
    """The command with ``--json``: its report and its exit code."""

    def run(*arguments: object) -> tuple[Report, int]:
        result = gpt2("compare", *arguments, "--json")
        assert result.exit_code in (0, 1), result.stderr
        return Report.from_json(json.loads(result.stdout)), result.exit_code

    return run


# -- the same ------------------------------------------------------------------------------------------------


def test_a_checkpoint_and_its_copy_are_identical_and_exit_code_0(compared: Run, one: str, tmp_path: Path) -> None:
    report, code = compared(one, save(tmp_path / "two"), *NUMPY)
    assert (report.verdict, code) == ("identical", 0)
    assert (report.read, report.bound, report.notes) == ((1, 24), "float32", ())
    assert (report.a.source, report.a.framework, report.a.dtype) == (one, "numpy", "float32")


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", list(REFERENCE))
def test_a_framework_matches_the_reference_in_every_number_format(
    compared: Run, one: str, framework: str, dtype: str
) -> None:
    report, code = compared(one, "--framework", framework, "--against", "numpy", "--dtype", dtype, "--rows", 2)
    assert (report.verdict, code) == ("match", 0)
    assert report.parameters.identical
    assert report.bound == dtype
    assert {each.kind for each in report.outputs.differences} == {
        "loss", "logits", "past.key", "past.value", "hidden_states", "attentions",
    }  # fmt: skip
    # Computed in that format, and not in a finer one.
    assert report.outputs.worst.error > {"float64": 0, "float32": 1e-9, "float16": 1e-5, "bfloat16": 1e-4}[dtype]


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_run_with_all_that_it_returns(compared: Run, tmp_path: Path, framework: str, head: str) -> None:
    folder = save(tmp_path / head, CONFIG.replace(num_labels=3), head)
    report, code = compared(
        folder, "--framework", framework, "--against", "numpy", "--dtype", "float64", "--head", head, "--rows", 2
    )
    assert (report.verdict, code) == ("match", 0)
    kinds = set(report.outputs.by_kind())
    assert {"past.key", "hidden_states", "attentions"} <= kinds
    assert ("loss" in kinds) == (head != "none")
    assert {each.kind for each in report.outputs.differences if each.shape and not each.axes} == set()
    assert kinds - {kind for kind, _ in AXES} <= {"loss", "lm_loss", "mc_loss"}


@pytest.mark.skipif(not (has("pt") and has("tf")), reason="both frameworks are needed")
@pytest.mark.parametrize(("dtype", "head"), [("float64", "lm"), ("float32", "lm"), ("float64", "double")])
def test_both_frameworks_agree_in_gradients_too(compared: Run, tmp_path: Path, dtype: str, head: str) -> None:
    folder = save(tmp_path / "model", head=head)
    report, code = compared(
        folder, "--framework", "pt", "--against", "tf", "--gradients", "--dtype", dtype, "--head", head
    )
    assert (report.verdict, code) == ("match", 0)
    assert len(report.gradients.differences) == len(report.parameters.differences)


# -- not the same --------------------------------------------------------------------------------------------


def test_one_flipped_bit_of_one_weight_is_found_named_and_exit_code_1(gpt2: Run, compared: Run, one: str, tmp_path):
    file = Path(one) / "model.safetensors"
    data = bytearray(file.read_bytes())
    (start,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + start])
    data[8 + start + header[KERNEL]["data_offsets"][0] + 4 * (8 * 2 + 5)] ^= 1  # the lowest bit of [2, 5]
    other = Path(save(tmp_path / "two"))
    (other / "model.safetensors").write_bytes(data)
    report, code = compared(one, other, *NUMPY)
    assert (report.verdict, code) == ("mismatch", 1)
    found = [each for each in report.parameters.differences if not each.identical]
    assert [(each.name, each.where, each.differing) for each in found] == [(KERNEL, (2, 5), 1)]
    assert report.outputs.matches  # too little to be seen in what the model says
    shown = gpt2("compare", one, other, *NUMPY)
    assert shown.exit_code == 1
    flat = " ".join(shown.stdout.split())
    assert "Parameters: 28 compared, 1 not bit-identical" in flat
    assert f"MISMATCH: 1 of 28 parameters not the same, the worst {KERNEL}[2, 5]" in flat


def test_a_transposed_square_kernel_is_caught(compared: Run, one: str, tmp_path: Path) -> None:
    turned = ordinary_parameters(CONFIG, "lm")[KERNEL].T
    report, code = compared(one, save(tmp_path / "two", transformer__h__1__attn__c_proj__weight=turned), *NUMPY)
    assert code == 1
    assert report.parameters.worst.name == KERNEL
    assert report.outputs.worst.ratio > 1000


@pytest.mark.parametrize("framework", [pytest.param("pt", marks=needs_torch), "numpy"])
def test_a_wrong_gelu_is_caught_at_the_published_tolerance(
    gpt2: Run, compared: Run, one: str, tmp_path: Path, framework: str
) -> None:
    other = save(tmp_path / "two", CONFIG.replace(activation_function="gelu"))
    arguments = (one, other, "--framework", framework)
    report, code = compared(*arguments)
    assert (report.verdict, code) == ("mismatch", 1)
    assert report.parameters.identical
    assert report.outputs.worst.tolerance == REFERENCE["float32"].values
    shown = " ".join(gpt2("compare", *arguments).stdout.split())
    assert "activation_function: gelu_new in A, gelu in B" in shown
    assert "all bit-identical" in shown


def test_models_of_unlike_depth_are_told_apart_in_full(gpt2: Run, compared: Run, one: str, tmp_path: Path) -> None:
    deeper = save(tmp_path / "deeper", CONFIG.replace(n_layer=3))
    report, code = compared(one, deeper, *NUMPY)
    assert code == 1
    assert report.config == (("n_layer", 2, 3),)
    assert len(report.parameters.only_in_b) == 12
    shown = " ".join(gpt2("compare", one, deeper, *NUMPY).stdout.split())
    for text in (
        "n_layer: 2 in A, 3 in B",
        "only in B (12): transformer.h.2.ln_1.weight",
        "... and 4 more",
        "12 parameters without a counterpart",
        "4 outputs without a counterpart",
    ):
        assert text in shown


def test_unlike_vocabularies_are_said_clearly(gpt2: Run, compared: Run, one: str, tmp_path: Path, tiny: str) -> None:
    more = save(tmp_path / "more", CONFIG.replace(vocab_size=40))
    report, code = compared(one, more, *NUMPY)
    assert code == 1
    assert report.notes == ("the vocabularies are unlike: 37 tokens in A, 40 in B",)
    assert report.parameters.misshaped == (("transformer.wte.weight", (37, 8), (40, 8)),)
    assert "transformer.wte.weight: 37 x 8 in A, 40 x 8 in B" in gpt2("compare", one, more, *NUMPY).stdout
    # A text that one of the two cannot even read: parameters are compared, and nothing is run.
    report, code = compared(tiny, one, *NUMPY, "--text", "Hello world", "--tokenizer", "gpt2")
    assert code == 1
    assert report.outputs is None
    assert "the vocabulary of B ends at 36" in report.notes[1]


def test_vocabularies_of_one_size_that_read_otherwise_are_said(
    compared: Run, tiny: str, tmp_path: Path, monkeypatch
) -> None:
    from gpt2_core.tokenizer import GPT2Tokenizer

    other = Path(tmp_path / "other")
    subprocess.run(["cp", "-r", tiny, str(other)], check=True)
    GPT2Tokenizer(add_prefix_space=True).save_pretrained(other)
    report, code = compared(tiny, other, *NUMPY, "--text", "Hello world", "--tokenizer", "gpt2")
    assert (report.verdict, code) == ("identical", 0)
    assert "both were given the ids of gpt2" in report.notes[0]


def test_files_of_unlike_number_formats_are_held_to_the_coarser(compared: Run, one: str, tmp_path: Path) -> None:
    half = save(tmp_path / "half", dtype="float16")
    report, code = compared(one, half, *NUMPY)
    assert code == 0
    assert report.parameters.identical
    assert report.bound == "float16"
    assert "float32 in A, float16 in B" in report.notes[0]
    assert compared(one, half, *NUMPY, "--tolerance", "1e-9")[1] == 1


@needs_torch
def test_gradients_of_two_checkpoints_are_compared(gpt2: Run, compared: Run, one: str, tmp_path: Path) -> None:
    arguments = (one, save(tmp_path / "two", seed=1), "--framework", "pt", "--gradients")
    report, code = compared(*arguments)
    assert code == 1
    assert len(report.gradients.differences) == 28
    assert report.gradients.worst.ratio > 100
    assert "Gradients: 28 compared" in gpt2("compare", *arguments).stdout
    assert compared(one, one, "--framework", "pt", "--gradients")[0].verdict == "identical"


# -- heads -------------------------------------------------------------------------------------------------------

KINDS = {
    "none": "last_hidden_state", "lm": "logits", "double": "mc_logits", "sequence": "logits", "token": "logits",
    "qa": "start_logits",
}  # fmt: skip
ARCHITECTURES = {head.value: name for name, head in configs.ARCHITECTURES.items()}
OF_HEADS = {
    "lm": "lm_head.weight", "double": "multiple_choice_head.summary.bias", "sequence": "score.weight",
    "token": "classifier.bias", "qa": "qa_outputs.weight",
}  # fmt: skip
CLASSES = CONFIG.replace(num_labels=3)
UNTIED = CLASSES.replace(tie_word_embeddings=False)


def headed(folder: Path, head: str, config: GPT2Config = UNTIED, changed: str = "", dtype: str = "float32") -> str:
    """A model on disk as its class saves it; 1 is added to the parameter ``changed``."""
    values = ordinary_parameters(config, head)
    if changed:
        values[changed] = values[changed] + 1
    stored = {name: Tensor.of(rounded(value, dtype)) for name, value in values.items()}
    save_pretrained(folder, config, Head(head), stored, architecture=ARCHITECTURES[head])
    return str(folder)


@pytest.mark.parametrize("framework", [*FRAMEWORKS, "numpy"])
@pytest.mark.parametrize("head", list(OF_HEADS))
def test_a_changed_head_is_found_in_its_parameter_and_in_what_it_returns(
    compared: Run, tmp_path: Path, head: str, framework: str
) -> None:
    one, name = headed(tmp_path / "one", head), OF_HEADS[head]
    other = headed(tmp_path / "other", head, changed=name)
    gradients = () if framework == "numpy" else ("--gradients",)
    report, code = compared(one, other, "--framework", framework, *gradients)
    assert (report.verdict, code, report.left_out) == ("mismatch", 1, ())
    assert (report.a.head, report.b.head) == (head, head)
    assert [each.name for each in report.parameters.differences if not each.identical] == [name]
    assert len(report.parameters.differences) == len(ordinary_parameters(UNTIED, head))
    beyond = {each.kind for each in report.outputs.differences if not each.within}
    assert KINDS[head] in beyond and "hidden_states" not in beyond
    if gradients:
        assert name in {each.name for each in report.gradients.differences}
    report, code = compared(one, one, "--framework", framework, *gradients)
    assert (report.verdict, code, report.left_out) == ("identical", 0, ())


@pytest.mark.skipif(not (has("pt") and has("tf")), reason="both frameworks are needed")
@pytest.mark.parametrize("head", list(KINDS))
def test_a_checkpoint_of_any_head_is_compared_as_what_it_is_in_both_frameworks(
    compared: Run, tmp_path: Path, head: str
) -> None:
    gradients = () if head == "none" else ("--gradients",)
    report, code = compared(headed(tmp_path / head, head), "--framework", "pt", "--against", "tf", *gradients)
    assert (report.verdict, code, report.left_out, report.notes) == ("match", 0, (), ())
    assert (report.a.head, report.b.head) == (head, head)
    kinds = set(report.outputs.by_kind())
    assert {KINDS[head], "past.key", "attentions"} <= kinds and ("loss" in kinds) == (head != "none")
    assert len(report.parameters.differences) == len(ordinary_parameters(UNTIED, head))


def test_models_of_unlike_heads_are_told_and_what_both_have_is_compared(
    gpt2: Run, compared: Run, tmp_path: Path
) -> None:
    one = headed(tmp_path / "one", "sequence")
    for head, names in (("token", ("classifier.weight", "classifier.bias")), ("lm", ("lm_head.weight",))):
        other = headed(tmp_path / head, head)
        report, code = compared(one, other, *NUMPY)
        assert (report.verdict, code) == ("mismatch", 1)
        assert (report.parameters.only_in_a, report.parameters.only_in_b) == (("score.weight",), names)
        assert len(report.parameters.differences) == 28 and report.parameters.differences[0].identical
        kinds = {"last_hidden_state", "hidden_states", "past.key", "past.value", "attentions"}
        assert set(report.outputs.by_kind()) == kinds
        assert report.left_out == (
            "what the head (sequence) returns of A",
            f"what the head ({head}) returns of B",
        )
        assert "the heads are unlike: sequence classification in A" in report.notes[0]
    shown = " ".join(gpt2("compare", one, other, *NUMPY).stdout.split())
    for text in ("sequence classification in A, language model in B", "only in A (1): score.weight", "LEFT OUT:"):
        assert text in shown
    assert report.b.numbers == sum(value.size for value in ordinary_parameters(UNTIED, "lm").values())


def test_a_language_model_and_double_heads_are_compared_as_language_models(compared: Run, tmp_path: Path) -> None:
    one, other = headed(tmp_path / "one", "lm"), headed(tmp_path / "two", "double")
    report, code = compared(one, other, *NUMPY)
    assert (report.a.head, code) == ("lm", 1)
    assert "logits" in report.outputs.by_kind()
    assert [name.rpartition(".")[2] for name in report.parameters.only_in_b] == ["weight", "bias"]
    assert "lm_head.weight" in {each.name for each in report.parameters.differences}


def test_nothing_is_called_identical_without_what_was_left_out(gpt2: Run, compared: Run, tmp_path: Path) -> None:
    one = headed(tmp_path / "one", "sequence", CLASSES)
    other = headed(tmp_path / "other", "sequence", CLASSES, changed="score.weight")
    report, code = compared(one, other, *NUMPY, "--head", "lm")
    assert (report.verdict, code) == ("identical", 0)
    assert report.left_out == ("score.weight of both", "what the head (sequence) returns of both")
    shown = " ".join(gpt2("compare", one, other, *NUMPY, "--head", "lm").stdout.split())
    assert "IDENTICAL: every number that was compared has the same bits; LEFT OUT: score.weight of both" in shown
    # A tied language model has no parameters of its own, and the bare transformer none that it lacks.
    bare = ordinary_parameters(CONFIG, "none")
    whole = {f"transformer.{name}": value for name, value in bare.items()}
    for name, values in (("none", bare), ("lm", whole)):
        stored = {each: Tensor.of(rounded(value, "float32")) for each, value in values.items()}
        save_pretrained(tmp_path / name, CONFIG, Head(name), stored, architecture=ARCHITECTURES[name])
    report, code = compared(tmp_path / "none", tmp_path / "lm", *NUMPY)
    assert (report.verdict, report.left_out) == ("identical", ("what the head (lm) returns of B",))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_unlike_numbers_of_classes_are_told_and_have_no_loss(compared: Run, tmp_path: Path, framework: str) -> None:
    for head in ("sequence", "token"):
        one = headed(tmp_path / f"{head}3", head)
        other = headed(tmp_path / f"{head}2", head, UNTIED.replace(num_labels=2))
        report, code = compared(one, other, "--framework", framework, "--rows", 3)
        assert code == 1
        assert [name for name, *_ in report.outputs.misshaped] == ["logits"]
        assert "the classes are unlike" in report.notes[0] and "loss" not in report.outputs.by_kind()


@needs_torch
def test_gradients_of_unlike_heads_are_refused(gpt2: Run, tmp_path: Path) -> None:
    one, other = headed(tmp_path / "one", "sequence"), headed(tmp_path / "two", "qa")
    result = gpt2("compare", one, other, "--framework", "pt", "--gradients")
    assert result.exit_code == 2
    assert "no loss in common" in " ".join(result.stderr.split())


def test_a_head_that_a_file_does_not_hold_is_said_to_be_begun_anew(compared: Run, one: str) -> None:
    report, _ = compared(one, one, *NUMPY, "--head", "qa")
    assert "the file of A has no qa_outputs.weight, qa_outputs.bias: begun anew" in report.notes[0]


def test_heads_stored_in_unlike_number_formats_are_held_to_the_coarser(compared: Run, tmp_path: Path) -> None:
    one, other = headed(tmp_path / "one", "lm"), headed(tmp_path / "other", "double", dtype="float16")
    report, _ = compared(one, other, *NUMPY)
    assert all(each.identical for each in report.parameters.differences)


# -- the input -----------------------------------------------------------------------------------------------


def test_the_fixed_passage_is_the_same_every_time_and_fits_any_vocabulary() -> None:
    ids = compare._passage(50257, 2, 600)
    assert ids.shape == (2, 600)
    assert np.array_equal(ids.reshape(-1)[:100], compare._passage(50257, 1, 100)[0])
    assert len(set(ids.reshape(-1).tolist())) > 100
    assert compare._passage(37, 1, 50).max() < 37
    from gpt2_core.tokenizer import GPT2Tokenizer

    assert compare.PASSAGE.startswith(GPT2Tokenizer().decode(compare._passage(50257, 1, 20)[0]))


def test_a_text_is_read_with_as_vocabulary_from_the_option_a_file_or_standard_input(
    gpt2: Run, compared: Run, tiny: str, tmp_path: Path
) -> None:
    words = "one two three four five six seven eight nine ten"
    file = tmp_path / "text"
    file.write_text(words)
    common = (tiny, tiny, *NUMPY, "--tokenizer", "gpt2")
    report, _ = compared(*common, "--text", words)
    assert (report.read, report.notes) == ((1, 10), ())
    assert compared(*common, "--file", file)[0] == report
    piped = gpt2("compare", *common, "--file", "-", "--json", input=words.encode())
    assert Report.from_json(json.loads(piped.stdout)) == report
    report, _ = compared(*common, "--text", words, "--rows", 2, "--length", 4)
    assert report.read == (2, 4)
    assert report.notes == ("of the text's 10 tokens the first 8 were read",)


def test_rows_are_the_text_in_order_from_its_beginning(gpt2: Run, tiny: str, monkeypatch) -> None:
    from gpt2_core.tokenizer import GPT2Tokenizer

    given = []
    taken = running.inputs_of
    monkeypatch.setattr(running, "inputs_of", lambda config, head, ids: given.append(ids) or taken(config, head, ids))
    text = "one two three four five six seven"
    gpt2("compare", tiny, tiny, *NUMPY, "--tokenizer", "gpt2", "--text", text, "--rows", 2, "--length", 3)
    assert given[0].reshape(-1).tolist() == GPT2Tokenizer().encode(text)[:6]


@pytest.mark.parametrize("dtype", list(REFERENCE))
def test_the_reference_computes_in_float64_on_weights_rounded_to_the_format(one: str, tmp_path: Path, dtype: str):
    stored = {name: rounded(value, "float32") for name, value in ordinary_parameters(CONFIG, "lm").items()}
    ids = random_ids(CONFIG, 1, 9)
    expected = ReferenceModel(CONFIG, {name: rounded(value, dtype) for name, value in stored.items()})(ids)
    found = running.run("numpy", running.look(one, Head.LM), dtype, {"input_ids": ids}, tmp_path / "shelf")
    assert np.array_equal(found.outputs[Key("logits")], expected.logits)
    assert np.array_equal(found.parameters[KERNEL], rounded(stored[KERNEL], dtype))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("T", [1, 2, 7])
def test_every_head_is_given_labels_that_it_can_take(head: str, T: int) -> None:
    for changes in ({}, {"num_labels": 1}, {"problem_type": "multi_label_classification"}):
        config = small_config(**changes)
        inputs = running.inputs_of(config, Head(head), random_ids(config, 3, T))
        out = ReferenceModel(config, ordinary_parameters(config, head), head)(**inputs)
        # A single token has no next one for a language model to be scored on; its choices still can be.
        assert ("loss" in out) == (head != "none" and (head != "lm" or T > 1))
        assert "loss" not in out or np.isfinite(out.loss)


# -- what comes out ------------------------------------------------------------------------------------------


def test_the_report_is_written_to_a_file_whole(gpt2: Run, compared: Run, one: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    assert gpt2("compare", one, one, *NUMPY, "--output", file).exit_code == 0
    assert Report.from_json(json.loads(file.read_text())) == compared(one, one, *NUMPY)[0]
    assert gpt2("compare", one, one, *NUMPY, "--output", tmp_path / "no" / "folder").exit_code == 5


@pytest.mark.parametrize("width", [60, 80, 200])
def test_people_are_shown_tables_that_fit_any_width(gpt2: Run, one: str, tmp_path: Path, width: int, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = gpt2("compare", one, save(tmp_path / "two", seed=1), *NUMPY).stdout
    assert all(len(line) <= width for line in shown.splitlines() if str(tmp_path) not in line)
    flat = " ".join(shown.split())
    for text in ("Outputs, held to the tolerances of float32", "hidden_states", "MISMATCH: 28 of 28 parameters"):
        assert text in flat
    assert ("output absolute relative error ratio worst at" in flat) == (width >= 80)
    assert ("output error ratio worst at" in flat) == (width < 80)


@needs_matplotlib
@pytest.mark.parametrize("kind", ["identical", "mismatch", "infinite", "long"])
def test_a_heat_map_is_drawn_for_any_comparison(gpt2: Run, tmp_path: Path, kind: str) -> None:
    config = small_config(n_positions=1100) if kind == "long" else CONFIG
    table = ordinary_parameters(config, "lm")["transformer.wpe.weight"]
    table[5] = np.inf if kind == "infinite" else 0.5
    a = save(tmp_path / "a", config)
    b = a if kind == "identical" else save(tmp_path / "b", config, transformer__wpe__weight=table)
    picture = tmp_path / "picture.png"
    result = gpt2("compare", a, b, *NUMPY, "--heatmap", picture, "--length", 1100 if kind == "long" else 24)
    assert result.exit_code == (0 if kind == "identical" else 1)
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000 and height > 400


@needs_matplotlib
def test_the_heat_map_shows_each_error_at_its_token_and_layer(one: str, compared: Run, tmp_path: Path) -> None:
    from gpt2_app.heatmap import _figure, _pooled

    table = ordinary_parameters(CONFIG, "lm")["transformer.wpe.weight"]
    table[5] += 0.5
    report, _ = compared(save(tmp_path / "two", transformer__wpe__weight=table), one, *NUMPY)
    figure = _figure(report)
    states = np.ma.getdata(figure.axes[0].images[0].get_array())
    assert states.shape == (3, 24)
    assert np.flatnonzero(states[0]).tolist() == [5]  # the embeddings: that position alone
    assert np.flatnonzero(states[1])[0] == 5  # then whatever sees it
    assert [axes.get_xlabel() for axes in figure.axes[:-1]][-1] == "token position"
    assert "error" in figure.axes[-1].get_ylabel()
    assert figure.axes[-1].get_yscale() == "log"
    wide = np.zeros((2, 1100))
    wide[1, 1099] = 3.0
    assert _pooled(wide).shape[1] <= 512
    assert _pooled(wide)[1, -1] == 3.0


def test_without_matplotlib_the_extra_is_named_before_anything_is_run(gpt2: Run, monkeypatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else found(name))
    result = gpt2("compare", "no-such-model", "--framework", "numpy", "--against", "numpy", "--heatmap", "a.png", "x")
    assert result.exit_code == 2
    assert "pip install 'gpt2-duet[plots]'" in result.stderr


# -- exit codes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "numpy"], "one and the same"),
        (["B", "--framework", "jax"], "is not known"),
        (["B", "--dtype", "float8"], "dtype is 'float8'"),
        (["B", "--gradients"], "computes no gradients"),
        (["B", "--head", "tail"], "expected one of none, lm"),
        (["B", "--text", "a", "--file", "b"], "got both"),
        (["B", "--length", "25"], "--length is 25"),
        (["B", "--length", "0"], "length"),
        (["B", "--text", "", "--tokenizer", "gpt2"], "0 tokens"),
        (["B", "--text", "one two", "--tokenizer", "gpt2", "--rows", "3"], "2 tokens"),
    ],
)
def test_what_cannot_be_compared_is_exit_code_2(gpt2: Run, one: str, arguments: list[str], message: str) -> None:
    given = [one if each == "B" else each for each in arguments]
    framework = [] if "--framework" in given else ["--framework", "numpy"]
    result = gpt2("compare", one, *given, *framework)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_gradients_of_the_reference_are_refused_before_anything_is_loaded(gpt2: Run) -> None:
    assert gpt2("compare", "nobody/nothing", "nobody/something", *NUMPY, "--gradients").exit_code == 2


@needs_torch
def test_gradients_without_a_loss_are_refused(gpt2: Run, one: str) -> None:
    for more in (["--head", "none"], ["--length", "1"]):
        result = gpt2("compare", one, one, "--framework", "pt", "--gradients", *more)
        assert result.exit_code == 2
        assert "has none" in result.stderr


def test_a_checkpoint_that_cannot_be_read_is_exit_code_3_on_either_side(gpt2: Run, one: str, tmp_path: Path) -> None:
    broken = Path(save(tmp_path / "broken"))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert gpt2("compare", broken, one, *NUMPY).exit_code == 3
    assert gpt2("compare", one, broken, *NUMPY).exit_code == 3
    result = gpt2("compare", one, broken, *NUMPY, "--json")
    assert json.loads(result.stdout)["error"]["type"] == "CheckpointFormatError"
    # It fits no language model: the head that this file is for is another.
    unfit = save(tmp_path / "unfit", CONFIG.replace(n_layer=1))
    (Path(unfit) / "config.json").write_text(CONFIG.to_json_string())
    assert gpt2("compare", one, unfit, *NUMPY).exit_code == 3


def test_a_name_that_is_not_found_is_exit_code_6(gpt2: Run, one: str) -> None:
    assert gpt2("compare", one, "nobody/nothing", *NUMPY).exit_code == 6


def test_a_bug_is_not_taken_for_a_difference(monkeypatch, capsys, one: str) -> None:
    monkeypatch.setattr(running, "look", lambda *_: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["gpt2", "compare", one, one, *NUMPY])
    with pytest.raises(SystemExit) as leaving:
        main.main()
    assert leaving.value.code == main.BUG == 70
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_library_errors_keep_their_codes_under_debug(one: str) -> None:
    done = child("--debug", "compare", one, "nobody/nothing", *NUMPY)
    assert done.returncode == 6
    assert b"Traceback" in done.stderr


# -- memory --------------------------------------------------------------------------------------------------


def test_large_arrays_go_to_the_disk_and_come_back_as_they_were(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(running, "_KEPT", 100)
    shelf: running.Shelf[Key] = running.Shelf(tmp_path / "shelf")
    small, large = np.arange(3.0), np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    shelf.put(Key("loss"), small)
    shelf.put(Key("past.key", 2), large)
    small[0] = 9
    assert list(shelf) == [Key("loss"), Key("past.key", 2)]
    assert shelf[Key("loss")].tolist() == [0, 1, 2]
    assert isinstance(shelf[Key("past.key", 2)], np.memmap)
    assert np.array_equal(shelf[Key("past.key", 2)], large)
    assert len(list((tmp_path / "shelf").iterdir())) == 1


def test_nothing_is_left_on_the_disk(one: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(running, "_KEPT", 0)
    space = tmp_path / "space"
    space.mkdir()
    done = child("compare", one, one, *NUMPY, TMPDIR=str(space))
    assert done.returncode == 0
    assert list(space.iterdir()) == []


def test_help_loads_no_framework_and_no_numpy() -> None:
    program = (
        "import sys\nfrom gpt2_app.cli import app\n"
        "try:\n    app(['compare', '--help'])\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'tensorflow', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment(), check=True)
    assert done.stdout.rstrip().endswith(b"set()")


def test_outputs_are_named_as_they_are_written() -> None:
    model = ReferenceModel(CONFIG, ordinary_parameters(CONFIG, "lm"))
    out = model(random_ids(CONFIG, 1, 3), output_attentions=True)
    assert [str(key) for key, _ in named(out)] == [
        "logits", "past[0].key", "past[0].value", "past[1].key", "past[1].value", "attentions[0]", "attentions[1]",
    ]  # fmt: skip
