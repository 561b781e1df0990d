"""Loading and saving whole models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt2_core.checkpoints import open_checkpoint, save_checkpoint
from gpt2_core.errors import CheckpointError, CheckpointMismatchError, ConfigError, HubError, InputError, WriteError
from gpt2_core.initialization import initial_value
from gpt2_core.reference import ReferenceModel
from gpt2_pt import (
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from models import small_config
from pt.helpers import MODELS, ids_of, model_of, torch

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def same_state(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def write_checkpoint(folder, tensors, config=None, **options):
    """A checkpoint of any names, with a config beside it."""
    (config or small_config()).save_pretrained(folder)
    save_checkpoint(folder, {name: np.asarray(value) for name, value in tensors.items()}, **options)
    return folder


def floats(model):
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


# -- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shard", [None, 500])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, format, shard, dtype):
    model = model_of(dtype=dtype, tie_word_embeddings=shard is None)
    model.save_pretrained(tmp_path, format=format, max_shard_bytes=shard)
    assert len(list(tmp_path.glob("*.safetensors" if format == "safetensors" else "*.bin"))) > 1 or shard is None
    for asked in (dtype, str(dtype).removeprefix("torch."), "auto"):
        other = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=asked)
        same_state(other, model)
        assert other.dtype == dtype
        assert not other.training
        assert other.config.extra["architectures"] == ["GPT2LMHeadModel"]
        assert other.config.extra["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_every_model_comes_back(tmp_path, cls, format):
    model = model_of(cls, dtype=torch.float32, pruned_heads={0: [1]})
    model.save_pretrained(tmp_path, format=format)
    other = cls.from_pretrained(tmp_path)
    same_state(other, model)
    assert other.loaded.newly_initialised == ()
    ids = ids_of(model, 2, 5)
    assert torch.equal(other(ids)[0], model(ids)[0])
    assert other.config.replace(extra={}) == model.config


@pytest.mark.parametrize("asked", [torch.float64, "float16", torch.bfloat16, "float32", None])
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_numbers_are_converted_as_pytorch_would(tmp_path, stored, asked):
    model = model_of(dtype=stored)
    model.save_pretrained(tmp_path)
    target = getattr(torch, asked) if isinstance(asked, str) else asked or torch.float32
    same_state(GPT2LMHeadModel.from_pretrained(tmp_path, dtype=asked), model.to(target))


def test_the_reference_reads_what_a_model_wrote(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path, format="bin")
    ids = ids_of(model, 2, 6)
    logits = ReferenceModel.from_pretrained(tmp_path)(ids.numpy()).logits
    np.testing.assert_allclose(model(ids).logits.detach().numpy(), logits, rtol=1e-10, atol=1e-10)


def test_a_file_may_be_given_instead_of_its_folder(tmp_path):
    model = model_of(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    same_state(GPT2LMHeadModel.from_pretrained(tmp_path / "model.safetensors"), model)


def test_a_large_tensor_is_converted_whole_across_pieces(tmp_path, monkeypatch):
    from gpt2_pt import weights

    model = model_of(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(weights, "_PIECE", 7)
    same_state(GPT2LMHeadModel.from_pretrained(tmp_path, dtype="float16"), model.half())


def test_auto_takes_the_dtype_of_the_file_for_a_fresh_head_too(tmp_path):
    model_of(dtype=torch.float16).save_pretrained(tmp_path)
    model = GPT2ForTokenClassification.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model(ids_of(model, 1, 4)).logits.dtype == torch.float16


def test_an_unknown_dtype_is_refused_with_those_that_are_known(tmp_path):
    with pytest.raises(InputError, match=r"dtype is 'flaot16', expected one of float32, .*did you mean 'float16'"):
        GPT2LMHeadModel.from_pretrained(tmp_path, dtype="flaot16")
    with pytest.raises(InputError, match=r"dtype is torch.int64"):
        GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.int64)


def test_loading_to_a_device_puts_everything_there(tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert GPT2LMHeadModel.from_pretrained(tmp_path, device=torch.device("cpu")).device.type == "cpu"


def test_loading_leaves_the_random_state_alone_and_says_nothing(tmp_path, capfd, recwarn):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    before = torch.get_rng_state()
    for dtype in ("float32", "float16"):
        GPT2ForTokenClassification.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    assert not list(recwarn)


# -- what goes with what -----------------------------------------------------------------------------------------


def test_a_missing_classification_head_starts_from_the_seed_and_is_reported(tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    model = GPT2ForSequenceClassification.from_pretrained(tmp_path, seed=5)
    assert model.loaded.newly_initialised == ("score.weight",)
    row = next(row for row in model.parameter_table() if row.name == "score.weight")
    assert np.array_equal(model.score.weight.detach().numpy(), initial_value(row, 5))
    with torch.no_grad():
        model.score.weight.add_(1)  # fresh values are no view of anything shared
    again = GPT2ForSequenceClassification.from_pretrained(tmp_path, seed=5)
    assert np.array_equal(again.score.weight.detach().numpy(), initial_value(row, 5))


def test_a_head_that_the_model_does_not_have_is_ignored_and_reported(tmp_path):
    model = model_of(GPT2DoubleHeadsModel, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    plain = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert set(plain.loaded.ignored) == {"multiple_choice_head.summary.weight", "multiple_choice_head.summary.bias"}
    ids = ids_of(plain, 1, 5)
    assert torch.equal(plain(ids).logits, model(ids[:, None]).logits[:, 0])
    bare = GPT2Model.from_pretrained(tmp_path)
    assert torch.equal(bare(ids)[0], plain.transformer(ids)[0])


def test_an_untied_language_model_head_may_not_be_missing(tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    config = GPT2LMHeadModel.from_pretrained(tmp_path).config.replace(tie_word_embeddings=False)
    with pytest.raises(CheckpointMismatchError, match=r"lm_head.weight.*\n.*set tie_word_embeddings=True"):
        GPT2LMHeadModel.from_pretrained(tmp_path, config=config)


def test_a_tied_head_that_differs_from_the_token_table_is_refused(tmp_path):
    model_of(dtype=torch.float32, tie_word_embeddings=False).save_pretrained(tmp_path)
    config = small_config(tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"differs from .*set tie_word_embeddings=False"):
        GPT2LMHeadModel.from_pretrained(tmp_path, config=config)


def test_everything_that_does_not_fit_is_reported_together(tmp_path):
    tensors = floats(model_of(dtype=torch.float32))
    del tensors["transformer.ln_f.bias"]
    tensors["transformer.h.0.mlp.c_fc.bias"] = tensors["transformer.h.0.mlp.c_fc.bias"][:5]
    tensors["transformer.h.1.surprise"] = np.zeros(3, np.float32)
    write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointMismatchError) as caught:
        GPT2LMHeadModel.from_pretrained(tmp_path)
    assert caught.value.missing == ("transformer.ln_f.bias",)
    assert caught.value.unexpected == ("transformer.h.1.surprise",)
    assert caught.value.misshaped == (("transformer.h.0.mlp.c_fc.bias", (5,), (32,)),)


def test_a_config_may_be_given_in_the_place_of_the_file(tmp_path):
    model = model_of(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config.json does not exist.*config=GPT2Config"):
        GPT2LMHeadModel.from_pretrained(tmp_path)
    config = small_config(activation_function="relu")
    other = GPT2LMHeadModel.from_pretrained(tmp_path, config=config)
    assert other.config == config
    assert not torch.equal(other(ids_of(model, 1, 5))[0], model(ids_of(model, 1, 5))[0])
    with pytest.raises(CheckpointMismatchError, match="misshaped"):
        GPT2LMHeadModel.from_pretrained(tmp_path, config=small_config(vocab_size=38))


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("cls", [GPT2Model, GPT2LMHeadModel])
def test_files_as_the_hub_has_them_load_in_either_way(tmp_path, prefix, head, cls):
    wanted = model_of(cls, dtype=torch.float32)
    tensors = {prefix + n.removeprefix("transformer."): value for n, value in floats(wanted).items()}
    for layer in range(2):
        tensors[f"{prefix}h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.float32))
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = np.float32(-1e4)
    if head:
        tensors["lm_head.weight"] = tensors[prefix + "wte.weight"].copy()
    write_checkpoint(tmp_path, tensors)
    loaded = cls.from_pretrained(tmp_path)
    same_state(loaded, wanted)
    assert len(loaded.loaded.ignored) == 4 + head
    other = cls(wanted.config, seed=3)
    result = other.load_state_dict(
        {name: torch.from_numpy(np.array(value)) for name, value in tensors.items() if name != "lm_head.weight"}
    )
    assert not result.missing_keys
    assert not result.unexpected_keys
    same_state(other, wanted)


# -- load_state_dict ---------------------------------------------------------------------------------------------


def test_a_state_dict_is_not_changed_by_loading_it():
    model = model_of()
    state = {name.removeprefix("transformer."): value for name, value in model.state_dict().items()}
    names = list(state)
    model_of(seed=2).load_state_dict(state)
    assert list(state) == names


def test_what_a_state_dict_lacks_or_has_too_much_is_still_reported():
    model = model_of()
    state = model.state_dict()
    del state["transformer.h.1.ln_1.weight"]
    state["transformer.h.7.ln_1.weight"] = torch.zeros(8)
    with pytest.raises(RuntimeError, match=r"Missing key.*h.1.ln_1.weight(.|\n)*Unexpected key.*h.7.ln_1.weight"):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["transformer.h.1.ln_1.weight"]
    assert result.unexpected_keys == ["transformer.h.7.ln_1.weight"]


def test_a_tied_model_refuses_a_state_dict_whose_head_differs():
    untied = model_of(tie_word_embeddings=False)
    model = model_of(seed=3)
    with pytest.raises(RuntimeError, match=r"lm_head.weight differs from transformer.wte.weight.*tie_word_embeddings"):
        model.load_state_dict(untied.state_dict())


def test_a_meta_model_takes_a_state_dict_by_assignment_and_stays_tied():
    model = model_of()
    with torch.device("meta"):
        other = GPT2LMHeadModel(model.config)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert other.lm_head.weight is other.transformer.wte.weight
    same_state(other, model)


def test_a_wrapped_model_takes_the_names_of_the_hub_too():
    model = model_of()
    wrapped = torch.nn.Sequential(model_of(seed=4))
    state = {f"0.{name.removeprefix('transformer.')}": value for name, value in model.state_dict().items()}
    wrapped.load_state_dict(state)
    same_state(wrapped[0], model)


# -- files and memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_changing_loaded_weights_never_changes_the_file(tmp_path, format, dtype):
    model = model_of(dtype=torch.float32)
    model.save_pretrained(tmp_path, format=format)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    ids = ids_of(model, 2, 5)
    loaded.float()(ids, labels=ids).loss.backward()
    optimizer.step()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    same_state(GPT2LMHeadModel.from_pretrained(tmp_path), model)


def test_two_models_of_one_file_do_not_share_numbers(tmp_path):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    one, two = (GPT2LMHeadModel.from_pretrained(tmp_path) for _ in range(2))
    with torch.no_grad():
        one.transformer.ln_f.weight.fill_(9)
    assert not (two.transformer.ln_f.weight == 9).any()


@pytest.mark.parametrize("shard", [None, 500])
@pytest.mark.parametrize("format", ["safetensors", "bin"])
def test_saving_over_the_folder_it_was_loaded_from_keeps_the_live_model_right(tmp_path, format, shard):
    model_of(dtype=torch.float32).save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = ids_of(loaded, 2, 5)
    for _ in range(3):
        with torch.no_grad():
            loaded.transformer.h[0].ln_1.weight.add_(0.5)  # some pages changed, the rest still the file's
        expected = loaded(ids).logits
        loaded.save_pretrained(tmp_path, format=format, max_shard_bytes=shard)
        assert torch.equal(loaded(ids).logits, expected)
        again = GPT2LMHeadModel.from_pretrained(tmp_path)
        same_state(again, loaded)
        loaded = again if shard is None else loaded


def test_another_format_takes_the_place_of_the_one_before(tmp_path):
    one, two = model_of(dtype=torch.float32), model_of(dtype=torch.float32, seed=1)
    one.save_pretrained(tmp_path)
    two.save_pretrained(tmp_path, format="bin", max_shard_bytes=500)
    assert not list(tmp_path.glob("*.safetensors"))
    same_state(GPT2LMHeadModel.from_pretrained(tmp_path), two)


def test_an_unknown_format_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"safetenors.*did you mean 'safetensors'"):
        model_of().save_pretrained(tmp_path / "new", format="safetenors")
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_half_way_leaves_the_old_model(tmp_path, monkeypatch):
    from gpt2_pt import weights

    old = model_of(dtype=torch.float32)
    old.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real = weights._to_file

    def failing(parameter):
        tensor = real(parameter)
        if parameter.shape == (8,):
            monkeypatch.setattr(tensor, "_load", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return tensor

    monkeypatch.setattr(weights, "_to_file", failing)
    with pytest.raises((WriteError, OSError)):
        model_of(dtype=torch.float32, seed=1).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pt.helpers import model_of, torch
new = model_of(dtype=torch.float32, seed=1)
for folder in sys.argv[2:]:
    left = int(os.path.basename(folder))
    if os.fork():
        os.wait()
        continue
    for name in ("fsync", "rename", "replace", "unlink", "open"):
        def counted(*args, _real=getattr(os, name), **kwargs):
            global left
            left -= 1
            if left < 0:
                os._exit(9)
            return _real(*args, **kwargs)
        setattr(os, name, counted)
    new.save_pretrained(folder, format="bin")
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are killed at a chosen system call, which needs fork")
def test_a_save_killed_at_any_moment_leaves_a_whole_model(tmp_path):
    old, new = model_of(dtype=torch.float32), model_of(dtype=torch.float32, seed=1)
    folders = [str(tmp_path / str(left)) for left in (0, 1, 2, 3, 5, 7, 9, 12, 15, 1000)]
    for folder in folders:
        old.save_pretrained(folder)
    tests = str(Path(__file__).parent.parent)
    subprocess.run([sys.executable, "-c", KILLED, tests, *folders], timeout=120, check=True)
    kinds = []
    for folder in folders:
        found = GPT2LMHeadModel.from_pretrained(folder)
        kinds.append(torch.equal(found.lm_head.weight, new.lm_head.weight))
        same_state(found, new if kinds[-1] else old)
    assert not kinds[0], "the first save was not killed: the test counts the wrong calls"
    assert kinds[-1]


def test_a_name_that_is_no_folder_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError):
        GPT2LMHeadModel.from_pretrained("nobody/no-such-model", cache_dir=tmp_path, local_files_only=True)


def test_config_json_says_what_the_weights_are(tmp_path):
    model_of(GPT2DoubleHeadsModel, dtype=torch.bfloat16, n_inner=5).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert (data["architectures"], data["dtype"], data["n_inner"]) == (["GPT2DoubleHeadsModel"], "bfloat16", 5)
    with open_checkpoint(tmp_path) as checkpoint:
        assert "lm_head.weight" not in checkpoint
        assert set(checkpoint.names()) == {row.name for row in model_of(GPT2DoubleHeadsModel).parameter_table()}


PEAK = """
import os, sys, torch
from gpt2_pt import GPT2LMHeadModel
torch.set_num_threads(1)

def peak():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024

def load(folder, dtype):
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.detach().view(-1)[::512].float().sum()  # touches every page
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

for case in sys.argv[2:]:
    if os.fork():  # a child for each case, so that none begins with memory another has left
        os.wait()
        continue
    folder, format, dtype = case.split(":")
    load(os.path.join(sys.argv[1], format), dtype)  # a small one first: what is counted is numbers, not code
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = peak()
    size = load(os.path.join(folder, format), dtype)
    print((peak() - before) / size, flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 200 MB of random numbers, half in the token table as in the smallest released model."""
    folder = tmp_path_factory.mktemp("large")
    config = small_config(vocab_size=50257, n_embd=512, n_head=8, n_positions=256, n_layer=8)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    noise = torch.randn(1 << 20)
    tensors = {}
    for row in model.parameter_table():
        tensors[row.name] = noise.repeat(row.size // (1 << 20) + 1)[: row.size].view(row.shape).numpy()
    for format in ("safetensors", "bin"):
        write_checkpoint(folder / format, tensors, config, format=format)
    return folder


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_loading_takes_no_more_memory_than_a_tenth_above_the_weights(large, tmp_path):
    for format in ("safetensors", "bin"):
        model_of(dtype=torch.float32).save_pretrained(tmp_path / format, format=format)
    cases = [f"{large}:{format}:{dtype}" for format in ("safetensors", "bin") for dtype in ("float32", "float16")]
    command = [sys.executable, "-c", PEAK, str(tmp_path), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) == 4
    assert all(0.9 < peak <= 1.1 for peak in peaks), peaks
