"""Against someone else's GPT-2: transformers, in float32, on the same weights; and each reads what the other wrote."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_pt import GPT2DoubleHeadsModel, GPT2ForSequenceClassification, GPT2LMHeadModel, GPT2Model
from models import padded_mask, random_config, random_ids
from pt.helpers import MODELS, model_of, torch
from tolerances import TRANSFORMERS, error

transformers = pytest.importorskip("transformers", minversion="5.0")

THEIRS = {
    "none": "GPT2Model",
    "lm": "GPT2LMHeadModel",
    "double": "GPT2DoubleHeadsModel",
    "sequence": "GPT2ForSequenceClassification",
    "token": "GPT2ForTokenClassification",
    "qa": "GPT2ForQuestionAnswering",
}
UNKNOWN = ("n_ctx", "pruned_heads")  # n_ctx is their n_positions; this version of theirs has no pruning


def config_for(seed, **changes):
    # Their summary takes another axis for the types other than cls_index, so those have nothing to compare with.
    fixed = {"pruned_heads": {}, "summary_type": "cls_index", "initializer_range": 0.15}
    return random_config(seed, **(fixed | changes))


def their_config(config):
    settings = {key: value for key, value in config.to_dict().items() if key not in UNKNOWN}
    return transformers.GPT2Config(**settings, attn_implementation="eager")


def pair(cls, config, seed=0, dtype=torch.float32):
    """Our model and theirs, theirs filled by our state dict without a word about names."""
    ours = cls(config, seed=seed).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    theirs = getattr(transformers, THEIRS[cls.head.value])(their_config(config)).to(dtype).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def close(ours, theirs, tolerance=TRANSFORMERS):
    ours, theirs = (tuple(x) if isinstance(x, tuple | list) else x for x in (ours, theirs))
    if isinstance(ours, tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other, tolerance)
        return
    assert error(ours.detach().double().numpy(), theirs.detach().double().numpy()) <= tolerance


def assert_same(out, expected):
    for key in ("loss", "logits", "last_hidden_state", "hidden_states", "attentions", "start_logits", "end_logits"):
        if key in out:
            close(out[key], expected[key])
    if "past_key_values" in expected:  # not all of their heads return it
        close(out.past, tuple((layer.keys, layer.values) for layer in expected.past_key_values.layers))


def ids_for(config, *shape, seed=0):
    return torch.from_numpy(random_ids(config, *shape, seed=seed))


@pytest.mark.parametrize("seed", range(18))
def test_the_language_model_agrees_in_everything_it_returns(seed):
    config = config_for(seed)
    ours, theirs = pair(GPT2LMHeadModel, config, seed)
    ids = ids_for(config, 3, 10, seed=seed)
    types = ids_for(config, 3, 10, seed=seed + 1)
    labels = torch.where(ids % 3 == 0, -100, ids)
    more = {"labels": labels, "output_attentions": True, "output_hidden_states": True, "token_type_ids": types}
    assert_same(ours(ids, **more), theirs(ids, **more))


@pytest.mark.parametrize("seed", range(4))
def test_padded_and_cached_continuations_agree(seed):
    config = config_for(seed + 30)
    ours, theirs = pair(GPT2LMHeadModel, config, seed)
    ids, mask = ids_for(config, 3, 9, seed=seed), torch.from_numpy(padded_mask(3, 9, seed=seed))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = ours(ids[:, :5], attention_mask=mask[:, :5])
    out = ours(ids[:, 5:], first.past, mask)
    their_first = theirs(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5])
    expected = theirs(
        ids[:, 5:],
        past_key_values=their_first.past_key_values,
        attention_mask=mask,
        position_ids=positions[:, 5:],
    )
    real = mask[:, 5:] == 1  # what a padded query sees is nobody's concern
    close(out.logits[real], expected.logits[real])
    again = theirs(ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5])
    # Their cache is a past of ours.
    close(ours(ids[:, 5:], again.past_key_values, mask).logits[real], expected.logits[real])


@pytest.mark.parametrize("seed", range(4))
def test_double_heads_agree_in_logits_and_losses(seed):
    config = config_for(seed + 40)
    ours, theirs = pair(GPT2DoubleHeadsModel, config, seed)
    ids, at = ids_for(config, 2, 3, 6, seed=seed), ids_for(config, 2, 3, seed=9) % 6
    labels, right = ids.clone(), torch.tensor([2, 0])
    labels[:, :, :2] = -100
    out = ours(ids, mc_token_ids=at, labels=labels, mc_labels=right)
    expected = theirs(ids, mc_token_ids=at, labels=labels, mc_labels=right)
    close(out.logits, expected.logits)
    close(out.mc_logits, expected.mc_logits)
    close(out.lm_loss, expected.loss)
    close(out.mc_loss, expected.mc_loss)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cls", [cls for cls in MODELS if cls is not GPT2DoubleHeadsModel])
def test_the_bare_model_and_the_task_heads_agree(cls, seed):
    config = config_for(seed + 50, pad_token_id=0, num_labels=3)
    ours, theirs = pair(cls, config, seed)
    ids = ids_for(config, 3, 8, seed=seed) % (config.vocab_size - 1) + 1
    ids[1, 5:] = 0
    labels = {
        "none": {},
        "lm": {"labels": ids},
        "sequence": {"labels": torch.tensor([0, 2, 1])},
        "token": {"labels": ids % 3},
        "qa": {"start_positions": torch.tensor([0, 3, 99]), "end_positions": torch.tensor([2, 6, 99])},
    }[cls.head.value]
    more = {**labels, "output_attentions": True, "output_hidden_states": True}
    assert_same(ours(ids, **more), theirs(ids, **more))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_other_losses_of_a_classifier_agree(problem_type):
    config = config_for(60, pad_token_id=0, num_labels=3, problem_type=problem_type)
    ours, theirs = pair(GPT2ForSequenceClassification, config)
    ids, labels = ids_for(config, 4, 6), torch.from_numpy(np.random.default_rng(0).random((4, 3)).round()).float()
    close(ours(ids, labels=labels).loss, theirs(ids, labels=labels).loss)


def test_gradients_agree():
    config = config_for(3)
    ours, theirs = pair(GPT2LMHeadModel, config, dtype=torch.float64)
    ids = ids_for(config, 2, 8)
    ours(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, expected[name].grad, 1e-6)  # their loss is taken in float32


@pytest.mark.parametrize("cls", MODELS)
def test_state_dict_names_are_theirs_and_load_both_ways(cls):
    config = config_for(4)
    ours, theirs = pair(cls, config)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    fresh = cls(config, seed=9)
    result = fresh.load_state_dict(theirs.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    for name, value in ours.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


# -- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [None, "2KB"])
@pytest.mark.parametrize("cls", MODELS)
def test_we_read_what_they_saved(tmp_path, cls, shard):
    config = config_for(5, tie_word_embeddings=shard is None, pad_token_id=0)
    ours, theirs = pair(cls, config)
    theirs.save_pretrained(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard is not None)
    loaded = cls.from_pretrained(tmp_path)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    ids = ids_for(config, 2, 2, 5) if cls is GPT2DoubleHeadsModel else ids_for(config, 2, 5)
    close(loaded(ids)[0], theirs(ids)[0])


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("old_format", [False, True])
def test_we_read_a_bin_file_made_of_their_state_dict(tmp_path, bare, old_format):
    ours, theirs = pair(GPT2LMHeadModel, config_for(6, tie_word_embeddings=True))
    their_config(ours.config).save_pretrained(tmp_path)
    state = (theirs.transformer if bare else theirs).state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old_format)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    for name, value in ours.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("shard", [None, 2000])
@pytest.mark.parametrize("cls", MODELS)
def test_they_read_what_we_saved(tmp_path, cls, shard):
    config = config_for(7, tie_word_embeddings=shard is None)
    ours, _ = pair(cls, config)
    ours.save_pretrained(tmp_path, max_shard_bytes=shard)
    theirs, info = getattr(transformers, THEIRS[cls.head.value]).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_torch_reads_the_bin_files_we_save(tmp_path):
    model = model_of(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, format="bin")
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert set(state) == {name for name, _ in model.named_parameters()}
    for name, value in state.items():
        assert torch.equal(value, model.get_parameter(name))


def test_greedy_text_from_a_padded_batch_agrees():
    config = config_for(8, vocab_size=37, n_positions=32, eos_token_id=1, pad_token_id=None)
    ours, theirs = pair(GPT2LMHeadModel, config, dtype=torch.float64)
    ids, mask = ids_for(config, 3, 6) % 35 + 2, torch.from_numpy(padded_mask(3, 6))
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    out = ours.generate(ids, mask, max_new_tokens=12, pad_token_id=0)
    assert out[:, 6:][:, : expected.shape[1] - 6].tolist() == expected[:, 6:].tolist()


def test_a_bare_model_of_theirs_is_a_bare_model_of_ours(tmp_path):
    config = config_for(9)
    _, theirs = pair(GPT2LMHeadModel, config)
    theirs.transformer.save_pretrained(tmp_path)
    ids = ids_for(config, 2, 5)
    close(GPT2Model.from_pretrained(tmp_path)(ids)[0], theirs.transformer(ids)[0])
