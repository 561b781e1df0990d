"""`tf.function` without tracing anew, XLA with sizes that vary, memory that stays, and the trees both rest on."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from gpt2_tf import Past, TFGPT2DoubleHeadsModel
from gpt2_tf.outputs import LMOutput
from models import padded_mask
from tf.helpers import MODELS, batch_of, close, ids_of, keras, model_of, tf, tiny


def traced(model, **options):
    return tf.function(model, autograph=False, reduce_retracing=True, **options)


# -- tf.function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
def test_every_model_is_one_graph(cls):
    model = tiny(cls, dtype="float64")
    batch = {name: tf.constant(value) for name, value in batch_of(model, 2, 6).items()}
    out, expected = traced(model)(**batch), model(**batch)
    assert type(out) is type(expected)
    assert out.keys() == expected.keys()
    close(out[0], expected[0])
    assert type(out.past) is Past


def test_each_size_that_varies_is_traced_once_more_and_sizes_left_open_never():
    model = tiny(dtype="float64")
    spec = tf.TensorSpec((None, None), tf.int64)
    run = traced(lambda ids, mask: model(ids, attention_mask=mask, labels=ids).loss)
    open_sizes = tf.function(
        lambda ids, mask: model(ids, attention_mask=mask, labels=ids).loss, input_signature=[spec, spec],
        autograph=False,
    )  # fmt: skip
    for rows, T in ((2, 8), (2, 9), (3, 10), (5, 16), (1, 2)):
        ids, mask = ids_of(model, rows, T), tf.constant(padded_mask(rows, T))
        expected = model(ids, attention_mask=mask, labels=ids).loss
        close(run(ids, mask), expected)
        close(open_sizes(ids, mask), expected)
    assert run.experimental_get_tracing_count() == 3
    assert open_sizes.experimental_get_tracing_count() == 1


def test_decoding_is_traced_twice_and_never_again():
    model = tiny(dtype="float64", n_positions=64)
    ids = ids_of(model, 2, 30)
    run = traced(lambda ids, past: (lambda out: (out.logits, tuple(out.past)))(model(ids, past)))
    past = tuple(model(ids[:, :8]).past)
    counts = []
    for at in range(8, 30):
        logits, past = run(ids[:, at : at + 1], past)
        counts.append(run.experimental_get_tracing_count())
    close(logits[:, 0], model(ids).logits[:, 29])
    assert (counts[0], set(counts[1:])) == (1, {2})


def test_generating_traces_a_step_of_each_kind_and_never_again():
    def traces():
        return sum(each.experimental_get_tracing_count() for each in model._passes)

    model = tiny(n_positions=64)
    ids = ids_of(model, 2, 5)
    for prompt in (ids, ids[:, :3], ids[:1], ids_of(model, 4, 9)):
        model.generate(prompt, max_new_tokens=12, eos_token_id=())
    count = traces()
    for prompt in (ids_of(model, 3, 7), ids_of(model, 2, 20)):
        model.generate(prompt, max_new_tokens=9, eos_token_id=(), do_sample=True, num_return_sequences=2)
    assert traces() == count <= 6  # prompts, steps; rows and lengths each once more


# -- XLA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", ["fixed", "free"])
def test_a_forward_pass_by_xla_equals_the_plain_one(sizes):
    model = tiny()
    shape = (2, 6) if sizes == "fixed" else (None, None)
    spec = tf.TensorSpec(shape, tf.int64)
    run = tf.function(
        lambda ids, mask: model(ids, attention_mask=mask, labels=ids).to_tuple()[:2],
        input_signature=[spec, spec], jit_compile=True, autograph=False,
    )  # fmt: skip
    for rows, T in ((2, 6),) if sizes == "fixed" else ((2, 6), (3, 9)):
        ids, mask = ids_of(model, rows, T), tf.constant(padded_mask(rows, T))
        expected = model(ids, attention_mask=mask, labels=ids)
        loss, logits = run(ids, mask)
        close(loss, expected.loss, 1e-5)
        close(logits, expected.logits, 1e-5)
    assert run.experimental_get_tracing_count() == 1


def test_a_step_of_decoding_by_xla_equals_the_plain_one():
    model = tiny()
    ids = ids_of(model, 2, 7)
    run = traced(lambda ids, past: (*model(ids, past).past, model(ids, past).logits), jit_compile=True)
    past = tuple(model(ids[:, :5]).past)
    for at in (5, 6):
        *past, logits = run(ids[:, at : at + 1], tuple(past))
        close(logits[:, 0], model(ids).logits[:, at], 1e-5)


def test_a_training_step_with_dropout_and_checkpointing_by_xla_is_finite_and_repeats():
    keras.utils.set_random_seed(0)
    model = tiny(resid_pdrop=0.3, attn_pdrop=0.3)
    model.gradient_checkpointing_enable()
    batch = {name: tf.constant(value) for name, value in batch_of(model, 2, 6).items()}
    start, found = model.transformer.seed_generator.state.numpy(), []

    def gradients():
        with tf.GradientTape() as tape:
            loss = model(**batch, training=True).loss
        return [loss, *map(tf.convert_to_tensor, tape.gradient(loss, model.trainable_variables))]

    run = tf.function(gradients, jit_compile=True, autograph=False)
    for enable in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        model.transformer.seed_generator.state.assign(start)
        found.append([each.numpy() for each in run()])
        enable()
    for one, other in zip(*found, strict=True):
        assert np.isfinite(one).all()
        close(one, other, 1e-5)


# -- memory --------------------------------------------------------------------------------------------------------


STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not STATM.exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("what", ["eager calls", "traced steps", "generated texts"])
def test_a_thousand_calls_leave_memory_as_it_was(what):
    model = tiny(vocab_size=5003, n_positions=32)
    ids = ids_of(model, 1, 20)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = keras.optimizers.SGD(1e-6)

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            loss = model(**batch, training=True).loss
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    if what == "traced steps":
        optimizer.build(model.trainable_variables)
    call, times = {
        "eager calls": (lambda: model(ids, model(ids[:, :5]).past), 100),
        "traced steps": (step, 1000),
        "generated texts": (lambda: model.generate(ids[:, :5], max_new_tokens=5, eos_token_id=()), 60),
    }[what]

    def resident():
        gc.collect()
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(times // 10):
        call()
    before = resident()
    for _ in range(times):
        call()
    # Logits that were kept would take 0.4 MB a call, or 0.02 MB a token.
    assert resident() - before < 6e6


# -- trees -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
def test_outputs_are_trees_that_come_back_as_they_were(cls):
    model = tiny(cls)
    out = model(ids_of(model, 2, 5), output_hidden_states=True)
    doubled = keras.tree.map_structure(lambda tensor: tensor * 2, out)
    assert type(doubled) is type(out)
    assert doubled.keys() == out.keys()
    close(doubled[0], out[0] * 2)
    close(doubled.past[0][1], out.past[0][1] * 2)
    assert type(doubled.past) is Past


def test_an_output_is_what_a_function_takes_and_gives():
    model = model_of()
    ids = ids_of(model, 2, 5)
    out = model(ids)
    again = tf.function(lambda out: out, autograph=False)(out)
    assert type(again) is LMOutput
    assert again.loss is None
    close(again.logits, out.logits, 0)
    close(model(ids[:, :1], again.past).logits, model(ids[:, :1], out.past).logits, 0)


def test_leaves_are_found_by_their_paths():
    model = tiny(TFGPT2DoubleHeadsModel)
    flat = keras.tree.flatten_with_path(model(ids_of(model, 1, 3)))
    assert [path for path, _ in flat][:2] == [("logits",), ("mc_logits",)]
    assert [path for path, _ in flat][2:] == [("past", 0, which) for which in range(2)]
