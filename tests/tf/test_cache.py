"""`Past` as a value: nothing that is done with it changes it, inside tf.function and out."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from gpt2_core.errors import InputError
from gpt2_tf import Past
from tf.helpers import close, equal, ids_of, keras, model_of, tf


def first(model, T=4):
    return model(ids_of(model, 2, T)).past


def step(model, past, seed=0):
    return model(ids_of(model, past[0][0].shape[0], 1, seed=seed), past)


def test_one_past_serves_any_number_of_continuations():
    model = model_of()
    past = first(model)
    before = [tensor.numpy() for pair in past for tensor in pair]
    one, two = step(model, past, 1), step(model, past, 2)
    assert not equal(one.logits, two.logits)
    assert equal(step(model, past, 1).logits, one.logits)
    assert (past.length, one.past.length, two.past.length) == (4, 5, 5)
    assert all(equal(tensor, old) for tensor, old in zip([t for pair in past for t in pair], before, strict=True))


def test_crop_and_reorder_leave_the_original_as_it_is():
    model = model_of()
    ids, more = ids_of(model, 2, 6), ids_of(model, 2, 3, seed=5)
    past = model(ids).past
    whole = model(more, past).logits
    short = past.crop(3)
    assert (type(short), short.length, past.length) == (Past, 3, 6)
    close(model(ids[:, 3:], short).logits, model(ids).logits[:, 3:])
    rows = [1, 1, 0]
    close(model(tf.gather(more, rows), past.reorder(tf.constant(rows))).logits, tf.gather(whole, rows))
    close(model(more, past).logits, whole)


def test_every_form_of_a_past_is_taken():
    model = model_of()
    ids = ids_of(model, 2, 6)
    past = model(ids[:, :4]).past
    expected = model(ids[:, 4:], past).logits
    forms = {
        "pairs": tuple(tuple(pair) for pair in past),
        "lists": [list(pair) for pair in past],
        "stacked pairs": tuple(tf.stack(pair) for pair in past),
        "one tensor": tf.stack([tf.stack(pair) for pair in past]),
        "variables' values": tuple((tf.Variable(key).read_value(), value) for key, value in past),
    }
    for name, form in forms.items():
        assert equal(model(ids[:, 4:], form).logits, expected), name
        assert equal(model(ids[:, 4:], past_key_values=form).logits, expected), name


def test_a_past_of_no_positions_is_no_past():
    model = model_of()
    ids = ids_of(model, 2, 5)
    plain = model(ids)
    assert equal(model(ids, past=plain.past.crop(0)).logits, plain.logits)
    assert equal(model(ids, past=()).logits, plain.logits)


def test_a_past_is_refused_where_a_static_shape_shows_the_fault_also_while_tracing():
    model = model_of()
    past, new = first(model), ids_of(model, 2, 1)
    run = tf.function(lambda ids, past: model(ids, past).logits, autograph=False)
    for call in (model, run):
        with pytest.raises(InputError, match="past has 1 layers, expected 2"):
            call(new, past[:1])
        with pytest.raises(InputError, match=r"past\[0\] has shape \(2, 2, 4, 4\), expected \(1, 2, 4, 4\)"):
            call(new[:1], past)
        short = (past[0], (past[1][0][:, :, :3], past[1][1]))
        with pytest.raises(InputError, match=r"past\[1\] has shape \(2, 2, 3, 4\), expected \(2, 2, 4, 4\)"):
            call(new, short)
    with pytest.raises(InputError, match=r"past is a .* expected 2 pairs"):
        model(new, ["ab", "cd"])
    with pytest.raises(InputError, match=r"past\[0\] has shape \(1,\), expected \(2, 2, None, 4\)"):
        model(new, [[np.ones(1)] * 2] * 2)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "optree", "tf.nest", "tf.function", "an output"])
def test_a_past_survives_whatever_it_goes_through(through):
    model = model_of()
    past = first(model)
    if through == "deepcopy":
        other = copy.deepcopy(past)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(past))
    elif through == "optree":
        other = keras.tree.map_structure(tf.identity, past)
    elif through == "tf.nest":
        other = tf.nest.map_structure(tf.identity, past)
    elif through == "tf.function":
        other = tf.function(lambda past: past)(past)
    else:
        other = tf.function(lambda: model(ids_of(model, 2, 4)), autograph=False)().past
    assert type(other) is (tuple if through == "tf.function" else Past)
    close(other[1][0], past[1][0])
    close(step(model, other, 1).logits, step(model, past, 1).logits)


def test_a_length_that_is_not_known_while_tracing_is_a_tensor():
    model = model_of()
    past, seen = first(model), []

    @tf.function(input_signature=[[tf.TensorSpec((2, 2, None, 4), tf.float64)] * 4], autograph=False)
    def run(tensors):
        past = Past((tensors[2 * i], tensors[2 * i + 1]) for i in range(2))
        seen.append(past.length)
        return model(tf.ones((2, 1), tf.int64), past).past.length

    assert run([tensor for pair in past for tensor in pair]) == 5
    assert tf.is_tensor(seen[0])


def test_gradients_flow_through_a_past():
    model = model_of()
    ids = ids_of(model, 2, 8)
    weight = model.transformer.h[0].attn.c_attn.weight

    def gradient(split):
        with tf.GradientTape() as tape:
            logits = model(ids[:, split:], model(ids[:, :split]).past).logits if split else model(ids).logits[:, 3:]
            loss = tf.reduce_sum(tf.square(logits))
        return tape.gradient(loss, weight)

    close(gradient(3), gradient(0), 1e-9)


@pytest.mark.parametrize("order", ["narrow then wide", "wide then narrow"])
def test_a_past_of_another_number_format_may_be_continued(order):
    wide, narrow = model_of(dtype="float32"), model_of(dtype="mixed_bfloat16")
    begin, then = (narrow, wide) if order == "narrow then wide" else (wide, narrow)
    ids = ids_of(wide, 2, 8)
    out = then(ids[:, 4:], begin(ids[:, :4]).past)
    assert out.past[0][0].dtype == then.compute_dtype
    close(tf.cast(out.logits, tf.float32), wide(ids).logits[:, 4:], 0.1)


def test_beams_share_a_past():
    model = model_of()
    ids = ids_of(model, 2, 5)
    past = model(ids).past.reorder(tf.constant([0, 0, 0, 1, 1, 1]))
    new = ids_of(model, 6, 1, seed=2)
    whole = tf.concat((tf.repeat(ids, 3, axis=0), new), axis=1)
    close(model(new, past).logits[:, 0], model(whole).logits[:, -1])
