"""gpt2_core.checkpoints.kerashub: presets as KerasHub writes and loads them, without it.

tests/peers/keras_hub holds what KerasHub 0.32 wrote and computed. The tests at the end ask it again where the
environment variable GPT2_DUET_KERAS_HUB names the Python of an environment that has it; see tests/peers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import About, Checkpoint, Tensor, detect, kerashub, open_checkpoint, save_checkpoint
from gpt2_core.checkpoints.configs import config_of
from gpt2_core.checkpoints.tensors import converted
from gpt2_core.checkpoints.tokenizers import gpt2_parts, parts_of
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.errors import (
    CannotHoldError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    Gpt2Error,
    TokenizerError,
    UnsafeCheckpointError,
)
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.pretrained import open_pretrained
from gpt2_core.reference import ReferenceModel
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_core.tokenizer_files import AddedToken, TokenizerParts
from gpt2_core.vocabulary import BYTE_TO_CHAR, ENDOFTEXT
from models import random_ids, random_parameters, small_config
from tolerances import TRANSFORMERS, error

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402 (after importorskip)
from hypothesis import strategies as st  # noqa: E402

bounded = settings(max_examples=150, deadline=None, derandomize=True, database=None)
PEERS = Path(__file__).parent.parent / "peers"
CASES = sorted(path.stem for path in (PEERS / "keras_hub").glob("*.zip"))
CONFIG = small_config(n_inner=7)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def unpack(case: str, folder: Path) -> Path:
    """The folder that KerasHub saved, and its answers."""
    with zipfile.ZipFile(PEERS / "keras_hub" / f"{case}.zip") as archive:
        archive.extractall(folder)
    return folder


def tensors_of(config: GPT2Config, head: str = "lm", dtype: str = "float32", seed: int = 0) -> dict[str, Tensor]:
    values = random_parameters(config, head, seed)
    return {name: converted(Tensor.of(value.astype(np.float32)), dtype) for name, value in values.items()}


def written(
    folder: Path,
    config: GPT2Config = CONFIG,
    head: str = "lm",
    dtype: str = "float32",
    tokenizer: TokenizerParts | None = None,
    most: int | None = None,
) -> Path:
    about = About(config, Head(head), tokenizer)
    kerashub.write(folder, tensors_of(config, head, dtype), about=about, max_shard_bytes=most)
    return folder


def assert_same(opened: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    assert sorted(name.removeprefix("transformer.") for name in opened) == sorted(
        name.removeprefix("transformer.") for name in expected
    )
    for name, tensor in expected.items():
        found = opened["transformer." + name.removeprefix("transformer.")]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert found.raw().tobytes() == tensor.raw().tobytes(), name


def arrays_in(folder: Path) -> dict[str, Any]:
    """Every array of the files of a preset, by its path, as h5py reads it."""
    h5py = pytest.importorskip("h5py")
    found: dict[str, Any] = {}

    def add(name: str, each: Any) -> None:
        if hasattr(each, "shape"):
            found[name] = each[()].view(np.uint16) if each.dtype.kind == "V" else each[()]

    for path in sorted(folder.glob("*.h5")):
        with h5py.File(path) as file:
            file.visititems(add)
    return found


def tiny_parts(*added: AddedToken, **settings: Any) -> TokenizerParts:
    ids = {char: index for index, char in enumerate(BYTE_TO_CHAR.values())} | {ENDOFTEXT: 256}
    roles = {"bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT, "unk_token": ENDOFTEXT}
    return parts_of(ids, [], source="the test", added=added, settings=roles | settings)


def with_added(*tokens: AddedToken) -> TokenizerParts:
    """GPT-2's tokenizer and more tokens."""
    plain = gpt2_parts()
    return TokenizerParts(plain.vocabulary, [*plain.added, *tokens], plain.settings)


# What KerasHub wrote and computed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_numbers_agree_with_what_kerashub_computed_from_its_own_preset(tmp_path: Path, case: str) -> None:
    folder = unpack(case, tmp_path)
    opened = open_checkpoint(folder)
    is_task = case.startswith("lm")
    assert (opened.format, opened.head) == ("kerashub", "lm" if is_task else "none")
    assert opened.names_in_file.keys() == set(opened) and not opened.ignored
    with np.load(folder / "answers.npz") as answers:
        ids, real = answers["in.token_ids"], answers["in.padding_mask"] != 0
        hidden, logits = answers["out.hidden"], answers["out.last_logits"]
    bare, model = (ReferenceModel.from_pretrained(folder, head) for head in ("none", "lm"))
    if "bfloat16" not in case and "mixed" not in case:  # those computed in fewer bits
        assert error(bare(ids, attention_mask=real).last_hidden_state[real], hidden[real]) <= TRANSFORMERS
        assert error(model(ids[:2]).logits[:, -1], logits[:2]) <= TRANSFORMERS
    assert {tensor.dtype for tensor in opened.values()} == {"bfloat16" if "-bfloat16" in case else "float32"}


@pytest.mark.parametrize("case", CASES)
def test_every_array_is_where_it_belongs(tmp_path: Path, case: str) -> None:
    """Written out by hand, without the table's patterns."""
    folder = unpack(case, tmp_path)
    theirs, opened = arrays_in(folder), open_checkpoint(folder)
    named = [name for names in opened.names_in_file.values() for name in names.split(", ")]
    assert sorted(named) == sorted(theirs)
    for n, block in enumerate(("transformer_decoder", "transformer_decoder_1")):
        attention, ours = f"layers/{block}/_self_attention_layer", f"transformer.h.{n}"
        parts = ("query_dense", "key_dense", "value_dense")
        kernels = [theirs[f"{attention}/{part}/vars/0"] for part in parts]
        assert {kernel.shape for kernel in kernels} == {(6, 2, 3)}
        assert np.array_equal(opened.raw(f"{ours}.attn.c_attn.weight"),
                              np.concatenate([kernel.reshape(6, 6) for kernel in kernels], axis=1))  # fmt: skip
        biases = [theirs[f"{attention}/{part}/vars/1"].reshape(6) for part in parts]
        assert np.array_equal(opened.raw(f"{ours}.attn.c_attn.bias"), np.concatenate(biases))
        behind = theirs[f"{attention}/output_dense/vars/0"]
        assert behind.shape == (2, 3, 6)
        assert np.array_equal(opened.raw(f"{ours}.attn.c_proj.weight"), behind.reshape(6, 6))
        for here, there in (
            ("attn.c_proj.bias", "_self_attention_layer/output_dense/vars/1"),
            ("ln_1.weight", "_self_attention_layer_norm/vars/0"),
            ("ln_2.bias", "_feedforward_layer_norm/vars/1"),
            ("mlp.c_fc.weight", "_feedforward_intermediate_dense/vars/0"),
            ("mlp.c_proj.weight", "_feedforward_output_dense/vars/0"),
        ):
            assert np.array_equal(opened.raw(f"{ours}.{here}"), theirs[f"layers/{block}/{there}"]), here


def test_the_configuration_is_what_kerashub_says_and_what_it_takes_for_granted(tmp_path: Path) -> None:
    config = config_of(open_checkpoint(unpack("lm", tmp_path)), beside=False).config
    assert (config.vocab_size, config.n_positions, config.n_embd, config.n_layer) == (270, 8, 6, 2)
    assert (config.n_head, config.n_inner, config.activation_function) == (2, 7, "gelu_new")
    assert (config.layer_norm_epsilon, config.tie_word_embeddings, dict(config.pruned_heads)) == (1e-5, True, {})
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.2
    assert config.bos_token_id == config.eos_token_id == 264, "as vocabulary.json numbers <|endoftext|>"


def test_policies_are_said_to_be_lost_and_one_format_is_read(tmp_path: Path) -> None:
    opened = open_checkpoint(unpack("backbone-mixed", tmp_path))
    assert opened.notes == ("the policy mixed_bfloat16 is not kept, only the number format of the parameters",)


@pytest.mark.parametrize("case", ["lm", "lm-sharded"])
def test_what_is_written_again_is_the_same_preset(tmp_path: Path, case: str) -> None:
    """The same arrays under the same paths, the same JSON but for what is ours, the same vocabulary."""
    theirs = unpack(case, tmp_path / "theirs")
    with open_source(theirs) as source:
        most = 7000 if case == "lm-sharded" else None
        carry_out(plan_conversion(source, tmp_path / "ours", "kerashub", max_shard_bytes=most))
    ours = tmp_path / "ours"
    assert {path.relative_to(theirs).as_posix() for path in theirs.rglob("*") if path.name != "answers.npz"} == {
        path.relative_to(ours).as_posix() for path in ours.rglob("*")
    }
    one, two = arrays_in(theirs), arrays_in(ours)
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)
    assert [each.dtype for each in one.values()] == [each.dtype for each in two.values()]
    for name in ("config.json", "tokenizer.json", "task.json", "preprocessor.json", "metadata.json"):
        texts = ((folder / name).read_text() for folder in (theirs, ours))
        # What Keras calls a second object of a class.
        said, mine = (json.loads(re.sub(r'("name": "gpt2_\w+?)_1"', r'\1"', text)) for text in texts)
        assert said.pop("date_saved", None) or name != "metadata.json"
        assert mine.pop(kerashub.OWN, None) is not None or name not in ("config.json", "tokenizer.json")
        assert mine == said, name
    for name in ("vocabulary.json",):
        assert json.loads((theirs / "assets/tokenizer" / name).read_text()) == json.loads(
            (ours / "assets/tokenizer" / name).read_text()
        )
    merges = [(folder / "assets/tokenizer/merges.txt").read_text() for folder in (theirs, ours)]
    assert merges[1] == "#version: 0.2\n" + merges[0]
    if most:
        maps = [json.loads((folder / "model.weights.json").read_text()) for folder in (theirs, ours)]
        assert (
            maps[0]["metadata"] == maps[1]["metadata"] and maps[0]["weight_map"].keys() == maps[1]["weight_map"].keys()
        )


def test_the_tokenizer_of_a_preset_is_read_and_goes_anywhere(tmp_path: Path) -> None:
    parts = open_checkpoint(unpack("lm", tmp_path / "a")).tokenizer()  # type: ignore[misc]
    assert len(parts.vocabulary) == 265 and len(parts.vocabulary.merges()) == 8
    assert parts.added == [AddedToken(ENDOFTEXT, 264, True), AddedToken("<user>", 265, True)]
    assert (parts.settings["eos_token"], parts.settings["pad_token"]) == (ENDOFTEXT, None)
    with open_source(tmp_path / "a") as source:
        carry_out(plan_conversion(source, tmp_path / "hub", "safetensors"))
        carry_out(plan_conversion(source, tmp_path / "a.gguf", "gguf"))
    tokenizer = GPT2Tokenizer.from_pretrained(tmp_path / "hub")
    assert tokenizer.encode(" the<user>in") == [258, 265, 259]
    config = GPT2Config.from_pretrained(tmp_path / "hub")
    assert config.eos_token_id == 264 and config.extra["architectures"] == ["GPT2LMHeadModel"]


# There and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["lm", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_model_survives_bit_for_bit_with_its_configuration(tmp_path: Path, head: str, dtype: str) -> None:
    for n_head, width, inner in ((1, 6, None), (3, 4, 5), (2, 4, 32), (4, 2, 7)):
        config = small_config(
            n_head=n_head, n_embd=n_head * width, n_inner=inner, n_layer=3, embd_pdrop=0.3, resid_pdrop=0.2,
            activation_function="gelu_pytorch_tanh", extra={"kept": "too"}, tie_word_embeddings=head == "lm",
            eos_token_id=[1, 2],
        )  # fmt: skip
        expected = tensors_of(config, head, dtype, n_head)
        for most in (None, 900):
            folder = tmp_path / f"{n_head}-{most}"
            kerashub.write(folder, expected, about=About(config, Head(head)), max_shard_bytes=most)
            with open_checkpoint(folder) as opened:
                assert opened.format == "kerashub" and opened.head == head
                assert_same(opened, expected)
                assert config_of(opened, beside=False).config == config
            assert (folder / "task.json").exists() == (head == "lm") and not (folder / "tokenizer.json").exists()
            assert open_pretrained(folder, head).matching.fits


def test_twelve_layers_are_not_mixed_up(tmp_path: Path) -> None:
    config = small_config(n_layer=12)
    opened = open_checkpoint(written(tmp_path, config))
    assert_same(opened, tensors_of(config))
    assert opened.names_in_file["transformer.h.11.ln_2.bias"].startswith("layers/transformer_decoder_11/")
    assert opened.names_in_file["transformer.h.0.ln_2.bias"].startswith("layers/transformer_decoder/")


@pytest.mark.parametrize(
    "parts",
    [
        gpt2_parts(),
        with_added(AddedToken("<user>", 50257, False), AddedToken("<|sys|>", 50258, True)),
        tiny_parts(),
        tiny_parts(AddedToken("<a>", 257, True), pad_token="<a>", add_prefix_space=True, model_max_length=7),
    ],
    ids=["gpt2", "added", "tiny", "settings"],
)
def test_a_tokenizer_comes_back_with_its_added_tokens_and_settings(tmp_path: Path, parts: TokenizerParts) -> None:
    again = open_checkpoint(written(tmp_path, CONFIG, tokenizer=parts)).tokenizer()  # type: ignore[misc]
    assert again.added == parts.added and again.vocabulary.token_bytes == parts.vocabulary.token_bytes
    assert again.vocabulary.merges() == parts.vocabulary.merges()
    assert again.settings == {"add_prefix_space": False} | dict(parts.settings)
    ids = json.loads((tmp_path / "assets/tokenizer/vocabulary.json").read_text())
    assert all(ids[token.content] == token.id for token in parts.added), "KerasHub looks there for all of them"


def test_the_folder_of_a_former_checkpoint_is_taken_over_and_given_back(tmp_path: Path) -> None:
    tensors = tensors_of(CONFIG)
    CONFIG.save_pretrained(tmp_path)
    save_checkpoint(tmp_path, tensors)
    about = About(CONFIG, Head.LM, tiny_parts())
    save_checkpoint(tmp_path, tensors, format="kerashub", about=about, max_shard_bytes=900)
    assert not (tmp_path / "model.safetensors").exists() and detect(tmp_path)[1].name == "model.weights.json"
    save_checkpoint(tmp_path, tensors, format="kerashub", about=about)
    assert [path.name for path in tmp_path.glob("*.h5")] == ["model.weights.h5"]
    assert not (tmp_path / "model.weights.json").exists()
    save_checkpoint(tmp_path, tensors)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name not in ("assets", "metadata.json")) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert not any(map(kerashub.owns, ("config.json", "tokenizer.json", "metadata.json", "my.weights.h5")))
    assert all(map(kerashub.owns, ("model.weights.h5", "model_00000.weights.h5", "task.json", "preprocessor.json")))


def test_presets_are_told_from_other_files_of_keras(tmp_path: Path) -> None:
    from gpt2_core.checkpoints import keras

    for case in CASES:
        folder = unpack(case, tmp_path / case)
        name, file = detect(folder)
        assert name == "kerashub" and kerashub.find(file) == file and keras.find(folder) is keras.find(file) is None
        assert open_checkpoint(file).names() == open_checkpoint(folder).names()
    keras.write(tmp_path / "a.weights.h5", tensors_of(CONFIG), about=About(CONFIG))
    (tmp_path / "b.h5").write_bytes(b"")
    assert not any(kerashub.find(tmp_path / name) for name in ("a.weights.h5", "b.h5", "c.h5", "."))
    with pytest.raises(CheckpointError, match=r"holds no preset of KerasHub: expected model\.weights\.h5 or"):
        kerashub.read(tmp_path)


# The configuration ----------------------------------------------------------------------------------------------------


def changed(folder: Path, file: str = "config.json", **changes: Any) -> Path:
    """Change what a file of a preset says in its `config`."""
    said = json.loads((folder / file).read_text())
    said["config"] = {key: each for key, each in (said["config"] | changes).items() if each is not ...}
    (folder / file).write_text(json.dumps(said))
    return folder


def config_in(folder: Path) -> GPT2Config:
    return config_of(kerashub.read(folder), beside=False).config


def test_what_kerashub_says_has_the_last_word(tmp_path: Path) -> None:
    config = CONFIG.replace(n_positions=16, resid_pdrop=0.3, extra={"kept": 1}, activation_function="gelu_pytorch_tanh")
    folder = changed(written(tmp_path, config), dropout=0.25, max_sequence_length=12)
    found = config_in(folder)
    assert (found.n_positions, found.resid_pdrop, found.embd_pdrop, found.attn_pdrop) == (12, 0.25, 0.25, 0.25)
    assert found.extra == {"kept": 1} and found.activation_function == "gelu_pytorch_tanh"
    said = json.loads((folder / "config.json").read_text())
    own = {
        "activation_function": "relu",
        "layer_norm_epsilon": 0.1,
        "hidden_size": 3,
        "n_head": 99,
        "n_ctx": 3,
        "tie_word_embeddings": False,
        "scale_attn_weights": False,
        "pruned_heads": {"0": [1]},
        "num_labels": 7,
    }
    (folder / "config.json").write_text(json.dumps(said | {kerashub.OWN: {"config": own}}))
    found = config_in(folder)
    assert (found.activation_function, found.layer_norm_epsilon, found.n_embd) == ("gelu_new", 1e-5, 8)
    assert (found.n_head, found.n_positions, found.num_labels) == (2, 12, 7)
    assert found.tie_word_embeddings and found.scale_attn_weights and not found.pruned_heads
    for broken in ([], {"config": 3}, "x", None):
        (folder / "config.json").write_text(json.dumps(said | {kerashub.OWN: broken}))
        assert config_in(folder).n_embd == 8


def test_former_names_are_read_and_a_number_format_is_no_duty(tmp_path: Path) -> None:
    """KerasNLP 0.14: other packages, and neither dtype nor unsplittable_tokens."""
    folder = changed(unpack("lm", tmp_path), dtype=...)
    changed(folder, "tokenizer.json", unsplittable_tokens=...)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("keras_hub", "keras_nlp"))
    opened = kerashub.read(folder)
    assert opened.head == "lm" and opened.notes == ()
    parts = opened.tokenizer()  # type: ignore[misc]
    assert parts.added == [AddedToken(ENDOFTEXT, 264, True)] and len(parts.vocabulary) == 266


def test_a_task_of_another_kind_leaves_the_backbone(tmp_path: Path) -> None:
    folder = unpack("lm", tmp_path)
    said = json.loads((folder / "task.json").read_text())
    (folder / "task.json").write_text(json.dumps(said | {"registered_name": "Custom>Classifier"}))
    opened = kerashub.read(folder)
    assert opened.head == "none" and "'Custom>Classifier', which is not read" in opened.notes[0]


def test_dropouts_that_differ_and_many_ends_are_remarked_on() -> None:
    config = CONFIG.replace(resid_pdrop=0.3, eos_token_id=[1, 2])
    assert [text.split(":")[0] for text in kerashub.remarks(About(config))] == [
        "KerasHub has one dropout for all",
        "KerasHub stops at <|endoftext|> only, not at all of (1, 2)",
    ]
    assert kerashub.remarks(About(CONFIG)) == ()


# What is refused ------------------------------------------------------------------------------------------------------

CANNOT: dict[str, tuple[dict[str, Any], str, str]] = {
    "an untied head": ({"tie_word_embeddings": False}, "lm", r"tie_word_embeddings=False: its readers take True"),
    "pruned heads": ({"pruned_heads": {1: [0]}}, "lm", r"pruned_heads=\{1: \(0,\)\}"),
    "another activation": ({"activation_function": "gelu"}, "none", "activation_function='gelu'"),
    "another epsilon": ({"layer_norm_epsilon": 1e-6}, "lm", "layer_norm_epsilon=1e-06: its readers take 1e-05"),
    "no scaling": ({"scale_attn_weights": False}, "lm", "scale_attn_weights=False"),
    "scaling by layer": ({"scale_attn_by_inverse_layer_idx": True}, "lm", "scale_attn_by_inverse_layer_idx=True"),
    "a head for choices": ({}, "double", "no place for the head 'double'; expected one of lm, none"),
    "a head for classes": ({}, "sequence", "no place for the head 'sequence'"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_kerashub_has_no_place_for_is_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    changes, head, reason = CANNOT[case]
    with pytest.raises(CannotHoldError, match=reason):
        written(tmp_path / "a", small_config(**changes), head)
    assert not (tmp_path / "a").exists()


def test_reasons_are_given_together(tmp_path: Path) -> None:
    with pytest.raises(CannotHoldError, match=r"'relu'.*epsilon=0\.1.*tie_word_embeddings=False"):
        written(tmp_path, small_config(activation_function="relu", layer_norm_epsilon=0.1, tie_word_embeddings=False))


def test_what_is_no_whole_model_is_not_written(tmp_path: Path) -> None:
    tensors, about = tensors_of(CONFIG), About(CONFIG)
    with pytest.raises(CheckpointMismatchError, match=r"unexpected \(1\):\n    lm_head\.weight"):
        kerashub.write(tmp_path / "a", tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}, about=about)
    with pytest.raises(CheckpointMismatchError, match=r"h\.1\.attn\.c_attn\.weight: \(24, 8\)"):
        kerashub.write(tmp_path / "a", tensors | {"transformer.h.1.attn.c_attn.weight": np.ones((24, 8), "f4")},
                       about=about)  # fmt: skip
    with pytest.raises(CannotHoldError, match="holds one dtype"):
        kerashub.write(tmp_path / "a", tensors | {"transformer.ln_f.bias": np.ones(8, np.float16)}, about=about)
    with pytest.raises(CheckpointError, match="needs about"):
        kerashub.write(tmp_path / "a", tensors)
    with pytest.raises(CheckpointError, match="takes no metadata"):
        kerashub.write(tmp_path / "a", tensors, about=about, metadata={"a": "b"})
    assert not (tmp_path / "a").exists()


def test_tokenizers_that_kerashub_could_not_have_are_refused(tmp_path: Path) -> None:
    ids = {char: index for index, char in enumerate(BYTE_TO_CHAR.values())}
    with pytest.raises(CannotHoldError, match=r"no <\|endoftext\|>, without which"):
        written(tmp_path / "a", tokenizer=parts_of(ids, [], source="the test"))
    plain = tiny_parts()
    double = TokenizerParts(plain.vocabulary, [*plain.added, AddedToken("Ġ", 257, True)], plain.settings)
    with pytest.raises(CannotHoldError, match="two tokens of one spelling"):
        written(tmp_path / "a", tokenizer=double)
    assert not (tmp_path / "a").exists()


# What is damaged or lies ----------------------------------------------------------------------------------------------


def replaced(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return change


def saying(file: str = "config.json", **changes: Any) -> Callable[[Path], None]:
    return lambda folder: changed(folder, file, **changes) and None


def named(file: str, name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        said = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(said | {"registered_name": name}))

    return change


QUANTIZED = {"module": "keras", "class_name": "DTypePolicyMap", "config": {"default_policy": "int8"}}
INT8 = {"module": "keras", "class_name": "DTypePolicy", "config": {"name": "int8_from_float32"}}
LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no description": (replaced("config.json", None), r"config\.json is not there"),
    "a hub's config.json": (replaced("config.json", b'{"model_type": "gpt2"}'), "describes no object of Keras"),
    "no JSON": (replaced("config.json", b"{"), "is not JSON"),
    "a list": (replaced("config.json", b"[1]"), "expected a JSON object"),
    "a huge description": (replaced("config.json", b" " * ((1 << 24) + 1)), "expected at most 16777216"),
    "a task without description": (replaced("task.json", b"{}"), r"task\.json describes no object"),
    "a task that is no JSON": (replaced("task.json", b"\xff"), r"task\.json is not JSON"),
    "another model": (named("config.json", "keras_hub>LlamaBackbone"), "'keras_hub>LlamaBackbone'; expected"),
    "another package": (named("config.json", "x>GPT2Backbone"), "expected 'keras_hub>GPT2Backbone'"),
    "a function": (named("config.json", "builtins>exec"), "'builtins>exec'; expected"),
    "quantized": (saying(dtype=QUANTIZED), r"is quantized \(.*DTypePolicyMap"),
    "quantized by name": (saying(dtype=INT8), r"is quantized \(int8_from_float32\)"),
    "no sizes": (saying(hidden_dim=...), "has hidden_dim missing; expected a size"),
    "a size that is none": (saying(num_heads="2"), "has num_heads '2'; expected a size"),
    "a size that is true": (saying(num_heads=True), "has num_heads True"),
    "a size below one": (saying(max_sequence_length=0), "has max_sequence_length 0"),
    "a huge size": (saying(vocabulary_size=1 << 31), "has vocabulary_size 2147483648"),
    "more blocks than tensors": (saying(num_layers=1 << 30), "claims 1073741824 blocks, and there are 36 tensors"),
    "a dropout that is none": (saying(dropout="x"), "has dropout 'x'"),
    "a dropout of everything": (saying(dropout=1), "has dropout 1; expected a share"),
    "weights that are no HDF5": (replaced("model.weights.h5", b"\0" * 99), "expected the signature of HDF5"),
    "a vocabulary that is a list": (replaced("assets/tokenizer/vocabulary.json", b"[]"), "expected a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_preset_that_lies_is_refused_with_what_is_wrong(tmp_path: Path, case: str) -> None:
    change, message = LIES[case]
    folder = unpack("lm", tmp_path)
    change(folder)
    with pytest.raises(CheckpointFormatError, match=message):
        kerashub.read(folder)


TOKENIZERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another kind": (named("tokenizer.json", "keras_hub>BertTokenizer"), "describes 'keras_hub>BertTokenizer'"),
    "tokens without ids": (
        saying("tokenizer.json", unsplittable_tokens=["<x>"]),
        "no id for the unsplittable tokens '<x>'",
    ),
    "tokens that are none": (saying("tokenizer.json", unsplittable_tokens=[3]), "expected a list of tokens"),
    "no merges": (replaced("assets/tokenizer/merges.txt", None), r"merges\.txt is not there"),
    "merges that are none": (replaced("assets/tokenizer/merges.txt", b"a b c\n"), "expected two tokens"),
    "merges of unknown tokens": (replaced("assets/tokenizer/merges.txt", b"zz zz\n"), "zz"),
    "a tokenizer of the hub's": (replaced("tokenizer.json", b'{"version": "1.0", "model": {}}'), "describes no object"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_lies_is_refused_when_it_is_asked_for(tmp_path: Path, case: str) -> None:
    change, message = TOKENIZERS[case]
    folder = unpack("lm", tmp_path)
    change(folder)
    opened = kerashub.read(folder)
    with pytest.raises((TokenizerError, CheckpointFormatError), match=message):
        opened.tokenizer()  # type: ignore[misc]


@pytest.mark.parametrize(
    "name", ["config.json", "task.json", "tokenizer.json", "assets", "assets/tokenizer", "assets/tokenizer/merges.txt"]
)
def test_files_and_folders_may_not_stand_elsewhere(tmp_path: Path, name: str) -> None:
    folder = unpack("lm", tmp_path / "a")
    elsewhere = tmp_path / "elsewhere"
    (folder / name).rename(elsewhere)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        kerashub.read(folder).tokenizer()  # type: ignore[misc]


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    home = tmp_path / "models--keras--gpt2"
    folder = unpack("lm", home / "snapshots" / "abc")
    (home / "blobs").mkdir()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        blob = home / "blobs" / path.name.replace(".", "")
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    opened = open_checkpoint(folder)
    assert opened.format == "kerashub" and len(opened.tokenizer().vocabulary) == 265  # type: ignore[misc]


def test_what_the_table_does_not_know_is_unexpected_under_its_path(tmp_path: Path) -> None:
    from gpt2_core.checkpoints import keras_files

    folder = written(tmp_path)
    stored = kerashub.NAMES.to_file(tensors_of(CONFIG), CONFIG)
    arrays = ["layers/transformer_decoder_0/_feedforward_layer_norm/vars/0", "transformer.wte.weight",
              "layers/transformer_decoder/_self_attention_layer/query_dense/vars/2"]  # fmt: skip
    missing = "layers/transformer_decoder_1/_self_attention_layer/key_dense/vars/0"
    more = {name: Tensor.of(np.ones(8, np.float32)) for name in arrays}
    keras_files.write_weights(
        folder / "model.weights.h5", {name: each for name, each in stored.items() if name != missing} | more, {(): {}}
    )
    with pytest.raises(CheckpointMismatchError) as error:
        open_pretrained(folder, "lm")
    assert error.value.missing == ("transformer.h.1.attn.c_attn.weight",)
    parts = [missing.replace("key", part) for part in ("query", "value")]
    assert set(error.value.unexpected) == {f"/{name}" for name in [*arrays, *parts]}


def test_parts_of_different_shapes_are_no_whole(tmp_path: Path) -> None:
    from gpt2_core.checkpoints import keras_files

    folder = written(tmp_path)
    stored = kerashub.NAMES.to_file(tensors_of(CONFIG), CONFIG)
    name = "layers/transformer_decoder_1/_self_attention_layer/key_dense/vars/0"
    keras_files.write_weights(
        folder / "model.weights.h5", stored | {name: Tensor.of(np.ones((4, 2, 4), "f4"))}, {(): {}}
    )
    with pytest.raises(CheckpointFormatError, match=r"expected parts alike, which together are h\.1\.attn\.c_attn"):
        kerashub.read(folder)


def test_heads_that_do_not_fit_the_configuration_are_found_by_shape(tmp_path: Path) -> None:
    """The number of heads is in the shapes here; a config that says otherwise would compute something else."""
    folder = changed(written(tmp_path), num_heads=4)
    with pytest.raises(CheckpointFormatError, match=r"4 heads of width 2, but .*query_dense/vars/0 has 2 of 4"):
        kerashub.read(folder)


# Damage ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("lm", tmp_path_factory.mktemp("sound"))


def read_all(folder: Path) -> None:
    """Read all of a preset; an error of ours is as good an end as any."""
    try:
        with kerashub.read(folder) as opened:
            for name in opened:
                assert opened.array(name).shape == opened.shape(name)
            config = config_of(opened, beside=False).config
            parameter_table(config, opened.head or "lm")
            if opened.tokenizer is not None:
                opened.tokenizer()
    except Gpt2Error as error:
        assert len(str(error)) < 10_000
    kerashub.find(folder)


FILES = ["model.weights.h5", "config.json", "task.json", "tokenizer.json", "assets/tokenizer/vocabulary.json",
         "assets/tokenizer/merges.txt"]  # fmt: skip


@bounded
@given(
    file=st.sampled_from([FILES[0], *FILES]),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    splice=st.one_of(st.none(), st.tuples(*[st.floats(0, 1)] * 3)),
)
def test_flipped_cut_and_spliced_files_end_well(
    sound: Path, file: str, flips: list[tuple[float, int]], cut: float | None, splice: tuple[float, ...] | None
) -> None:
    whole = (sound / file).read_bytes()
    data = bytearray(whole)
    for at, value in flips:
        data[int(at * len(data))] = value
    if splice is not None:
        start, end, to = (int(each * len(data)) for each in splice)
        data[to:to] = data[start:end]
    try:
        (sound / file).write_bytes(data if cut is None else data[: int(cut * len(data))])
        read_all(sound)
    finally:
        (sound / file).write_bytes(whole)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(["", "keras_hub>GPT2Backbone", "x"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
SIZES = st.one_of(st.sampled_from([0, 1, 2, 6, 7, 8, 270, 1 << 31, 1 << 64, -1]), VALUES)
OWN = st.one_of(VALUES, st.fixed_dictionaries({"config": st.one_of(VALUES, st.dictionaries(
    st.sampled_from(["n_head", "n_layer", "eos_token_id", "pruned_heads", "num_labels", "model_type", "extra"]), VALUES,
    max_size=3))}))  # fmt: skip


@bounded
@given(
    sizes=st.dictionaries(st.sampled_from([*kerashub.SIZES, "dropout", "dtype"]), SIZES, max_size=3),
    own=OWN,
    name=st.one_of(st.just("keras_hub>GPT2Backbone"), VALUES),
    tokens=st.dictionaries(st.sampled_from(["unsplittable_tokens", "add_prefix_space"]), VALUES, max_size=2),
    kept=VALUES,
)
def test_any_description_of_likely_and_unlikely_values_ends_well(
    sound: Path, sizes: dict[str, Any], own: Any, name: Any, tokens: dict[str, Any], kept: Any
) -> None:
    before = {file: (sound / file).read_bytes() for file in ("config.json", "tokenizer.json")}
    try:
        for file, changes, more in (
            ("config.json", sizes, {"registered_name": name, kerashub.OWN: own}),
            ("tokenizer.json", tokens, {kerashub.OWN: kept}),
        ):
            said = json.loads(before[file])
            said["config"] |= changes
            (sound / file).write_text(json.dumps(said | more))
        read_all(sound)
    finally:
        for file, content in before.items():
            (sound / file).write_bytes(content)


# KerasHub itself ------------------------------------------------------------------------------------------------------

KERAS_HUB = os.environ.get("GPT2_DUET_KERAS_HUB", "")
needs_keras_hub = pytest.mark.skipif(not KERAS_HUB, reason="GPT2_DUET_KERAS_HUB names no Python that has keras-hub")
TEXTS = ["Once upon a time", "Hello world!  It's<|endoftext|> it<user>x<|sys|>", "don't WON'T 12345 x", "héllo 日本語"]
PLACES = {"preset": "", "inputs": ".in.npz", "answers": ".npz", "save": "-saved"}
OTHERWISE = "\n\nfoo"
LIVE: dict[str, tuple[dict[str, Any], str, str, int | None]] = {
    "lm": ({"n_inner": 7}, "lm", "float32", None),
    "backbone": ({"n_head": 4}, "none", "float32", None),
    "bfloat16": ({}, "lm", "bfloat16", None),
    "sharded": ({"n_layer": 3}, "lm", "float32", 1500),
    "tokenizer": ({"vocab_size": 50260}, "lm", "float32", None),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Presets of ours, what KerasHub made of them, and what it saved of that."""
    folder = tmp_path_factory.mktemp("keras_hub")
    jobs = []
    for name, (changes, head, dtype, most) in LIVE.items():
        config = small_config(**changes)
        parts = with_added(AddedToken("<user>", 50257, False), AddedToken("<|sys|>", 50258, True))
        written(folder / name, config, head, dtype, parts if name == "tokenizer" else None, most)
        ids, mask = random_ids(config, 3, 6), np.ones((3, 6), np.int64)
        np.savez(folder / f"{name}.in.npz", token_ids=ids, padding_mask=mask)
        job = {key: str(folder / f"{name}{end}") for key, end in PLACES.items()}
        texts = [*TEXTS, OTHERWISE] if name == "tokenizer" else []
        jobs.append(job | {"shard": most and 3000, "texts": texts})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = PEERS / "make_keras_hub.py"
    # Where transformers 4 is asked too, this is set for it; KerasHub needs Keras 3.
    others = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    command = [KERAS_HUB, script, "answer", folder / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=others)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@needs_keras_hub
@pytest.mark.parametrize("case", LIVE)
def test_kerashub_computes_our_logits_from_our_preset(asked: Path, case: str) -> None:
    model = ReferenceModel.from_pretrained(asked / case, "lm")
    with np.load(asked / f"{case}.in.npz") as given, np.load(asked / f"{case}.npz") as found:
        ours = model(given["token_ids"], output_hidden_states=True)
        for name, value in (("backbone.hidden", ours.hidden_states[-1]), ("backbone.logits", ours.logits),
                            ("task.logits", ours.logits)):  # fmt: skip
            assert error(value, found[name]) <= TRANSFORMERS, name


@needs_keras_hub
@pytest.mark.parametrize("case", LIVE)
def test_what_kerashub_saves_of_our_preset_is_the_same_model(asked: Path, case: str) -> None:
    config, head = small_config(**LIVE[case][0]), LIVE[case][1]
    expected = tensors_of(config, head, LIVE[case][2])
    opened = open_checkpoint(asked / f"{case}-saved")
    assert opened.format == "kerashub" and opened.head == head
    assert_same(opened, {name: converted(tensor, "float32") for name, tensor in expected.items()})
    found = config_of(opened, beside=False).config
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "inner_dim", "activation_function"):
        assert getattr(found, key) == getattr(config, key), key


@needs_keras_hub
def test_kerashub_has_our_ids_but_for_the_texts_that_it_cuts_otherwise(asked: Path) -> None:
    parts = open_checkpoint(asked / "tokenizer").tokenizer()  # type: ignore[misc]
    shutil.rmtree(asked / "hub", ignore_errors=True)
    with open_source(asked / "tokenizer") as source:
        carry_out(plan_conversion(source, asked / "hub", "safetensors", verify="none"))
    tokenizer = GPT2Tokenizer.from_pretrained(asked / "hub")
    saved = open_checkpoint(asked / "tokenizer-saved").tokenizer()  # type: ignore[misc]
    assert saved.vocabulary.is_gpt2 and [token.content for token in saved.added] == [
        token.content for token in parts.added
    ]
    with np.load(asked / "tokenizer.npz") as found:
        assert found["roles"].tolist() == [50256, 50256, 0]
        for number, text in enumerate(TEXTS):
            assert tokenizer.encode(text) == found[f"ids.{number}"].tolist(), text
            assert found[f"text.{number}"].tobytes().decode() == text
        assert found["generated"].tobytes().decode().startswith(TEXTS[0])
        theirs = found[f"ids.{len(TEXTS)}"].tolist()
        assert (tokenizer.encode(OTHERWISE), theirs) == ([198, 198, 21943], [628, 21943])
