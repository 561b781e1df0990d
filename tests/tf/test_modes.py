"""The same model in training, with checkpointing, in other number formats, and by pieces of the queries."""

from __future__ import annotations

import numpy as np
import pytest

import gpt2_tf.attention
import gpt2_tf.layers
from gpt2_tf import TFGPT2DoubleHeadsModel, TFGPT2ForTokenClassification, TFGPT2LMHeadModel
from models import padded_mask
from tf.helpers import MODELS, QUIET, batch_of, close, equal, ids_of, keras, model_of, tf, tiny
from tolerances import REFERENCE, error

MASK = padded_mask(3, 6)


def gradients(model, **inputs):
    with tf.GradientTape() as tape:
        loss = model(**inputs).loss
    found = tape.gradient(loss, model.trainable_variables)
    return [loss.numpy(), *(tf.convert_to_tensor(each).numpy() for each in found)]


def assert_equal_gradients(one, other, tolerance=1e-12):
    for left, right in zip(one, other, strict=True):
        close(left, right, tolerance)


# -- gradient checkpointing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "policy"), [("eager", "float64"), ("eager", "mixed_bfloat16"), ("tf.function", "float64")]
)
def test_gradient_checkpointing_gives_equal_gradients_with_dropout_too(where, policy):
    keras.utils.set_random_seed(3)
    model = model_of(TFGPT2DoubleHeadsModel, dtype=policy, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    inputs = batch_of(model, 3, 6) | {"training": True, "output_hidden_states": True, "output_attentions": True}
    start, found = model.transformer.seed_generator.state.numpy(), []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.transformer.seed_generator.state.assign(start)
        run = gradients if where == "eager" else graph_gradients
        found.append(run(model, **inputs))
    assert_equal_gradients(*found, 1e-12 if policy == "float64" else 1e-2)


def graph_gradients(model, **inputs):
    def run():
        with tf.GradientTape() as tape:
            loss = model(**inputs).loss
        return [loss, *map(tf.convert_to_tensor, tape.gradient(loss, model.trainable_variables))]

    return [each.numpy() for each in tf.function(run, autograph=False)()]


def test_gradient_checkpointing_recomputes_each_block_and_keeps_no_cache(monkeypatch):
    model = model_of()
    ids, calls = ids_of(model, 2, 5), []
    layer = model.transformer.h[1].ln_1
    real = layer.call
    monkeypatch.setattr(layer, "call", lambda x: (calls.append(1), real(x))[1])
    model.gradient_checkpointing_enable()
    assert model(ids, training=True).past is None
    calls.clear()
    gradients(model, input_ids=ids, labels=ids, training=True)
    assert len(calls) == 2
    assert model(ids).past is not None
    model.gradient_checkpointing_disable()
    calls.clear()
    gradients(model, input_ids=ids, labels=ids, training=True)
    assert len(calls) == 1


def test_gradient_checkpointing_goes_with_a_past_with_frozen_parts_and_with_fit():
    model = tiny(dtype="float64", n_layer=2)
    model.transformer.h[0].attn.trainable = False
    ids = ids_of(model, 2, 8)
    past = model(ids[:, :4]).past
    inputs = {"input_ids": ids[:, 4:], "past": past, "labels": ids[:, 4:], "training": True}
    plain = gradients(model, **inputs)
    model.gradient_checkpointing_enable()
    assert_equal_gradients(plain, gradients(model, **inputs))
    losses = []
    for eagerly in (False, True):
        other = tiny()
        other.compile(keras.optimizers.SGD(0.1), run_eagerly=eagerly)
        if not eagerly:
            other.gradient_checkpointing_enable()
        losses.append(other.fit(batch_of(other, 4, 6), epochs=3, verbose=0, shuffle=False).history["loss"])
    close(*losses, 1e-5)


# -- dropout -----------------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_alone():
    model = model_of()
    ids = ids_of(model, 2, 6)
    assert equal(model(ids).logits, model(ids, training=False).logits)
    assert not equal(model(ids, training=True).logits, model(ids, training=True).logits)
    assert equal(model(ids).logits, model_of()(ids).logits)


@pytest.mark.parametrize("place", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
def test_each_dropout_acts_by_its_own_chance(place):
    chances = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    quiet, loud = model_of(**chances), model_of(**(chances | {place: 0.5}))
    ids = ids_of(quiet, 2, 6)
    close(quiet(ids, training=True)[0], model_of()(ids)[0])
    assert not equal(loud(ids, training=True)[0], loud(ids, training=True)[0])


def test_the_seed_of_keras_repeats_dropout_and_training():
    def run():
        keras.utils.set_random_seed(7)
        model = tiny(TFGPT2ForTokenClassification, resid_pdrop=0.3, attn_pdrop=0.3, classifier_dropout=0.5)
        ids = ids_of(model, 2, 6)
        first = [model(ids, training=True).logits.numpy() for _ in range(2)]
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
        return [*first, *model.fit(batch_of(model, 4, 6), epochs=2, verbose=0).history["loss"]]

    one, two = run(), run()
    assert all(equal(left, right) for left, right in zip(one, two, strict=True))
    assert not equal(one[0], one[1])


def test_dropout_differs_from_call_to_call_of_one_traced_function():
    model = model_of(n_layer=1)
    ids = ids_of(model, 2, 6)
    run = tf.function(lambda: model(ids, training=True).logits, autograph=False)
    assert not equal(run(), run())


def test_dropped_attention_probabilities_keep_their_mean():
    q, v = tf.zeros((1, 1, 1, 2)), tf.ones((1, 1, 50_000, 2))
    y, probs = gpt2_tf.attention.attend(
        q, tf.zeros_like(v), v, tf.ones((1, 1, 1, 50_000), tf.bool), scale=1, dropout=0.25, seed=tf.constant([1, 2])
    )
    assert abs(np.mean(probs.numpy() == 0) - 0.25) < 0.01
    close(y, tf.ones_like(y), 0.02)


def test_a_token_classifier_drops_as_its_config_says():
    for chance, expected in ((None, 0.1), (0.0, 0.0), (0.4, 0.4)):
        assert tiny(TFGPT2ForTokenClassification, classifier_dropout=chance).classifier_dropout == expected


# -- pieces of the queries -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_attention_in_pieces_equals_attention_in_one(monkeypatch, pieces):
    model = model_of(**QUIET)
    ids = ids_of(model, 2, 11)
    whole, grads = model(ids).logits, gradients(model, input_ids=ids, labels=ids)
    monkeypatch.setattr(gpt2_tf.attention, "_QUERIES", pieces)
    close(model(ids).logits, whole)
    assert_equal_gradients(gradients(model, input_ids=ids, labels=ids), grads, 1e-10)
    close(model(ids, output_attentions=True).logits, whole)


def test_a_padded_query_gives_finite_numbers_and_gradients():
    model = model_of()
    mask = np.zeros((3, 6), np.int64)
    mask[0, 3] = 1  # and two rows without any real token
    with tf.GradientTape() as tape:
        logits = model(ids_of(model, 3, 6), attention_mask=mask).logits
        loss = tf.reduce_sum(logits)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(tf.convert_to_tensor(each)).all() for each in tape.gradient(loss, model.trainable_variables))


# -- number formats ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
def test_every_model_runs_in_every_policy(cls, policy):
    model = model_of(cls, dtype=policy)
    out = model(ids_of(model, 2, 5))
    kind = policy.removeprefix("mixed_")
    assert out[0].dtype == kind
    assert np.isfinite(tf.cast(out[0], tf.float32)).all()
    assert {tensor.dtype.name for pair in out.past for tensor in pair} == {kind}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("upcast", [False, True])
def test_mixed_policies_stay_within_the_published_table_and_generate(policy, upcast):
    model = model_of(dtype=policy, reorder_and_upcast_attn=upcast)
    wide = model_of(dtype="float32", reorder_and_upcast_attn=upcast)
    ids = ids_of(model, 3, 6)
    out, expected = (each(ids, labels=ids, attention_mask=MASK) for each in (model, wide))
    limits = REFERENCE[policy.removeprefix("mixed_")]
    assert error(out.loss, expected.loss) <= limits.loss
    assert error(tf.cast(out.logits, tf.float32), expected.logits) <= limits.values
    found = gradients(model, input_ids=ids, labels=ids, attention_mask=MASK)
    assert {each.dtype for each in found} == {np.dtype(np.float32)}
    assert model.generate(ids, MASK, max_new_tokens=3, eos_token_id=()).shape == (3, 9)


def test_layer_norms_keep_their_gains_wide_under_a_mixed_policy(monkeypatch):
    model, seen = tiny(dtype="mixed_bfloat16"), []
    norm = model.transformer.ln_f
    norm.weight.assign(tf.fill((8,), 1.0 + 2**-9))  # in bfloat16 this is 1
    real = norm.call

    def spied(x):
        seen.append(gpt2_tf.layers.in_dtype(norm.weight, tf.float32))
        return real(x)

    monkeypatch.setattr(norm, "call", spied)
    model(ids_of(model, 1, 3))
    close(seen[0], np.full(8, 1.0 + 2**-9), 0)


def test_a_few_steps_of_a_loop_by_hand_lower_the_loss():
    model = TFGPT2LMHeadModel(tiny().config)
    ids = ids_of(model, 4, 10)
    optimizer = keras.optimizers.AdamW(3e-3)

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    optimizer.build(model.trainable_variables)
    losses = [float(step()) for _ in range(60)]
    assert losses[-1] < 0.7 * losses[0]
    assert step.experimental_get_tracing_count() == 1
