"""The same model in training, with checkpointing, under autocast, in other number formats and by either kernel."""

from __future__ import annotations

import pytest

import gpt2_pt.attention
from gpt2_pt import GPT2DoubleHeadsModel, GPT2ForTokenClassification, GPT2LMHeadModel
from models import padded_mask
from pt.helpers import MODELS, ids_of, model_of, torch
from tolerances import REFERENCE, error

MASK = torch.from_numpy(padded_mask(3, 6))


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(one, other, **tolerance):
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], **tolerance, msg=name)


# -- gradient checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("cls", [GPT2LMHeadModel, GPT2DoubleHeadsModel])
def test_gradient_checkpointing_gives_equal_gradients(cls, dropout):
    model = model_of(
        cls, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, summary_first_dropout=0.0
    ).train()
    ids = ids_of(model, 3, 6)
    inputs = {"input_ids": ids, "labels": ids, "output_hidden_states": True, "output_attentions": True}
    if cls is GPT2DoubleHeadsModel:
        inputs["mc_labels"] = torch.tensor([0, 1, 1])
    found = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        torch.manual_seed(0)
        found.append(gradients(model, **inputs))
    assert_equal_gradients(*found, rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_recomputes_each_block_and_keeps_no_cache():
    model = model_of().train()
    ids, calls = ids_of(model, 2, 5), []
    model.transformer.h[1].ln_1.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    out = model(ids, labels=ids)
    assert out.past is None
    out.loss.backward()
    assert len(calls) == 2
    model.gradient_checkpointing_disable()
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 3


def test_gradient_checkpointing_goes_with_a_past_and_sleeps_in_evaluation():
    model = model_of().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in model.transformer.h:
        block.attn.attn_pdrop = 0.0
    ids = ids_of(model, 2, 8)
    past = model(ids[:, :4]).past
    plain = gradients(
        model, input_ids=ids[:, 4:], past=tuple((k.detach(), v.detach()) for k, v in past), labels=ids[:, 4:]
    )
    model.gradient_checkpointing_enable()
    again = gradients(
        model, input_ids=ids[:, 4:], past=tuple((k.detach(), v.detach()) for k, v in past), labels=ids[:, 4:]
    )
    assert_equal_gradients(plain, again, rtol=1e-12, atol=1e-12)
    assert model.eval()(ids).past is not None


# -- dropout -----------------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_alone():
    model = model_of()
    ids = ids_of(model, 2, 6)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("place", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("eager", [False, True])
def test_each_dropout_acts_by_its_own_chance(place, eager):
    chances = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    quiet, loud = model_of(**chances).train(), model_of(**(chances | {place: 0.5})).train()
    ids = ids_of(quiet, 2, 6)
    torch.testing.assert_close(quiet(ids, output_attentions=eager)[0], model_of()(ids)[0])
    assert not torch.equal(loud(ids, output_attentions=eager)[0], loud(ids, output_attentions=eager)[0])


def test_dropped_attention_probabilities_keep_their_mean():
    q = torch.zeros(1, 1, 1, 2)
    v = torch.ones(1, 1, 50_000, 2)
    torch.manual_seed(0)
    y, probs = gpt2_pt.attention.attend(
        q, torch.zeros_like(v), v, torch.ones(1, 1, 1, 50_000).bool(), scale=1, dropout=0.25
    )
    assert abs(float((probs == 0).float().mean()) - 0.25) < 0.01
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0.02, atol=0.02)


def test_a_token_classifier_drops_as_its_config_says():
    for chance, expected in ((None, 0.1), (0.0, 0.0), (0.4, 0.4)):
        assert model_of(GPT2ForTokenClassification, classifier_dropout=chance).dropout.p == expected


# -- kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("mask", [None, "left", "right"])
@pytest.mark.parametrize("T", [1, 5])
def test_fused_and_written_out_attention_agree(past, mask, T):
    model = model_of()
    ids = ids_of(model, 4, past + T)
    real = None if mask is None else torch.from_numpy(padded_mask(4, past + T, mask))
    cache = None
    if past:
        cache = model(ids[:, :past], attention_mask=None if real is None else real[:, :past]).past
    fused = model(ids[:, past:], cache, real).logits
    eager = model(ids[:, past:], cache, real, output_attentions=True).logits
    torch.testing.assert_close(fused, eager, rtol=1e-12, atol=1e-12)


def test_gradients_agree_by_either_kernel():
    model = model_of()
    ids = ids_of(model, 3, 6)
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": MASK}
    one, other = gradients(model, **inputs), gradients(model, **inputs, output_attentions=True)
    assert_equal_gradients(one, other, rtol=1e-10, atol=1e-12)


def test_the_fused_kernel_is_used_unless_probabilities_are_needed(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(gpt2_pt.attention.F, "scaled_dot_product_attention", counted)
    model = model_of()
    ids = ids_of(model, 2, 4)
    for inputs, fused in (({}, 2), ({"output_attentions": True}, 0), ({"head_mask": torch.ones(2, 2)}, 0)):
        calls.clear()
        model(ids, **inputs)
        assert len(calls) == fused
    for dtype, fused in ((torch.float32, 2), (torch.bfloat16, 0)):
        calls.clear()
        model_of(dtype=dtype, reorder_and_upcast_attn=True)(ids)
        assert len(calls) == fused


def test_a_padded_query_gives_finite_numbers_and_gradients():
    model = model_of()
    ids = ids_of(model, 3, 6)
    mask = torch.zeros(3, 6, dtype=torch.int64)
    mask[0, 3] = 1  # and two rows without any real token
    for eager in (False, True):
        model.zero_grad()
        out = model(ids, attention_mask=mask, output_attentions=eager)
        assert out.logits.isfinite().all()
        out.logits.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# -- number formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_a_converted_model_runs_forward(cls, convert):
    model = getattr(model_of(cls, dtype=torch.float32), convert)()
    out = model(ids_of(model, 2, 5))
    assert out[0].dtype == model.dtype
    assert out[0].isfinite().all()
    assert {tensor.dtype for pair in out.past for tensor in pair} == {model.dtype}


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("upcast", [False, True])
def test_a_converted_model_trains_and_generates(convert, upcast):
    model = getattr(model_of(dtype=torch.float32, reorder_and_upcast_attn=upcast), convert)()
    ids = ids_of(model, 2, 5)
    out = model(ids, labels=ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    assert out.loss.dtype == (torch.float64 if convert == "double" else torch.float32)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.generate(ids, max_new_tokens=4, eos_token_id=()).shape == (2, 9)


@pytest.mark.parametrize("upcast", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast_computes_forward_backward_and_generates(kind, upcast):
    model = model_of(dtype=torch.float32, reorder_and_upcast_attn=upcast)
    ids = ids_of(model, 3, 6)
    expected = model(ids, labels=ids, attention_mask=MASK)
    with torch.autocast("cpu", kind):
        out = model(ids, labels=ids, attention_mask=MASK)
        text = model.generate(ids, max_new_tokens=4, eos_token_id=())
    name = str(kind).removeprefix("torch.")
    assert error(out.loss.detach(), expected.loss.detach()) <= REFERENCE[name].loss
    assert error(out.logits.detach().float(), expected.logits.detach()) <= REFERENCE[name].values
    assert out.logits.dtype == kind
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert text.shape == (3, 10)


def test_default_dtype_is_what_a_new_model_is_made_in():
    torch.set_default_dtype(torch.float64)
    try:
        model = GPT2LMHeadModel(model_of().config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert GPT2LMHeadModel(model_of().config).dtype == torch.float32


def test_a_few_steps_of_training_lower_the_loss():
    model = model_of(dtype=torch.float32).train()
    ids = ids_of(model, 4, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    torch.manual_seed(0)
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model.lm_head.weight is model.transformer.wte.weight
