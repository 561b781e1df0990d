"""GPT2Config: what it takes, what it keeps, what it refuses."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from gpt2_core.config import ALIASES, FIELDS, PRESETS, GPT2Config
from gpt2_core.errors import CheckpointError, ConfigError, HubError, WriteError

# config.json of a released model as version 2 and 3 of the field's library wrote it, with a fine-tuned one's labels.
VERSION_2_FILE = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "id2label": {"0": "LABEL_0"},
    "initializer_range": 0.02,
    "is_decoder": False,
    "label2id": {"LABEL_0": 0},
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "num_labels": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_past": True,
    "pruned_heads": {},
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "torchscript": False,
    "use_bfloat16": False,
    "vocab_size": 50257,
}


def test_the_defaults_are_the_smallest_released_model():
    config = GPT2Config()
    assert config == PRESETS["gpt2"]
    assert (config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head) == (
        50257,
        1024,
        768,
        12,
        12,
    )
    assert (config.head_dim, config.inner_dim) == (64, 3072)


def test_a_version_2_file_is_read_and_written_back_whole():
    config = GPT2Config.from_dict(VERSION_2_FILE)
    assert config.num_labels == 1
    assert config.id2label == {0: "LABEL_0"}
    assert config.extra["task_specific_params"] == VERSION_2_FILE["task_specific_params"]
    written = config.to_dict()
    assert {key: written[key] for key in VERSION_2_FILE} == VERSION_2_FILE


def test_labels_alone_say_how_many_there_are():
    assert GPT2Config.from_dict({"id2label": {"0": "a", "1": "b", "2": "c"}}).num_labels == 3


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_newer_names_are_readable(alias, name):
    value = {"n_positions": 64, "n_embd": 36, "n_layer": 3, "n_head": 4}[name]
    config = GPT2Config.from_dict({alias: value})
    assert getattr(config, name) == value
    assert getattr(config, alias) == value
    assert GPT2Config().replace(**{alias: value}) == config


def test_an_alias_may_repeat_its_field_but_not_contradict_it():
    assert GPT2Config.from_dict({"n_positions": 64, "n_ctx": 64}).n_positions == 64
    with pytest.raises(ConfigError, match="n_ctx=32 contradicts n_positions=64"):
        GPT2Config.from_dict({"n_positions": 64, "n_ctx": 32})


def test_dict_json_file_folder_pickle_and_copy_all_give_the_same_config_back(tmp_path):
    config = GPT2Config(
        n_layer=3, n_inner=5, eos_token_id=[7, 8], pruned_heads={1: [0, 2]}, num_labels=2, id2label={0: "no", 1: "yes"}
    ).replace(extra={"future_key": [1, {"a": None}]})
    assert GPT2Config.from_dict(config.to_dict()) == config
    assert GPT2Config.from_dict(json.loads(config.to_json_string())) == config
    path = config.save_pretrained(tmp_path / "new" / "folder")
    assert path.read_text(encoding="utf-8") == config.to_json_string()
    assert GPT2Config.from_json_file(path) == config
    assert GPT2Config.from_pretrained(path) == config
    assert GPT2Config.from_pretrained(tmp_path / "new" / "folder") == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert hash(GPT2Config.from_dict(config.to_dict())) == hash(config)


def test_equal_configs_are_equal_and_different_ones_are_not():
    assert GPT2Config() == GPT2Config(n_embd=768)
    assert GPT2Config() != GPT2Config(n_embd=780)
    assert GPT2Config() != GPT2Config().replace(extra={"a": 1})


def test_a_config_cannot_be_changed_in_place():
    config = GPT2Config(pruned_heads={0: [1]})
    with pytest.raises(AttributeError):
        config.n_layer = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.pruned_heads[0] = (2,)  # type: ignore[index]
    with pytest.raises(TypeError):
        config.extra["a"] = 1  # type: ignore[index]


def test_replace_knows_its_fields_and_drops_labels_that_no_longer_fit():
    config = GPT2Config(num_labels=1, id2label={0: "only"})
    assert config.replace(num_labels=4).id2label is None
    assert config.replace(n_layer=2).id2label == {0: "only"}
    with pytest.raises(ConfigError, match=r"no field 'n_layers'; .*did you mean 'n_layer'\?$"):
        config.replace(n_layers=3)


def test_an_unknown_name_is_refused_with_the_nearest_and_the_place_for_other_keys():
    with pytest.raises(
        ConfigError, match=r"no field 'n_layers'; .*extra=\{'n_layers': \.\.\.\}; did you mean 'n_layer'\?$"
    ):
        GPT2Config(n_layers=3)
    with pytest.raises(ConfigError, match=r"no field 'torchscript'; .*extra=\{'torchscript': \.\.\.\}$"):
        GPT2Config(torchscript=True)
    assert GPT2Config(100, 20).n_positions == 20


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_the_constructor_says_which_name_an_alias_stands_for(alias, name):
    with pytest.raises(ConfigError, match=f"'{alias}' is another name of {name}; say {name}=12, or use .*from_dict"):
        GPT2Config(**{alias: 12})


def test_two_names_of_one_field_may_not_contradict_each_other_and_both_are_named():
    with pytest.raises(
        ConfigError, match="max_position_embeddings=64 contradicts n_ctx=32, which are both n_positions"
    ):
        GPT2Config.from_dict({"n_ctx": 32, "max_position_embeddings": 64})
    with pytest.raises(ConfigError, match="n_ctx=32 contradicts n_positions=64"):
        GPT2Config().replace(n_positions=64, n_ctx=32)
    assert GPT2Config().replace(n_positions=64, n_ctx=64).n_positions == 64


def test_labels_go_with_their_number_also_those_that_are_only_kept():
    file = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    config = GPT2Config.from_dict(file)
    fewer = config.replace(num_labels=5)
    assert "label2id" not in fewer.to_dict() and "id2label" not in fewer.to_dict()
    other = config.replace(id2label={0: "a", 1: "b", 2: "c"})
    assert other.num_labels == 3
    assert other.to_dict()["label2id"] == {"a": 0, "b": 1, "c": 2}
    assert {key: config.replace(n_layer=2).to_dict()[key] for key in file} == file
    assert GPT2Config.from_dict(other.to_dict()) == other
    with pytest.raises(ConfigError, match="id2label names 1 labels but num_labels is 2"):
        config.replace(id2label={0: "a"}, num_labels=2)


def test_nothing_that_is_given_out_or_taken_in_is_shared():
    given = {"nested": {"list": [1]}}
    config = GPT2Config(extra=given)
    given["nested"]["list"].append(2)
    config.to_dict()["nested"]["list"].append(3)
    assert config.to_dict()["nested"] == {"list": [1]}


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"n_layer": 3}, "extra holds 'n_layer', which is a field"),
        ({"hidden_size": 3}, "extra holds 'hidden_size', which is another name of n_embd"),
        ([1], r"extra is \[1\], expected a mapping"),
        ({1: 2}, "extra holds the key 1, expected names"),
    ],
)
def test_what_else_a_file_holds_is_names_that_are_no_fields(extra, told):
    with pytest.raises(ConfigError, match=told):
        GPT2Config(extra=extra)


def test_what_json_cannot_hold_is_named_when_it_is_written(tmp_path):
    config = GPT2Config(extra={"when": {1, 2}})
    with pytest.raises(ConfigError, match="set is not JSON serializable"):
        config.save_pretrained(tmp_path)


def test_end_of_text_tokens_are_always_a_tuple_when_asked_for_as_one():
    assert GPT2Config().eos_token_ids == (50256,)
    assert GPT2Config(eos_token_id=None).eos_token_ids == ()
    assert GPT2Config(eos_token_id=[1, 2]).eos_token_ids == (1, 2)


def test_pruned_heads_are_put_in_order_and_counted():
    config = GPT2Config(pruned_heads={"3": [5, 1, 5], 1: [], 0: (2,)})
    assert config.pruned_heads == {0: (2,), 3: (1, 5)}
    assert [config.heads_of(layer) for layer in (0, 1, 3)] == [11, 12, 10]


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_presets_answer_to_both_names_without_a_network(name):
    assert GPT2Config.from_pretrained(name) is PRESETS[name]
    assert PRESETS[f"openai-community/{name}"] is PRESETS[name]
    assert GPT2Config.from_pretrained(name, n_positions=32).n_positions == 32
    assert PRESETS["distilbert/distilgpt2"] is PRESETS["distilgpt2"]


NESTED, MANY = [], []  # type: ignore[var-annotated]
for _ in range(60):
    NESTED = [NESTED]
for _ in range(40):
    MANY = [MANY, {"a": MANY}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layer": 0}, "n_layer is 0, expected a whole number from 1 to 10,000"),
        ({"n_layer": True}, "n_layer is True"),
        ({"n_layer": 10**9}, "n_layer is 1000000000, expected a whole number from 1 to 10,000"),
        ({"n_layer": 10**5000}, "n_layer is a number too long to show"),
        ({"vocab_size": 2**31}, "vocab_size is 2147483648, expected a whole number from 1 to 2,147,483,647"),
        ({"n_inner": 2**31}, "n_inner is 2147483648, expected None"),
        ({"n_embd": 7.5}, "n_embd is 7.5"),
        ({"vocab_size": "big"}, "vocab_size is 'big'"),
        ({"n_embd": 100, "n_head": 3}, "n_embd=100 cannot be split into n_head=3"),
        ({"n_inner": 0}, "n_inner is 0, expected None"),
        ({"resid_pdrop": 1.0}, "resid_pdrop is 1.0, expected a probability"),
        ({"attn_pdrop": -0.1}, "attn_pdrop is -0.1"),
        ({"embd_pdrop": None}, "embd_pdrop is None"),
        ({"resid_pdrop": float("nan")}, "resid_pdrop is nan"),
        ({"layer_norm_epsilon": 0.0}, "layer_norm_epsilon is 0.0, expected a finite number above 0"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        ({"initializer_range": float("inf")}, "initializer_range is inf"),
        ({"initializer_range": -1}, "initializer_range is -1"),
        ({"initializer_range": 10**400}, "initializer_range is 1000"),
        ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
        ({"activation_function": "gelu" * 100}, "lugelugel..., expected"),
        ({"pruned_heads": {10**5000: [1]}}, "names layer a number too long to show"),
        ({"activation_function": "gelu_newer"}, "activation_function is 'gelu_newer', expected one of gelu_new"),
        ({"summary_type": "attn"}, "summary_type is 'attn', expected one of cls_index"),
        ({"summary_activation": "relu"}, "summary_activation is 'relu'"),
        ({"problem_type": "guessing"}, "problem_type is 'guessing', expected None or one of regression"),
        ({"use_cache": 1}, "use_cache is 1, expected true or false"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"eos_token_id": [1, "a"]}, "eos_token_id is"),
        ({"num_labels": 2, "id2label": {0: "a"}}, "id2label names 1 labels but num_labels is 2"),
        ({"pruned_heads": {12: [0]}}, "pruned_heads names layer 12, expected 0 to 11"),
        ({"pruned_heads": {0: [12]}}, "names head 12, expected 0 to 11"),
        ({"pruned_heads": {0: list(range(12))}}, "removes all 12 heads"),
        ({"pruned_heads": [1]}, "pruned_heads is [1], expected a mapping"),
        ({"extra": {"add_cross_attention": True}}, "asks for cross-attention"),
        ({"extra": {"a": NESTED}}, "'a' with lists or mappings more than 50 deep"),
        ({"extra": {"a": MANY}}, "with more than 1,000,000 values"),
    ],
)
def test_an_impossible_value_is_refused_by_name(changes, words):
    with pytest.raises(ConfigError) as caught:
        GPT2Config(**changes)
    assert words in str(caught.value)


def test_other_models_and_other_things_are_refused():
    with pytest.raises(ConfigError, match="model_type is 'bert', expected 'gpt2'"):
        GPT2Config.from_dict({"model_type": "bert"})
    with pytest.raises(ConfigError, match="must be a mapping of names to values, got list"):
        GPT2Config.from_dict([])  # type: ignore[arg-type]


def test_a_wrong_type_anywhere_in_a_file_is_a_config_error():
    junk = [None, True, -1, 0.5, "x", [], [1], {}, {"a": 1}, float("nan")]
    for name in FIELDS:
        for value in junk:
            try:
                GPT2Config.from_dict({name: value})
            except ConfigError:
                continue


def test_a_file_that_is_missing_or_no_json_is_reported_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        GPT2Config.from_json_file(tmp_path / "config.json")
    path = tmp_path / "config.json"
    for content in (b"{", b"\xff\xfe", b"", b"[" * 100_000, b'{"n_layer": ' + b"1" * 5000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            GPT2Config.from_json_file(path)
    path.write_text('{"n_layer": 0}')
    with pytest.raises(ConfigError, match=r"config\.json: n_layer is 0"):
        GPT2Config.from_json_file(path)


def test_half_of_a_character_in_a_file_is_kept_and_can_be_written_again(tmp_path):
    (tmp_path / "config.json").write_text('{"told": "\\ud800 and é"}')
    config = GPT2Config.from_json_file(tmp_path / "config.json")
    assert GPT2Config.from_json_file(config.save_pretrained(tmp_path / "b")) == config


def test_a_file_that_may_not_be_read_a_folder_and_a_pointer_are_told_apart(tmp_path, unreadable):
    path = tmp_path / "config.json"
    path.write_text("{}")
    unreadable(path)
    for read in (GPT2Config.from_json_file, GPT2Config.from_pretrained):
        with pytest.raises(ConfigError, match=r"config\.json cannot be read: Permission denied"):
            read(path)
    (tmp_path / "m" / "config.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"config\.json is a folder"):
        GPT2Config.from_pretrained(tmp_path / "m")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n")
    with pytest.raises(ConfigError, match="git lfs pull"):
        GPT2Config.from_pretrained(tmp_path / "p")


def test_a_folder_that_may_not_be_entered_is_no_missing_one(tmp_path, unreadable):
    GPT2Config().save_pretrained(tmp_path / "m")
    unreadable(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"m cannot be looked into: Permission denied"):
        GPT2Config.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", None, 7])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(HubError, match=r"is (not|neither) a"):
        GPT2Config.from_pretrained(name)


def test_a_file_in_the_place_of_the_folder_is_a_write_error(tmp_path):
    (tmp_path / "taken").write_text("mine")
    for folder in ("taken", "taken/x"):
        with pytest.raises(WriteError, match=r"cannot write .*taken.*is a file"):
            GPT2Config().save_pretrained(tmp_path / folder)
    assert (tmp_path / "taken").read_text() == "mine"
