"""Outputs: by name, by key, in order, without what is None."""

from __future__ import annotations

import pytest

from gpt2_core.outputs import BaseOutput, ClassifierOutput, DoubleHeadsOutput, LMOutput, QuestionAnsweringOutput

KINDS = (BaseOutput, LMOutput, DoubleHeadsOutput, ClassifierOutput, QuestionAnsweringOutput)


def test_unpacking_gives_the_loss_first_and_skips_what_is_none():
    loss, logits, *rest = LMOutput(loss=1.0, logits="logits", attentions="attentions")
    assert (loss, logits, rest) == (1.0, "logits", ["attentions"])
    (logits,) = LMOutput(logits="logits")
    assert logits == "logits"


def test_numbers_and_slices_count_only_what_is_there():
    out = LMOutput(logits="logits", past="past")
    assert out[0] == "logits"
    assert out[-1] == "past"
    assert out[:1] == ("logits",)
    assert len(out) == 2
    with pytest.raises(IndexError):
        out[2]


def test_keys_work_like_a_mapping():
    out = LMOutput(logits="logits", past="past")
    assert out["logits"] == "logits"
    assert out.keys() == ("logits", "past")
    assert out.values() == ("logits", "past")
    assert dict(out.items()) == {"logits": "logits", "past": "past"}
    assert "past" in out
    assert "loss" not in out


def test_a_missing_key_says_which_there_are():
    with pytest.raises(KeyError, match="LMOutput has no 'loss' here; it has logits"):
        LMOutput(logits=1)["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_past_answers_to_its_newer_name_too(kind):
    past = object()
    assert kind(past=past).past_key_values is past


def test_the_order_of_fields_is_the_fields_order():
    assert list(LMOutput.__dataclass_fields__) == ["loss", "logits", "past", "hidden_states", "attentions"]
    assert list(BaseOutput.__dataclass_fields__) == ["last_hidden_state", "past", "hidden_states", "attentions"]
    assert list(DoubleHeadsOutput.__dataclass_fields__)[:4] == ["loss", "logits", "mc_logits", "past"]
    assert list(QuestionAnsweringOutput.__dataclass_fields__)[:3] == ["loss", "start_logits", "end_logits"]
