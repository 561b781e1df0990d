"""``compile``, ``fit``, ``evaluate`` and ``predict``."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest

from gpt2_core.adapters import Lora
from gpt2_core.errors import ConfigError, InputError
from gpt2_core.reference import ReferenceModel
from gpt2_tf import (
    Perplexity,
    TFGPT2DoubleHeadsModel,
    TFGPT2ForQuestionAnswering,
    TFGPT2ForSequenceClassification,
    TFGPT2LMHeadModel,
    TFGPT2Model,
    training,
)
from gpt2_tf.adapters import attach, detach
from models import padded_mask
from tf.helpers import WITH_LOSS, batch_of, close, equal, keras, model_of, tf, tiny, values


def compiled(cls=TFGPT2LMHeadModel, optimizer=None, dtype="float32", config=(), **options):
    model = tiny(cls, dtype=dtype, **dict(config))
    options = {"run_eagerly": True} | options
    model.compile(optimizer or keras.optimizers.SGD(0.1), **options)
    return model


def by_hand(cls=TFGPT2LMHeadModel, batches=(), dtype="float32", rate=0.1, **changes):
    """The model after a step of plain gradient descent on each batch, and the losses before each."""
    model, losses = tiny(cls, dtype=dtype, **changes), []
    for batch in batches:
        with tf.GradientTape() as tape:
            loss = model(batch).loss
        for variable, gradient in zip(
            model.trainable_variables, tape.gradient(loss, model.trainable_variables), strict=True
        ):
            variable.assign_sub(rate * tf.convert_to_tensor(gradient))
        losses.append(float(loss))
    return model, losses


def assert_same_training(one, other, tolerance=1e-5):
    for (name, left), right in zip(values(one).items(), values(other).values(), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, err_msg=name)


# -- the same training, whatever the door --------------------------------------------------------------------------


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_fit_trains_each_head_on_its_own_loss_as_a_loop_by_hand_does(cls):
    model = compiled(cls)
    batch = batch_of(model, 4, 6)
    history = model.fit(batch, batch_size=4, epochs=2, verbose=0).history
    other, losses = by_hand(cls, [batch, batch])
    assert_same_training(model, other)
    close(history["loss"], losses, 1e-5)
    close(model.evaluate(batch, verbose=0), float(other(batch).loss), 1e-5)


DOORS = {
    "run_eagerly": {"run_eagerly": True},
    "tf.function": {"run_eagerly": False, "jit_compile": False},
    "XLA": {"run_eagerly": False, "jit_compile": True},
    "two steps per execution": {"run_eagerly": False, "steps_per_execution": 2},
}


@pytest.mark.parametrize("door", DOORS)
def test_every_way_to_run_a_step_trains_the_same(door):
    model = compiled(**DOORS[door], metrics=["accuracy"])
    batch = batch_of(model, 4, 6) | {"attention_mask": padded_mask(4, 6)}
    history = model.fit(batch, batch_size=2, shuffle=False, verbose=0).history
    halves = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    other, losses = by_hand(batches=halves)
    assert_same_training(model, other)
    close(history["loss"], [np.mean(losses)], 1e-5)
    assert model.jit_compile is (door == "XLA")
    if door == "run_eagerly":
        auto = compiled(run_eagerly=False, jit_compile="auto")
        assert auto.jit_compile == bool(tf.config.list_physical_devices("GPU"))


def test_labels_are_taken_from_wherever_they_are():
    batch = batch_of(tiny(), 4, 6)
    ids, labels, mask = batch["input_ids"], batch["labels"], padded_mask(4, 6)
    together = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    apart = {"input_ids": ids, "attention_mask": mask}
    doors = {
        "a dict": (together,),
        "x and y": (apart, labels),
        "y by name": (apart, {"labels": labels}),
        "tf.data, a dict": (tf.data.Dataset.from_tensor_slices(together).batch(4),),
        "tf.data, pairs": (tf.data.Dataset.from_tensor_slices((apart, labels)).batch(4).prefetch(1),),
        "a generator": ((each for each in [(apart, labels)]),),
        "tensors": ({name: tf.constant(value) for name, value in together.items()},),
    }
    expected = None
    for name, data in doors.items():
        model = compiled()
        loss = model.fit(*data, shuffle=False, verbose=0).history
        expected = expected or (model, loss)
        assert loss == expected[1], name
        assert_same_training(model, expected[0], 0)
    plain = compiled()
    assert plain.fit(ids, labels, verbose=0).history["loss"][0] == pytest.approx(float(tiny()(ids, labels=labels).loss))


def test_several_labels_may_come_as_a_tuple_or_by_name():
    for cls, names in (
        (TFGPT2ForQuestionAnswering, ("start_positions", "end_positions")),
        (TFGPT2DoubleHeadsModel, ("labels", "mc_labels")),
    ):
        batch = batch_of(tiny(cls), 4, 6)
        whole = compiled(cls).evaluate(batch, verbose=0)
        ids, y = batch["input_ids"], tuple(batch[name] for name in names)
        assert compiled(cls).test_on_batch(ids, y) == pytest.approx(whole)
        assert compiled(cls).evaluate(ids, dict(zip(names, y, strict=True)), verbose=0) == pytest.approx(whole)
    double = compiled(TFGPT2DoubleHeadsModel)
    only = {"input_ids": batch["input_ids"], "lm_labels": batch["labels"]}
    assert double.evaluate(only, verbose=0) == pytest.approx(double.evaluate(ids, batch["labels"], verbose=0))


def test_the_step_is_traced_once_and_once_more_for_lengths_that_vary():
    model = tiny(resid_pdrop=0.1)
    calls = []
    real = model.call
    model.call = lambda *args, **kwargs: (calls.append(1), real(*args, **kwargs))[1]
    model.compile("adamw", metrics=["accuracy", Perplexity()])
    model.fit(batch_of(model, 6, 5), batch_size=2, epochs=2, verbose=0)
    assert len(calls) == 1
    for T in (7, 16, 3):
        model.fit(batch_of(model, 2, T), verbose=0)
    assert len(calls) == 2


# -- options of the optimizer ----------------------------------------------------------------------------------------


def test_gradients_accumulate_over_steps():
    model = compiled(optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    batch = batch_of(model, 4, 6) | {"labels": batch_of(model, 4, 6)["input_ids"]}  # as many labels in each half
    model.fit(batch, batch_size=2, shuffle=False, verbose=0)
    assert_same_training(model, by_hand(batches=[batch])[0])


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_policies_train_and_keep_their_variables_wide(policy):
    model = compiled(dtype=policy, run_eagerly=policy != "mixed_float16", metrics=["accuracy"])
    batch = batch_of(model, 4, 6) | {"attention_mask": padded_mask(4, 6)}
    whole = by_hand(batches=[batch, batch])[0]
    losses = model.fit(batch, epochs=2, verbose=0).history["loss"]
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    wide = "float64" if policy == "float64" else "float32"
    assert {variable.dtype for variable in model.trainable_variables} == {wide}
    assert losses[1] < losses[0]
    assert_same_training(model, whole, 1e-5 if policy == "float64" else 1e-2)
    assert model(batch).logits.dtype == model.compute_dtype
    assert model(batch).loss.dtype == wide


def test_frozen_parts_stay_as_they_are():
    model = tiny()
    model.transformer.wte.trainable = False
    model.transformer.h[0].attn.trainable = False
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    before = values(model)
    model.fit(batch_of(model, 4, 6), verbose=0)
    frozen = {name for name, value in values(model).items() if np.array_equal(value, before[name])}
    assert frozen == {name for name in before if "attn" in name or "wte" in name}
    assert model.num_parameters(only_trainable=True) == sum(
        row.size for row in model.parameter_table() if row.name not in frozen
    )


# -- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_see_shifted_labels_and_skip_those_that_do_not_count():
    model = compiled(metrics=["accuracy", Perplexity(), "crossentropy"], config={"vocab_size": 5, "eos_token_id": None})
    batch = batch_of(model, 6, 6)
    batch["labels"][:, 3] = -1
    got = model.evaluate(batch, batch_size=4, verbose=0, return_dict=True)
    guess = model(batch).logits.numpy()[:, :-1].argmax(-1)
    wanted = batch["labels"][:, 1:]
    keep = wanted >= 0
    assert got["accuracy"] == pytest.approx((guess == wanted)[keep].mean())
    nll = float(ReferenceModel(model.config, values(model))(batch["input_ids"], labels=batch["labels"]).loss)
    assert got["crossentropy"] == pytest.approx(nll, rel=1e-5)
    assert got["perplexity"] == pytest.approx(np.exp(nll), rel=1e-5)
    names = ["loss", "accuracy", "perplexity", "crossentropy"]
    assert model.evaluate(batch, batch_size=4, verbose=0) == [got[name] for name in names]


def test_each_output_has_its_own_metrics():
    model = compiled(TFGPT2DoubleHeadsModel, metrics=["accuracy"])
    batch = batch_of(model, 4, 6)
    got = model.evaluate(batch, verbose=0, return_dict=True)
    assert set(got) == {"loss", "logits_accuracy", "mc_logits_accuracy"}
    right = model(batch).mc_logits.numpy().argmax(-1) == batch["mc_labels"]
    assert got["mc_logits_accuracy"] == pytest.approx(right.mean())
    named = compiled(TFGPT2DoubleHeadsModel, metrics={"mc_logits": "accuracy", "logits": [Perplexity()]})
    again = named.evaluate(batch, verbose=0, return_dict=True)
    assert set(again) == {"loss", "logits_perplexity", "mc_logits_accuracy"}
    del batch["mc_labels"]
    assert named.evaluate(batch, verbose=0, return_dict=True)["mc_logits_accuracy"] == 0


def test_positions_outside_the_text_count_for_no_metric():
    model = compiled(TFGPT2ForQuestionAnswering, metrics=["accuracy"])
    batch = batch_of(model, 4, 6)
    batch["end_positions"][:2] = 6, -1
    got = model.evaluate(batch, verbose=0, return_dict=True)
    right = model(batch).end_logits.numpy().argmax(-1) == batch["end_positions"]
    assert got["end_logits_accuracy"] == pytest.approx(right[2:].mean())


def test_numbers_as_labels_are_scored_too():
    model = compiled(TFGPT2ForSequenceClassification, config={"num_labels": 1}, metrics=["mae"])
    x = {"input_ids": batch_of(model, 4, 6)["input_ids"]}
    y = np.linspace(-1, 1, 4).astype(np.float32)
    got = model.evaluate(x, y, verbose=0, return_dict=True)
    made = model(x).logits.numpy()[:, 0]
    assert got["mae"] == pytest.approx(np.abs(made - y).mean(), rel=1e-5)
    assert got["loss"] == pytest.approx(((made - y) ** 2).mean(), rel=1e-5)

    def bias(y_true, y_pred):
        return y_pred - y_true

    double = compiled(TFGPT2ForSequenceClassification, config={"num_labels": 1}, metrics=[bias])
    assert double.evaluate(x, y, verbose=0, return_dict=True)["bias"] == pytest.approx((made - y).mean(), rel=1e-4)
    several = compiled(TFGPT2ForSequenceClassification, metrics=[keras.metrics.BinaryAccuracy(threshold=0.0)])
    y = np.eye(2, dtype=np.float32)[[0, 1, 1, 0]]
    got = several.evaluate(x, y, verbose=0, return_dict=True)
    assert got["binary_accuracy"] == pytest.approx(((several(x).logits.numpy() > 0) == y).mean())
    with pytest.raises(InputError, match=r"counts classes, but labels has dtype float32; .*BinaryAccuracy"):
        compiled(TFGPT2ForSequenceClassification, metrics=["accuracy"]).evaluate(x, y, verbose=0)


def test_the_perplexity_metric_also_goes_with_a_loss_of_ones_own():
    model = compiled(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=[Perplexity()])
    ids = batch_of(model, 4, 6)["input_ids"]
    got = model.evaluate(ids, ids, verbose=0, return_dict=True)
    assert got["perplexity"] == pytest.approx(np.exp(got["loss"]), rel=1e-5)
    assert Perplexity.from_config(Perplexity().get_config()).name == "perplexity"


# -- a loss of one's own ---------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_sees_logits_and_y_unshifted_with_sample_weights():
    model = compiled(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"),
        metrics=["accuracy"], weighted_metrics=["accuracy"],
    )  # fmt: skip
    ids = batch_of(model, 4, 6)["input_ids"]
    weights = np.random.default_rng(0).random(ids.shape)
    got = model.evaluate(ids, ids, sample_weight=weights, verbose=0, return_dict=True)
    probabilities = tf.nn.log_softmax(model(ids).logits).numpy()
    each = -np.take_along_axis(probabilities, ids[..., None], -1)[..., 0]
    assert got["loss"] == pytest.approx((each * weights).sum(), rel=1e-5)
    right = model(ids).logits.numpy().argmax(-1) == ids
    assert got["accuracy"] == pytest.approx(right.mean())
    assert got["weighted_accuracy"] == pytest.approx((right * weights).sum() / weights.sum(), rel=1e-5)
    before = values(model)["transformer.wpe.weight"]
    model.fit(ids, ids, sample_weight=weights, verbose=0)
    assert not np.array_equal(values(model)["transformer.wpe.weight"], before)


def test_a_dict_of_losses_names_outputs():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = compiled(TFGPT2ForQuestionAnswering, loss={"start_logits": loss, "end_logits": loss})
    x, y = batch_of(model, 4, 6)["input_ids"], {"start_logits": np.arange(4), "end_logits": np.arange(4)}
    got = model.evaluate(x, y, verbose=0, return_dict=True)
    expected = model(x, start_positions=np.arange(4), end_positions=np.arange(4)).loss
    assert got["loss"] == pytest.approx(2 * float(expected), rel=1e-5)


def test_the_bare_model_takes_a_loss_of_ones_own_on_its_hidden_states():
    model = compiled(TFGPT2Model, loss="mse")
    x = batch_of(model, 4, 6)["input_ids"]
    got = model.fit(x, np.zeros((4, 6, 8)), verbose=0).history["loss"][0]
    fresh = tiny(TFGPT2Model)
    assert got == pytest.approx(float(tf.reduce_mean(tf.square(fresh(x).last_hidden_state))), rel=1e-5)


def test_class_weights_go_with_a_loss_of_ones_own():
    model = compiled(TFGPT2ForSequenceClassification, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batch = batch_of(model, 4, 6)
    x, y = batch["input_ids"], np.array([0, 1, 1, 0])
    got = model.fit(x, y, class_weight={0: 1.0, 1: 3.0}, verbose=0).history["loss"][0]
    each = -tf.nn.log_softmax(tiny(TFGPT2ForSequenceClassification)(x).logits).numpy()[np.arange(4), y]
    assert got == pytest.approx((each * np.array([1, 3, 3, 1])).mean(), rel=1e-5)


# -- predict -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", WITH_LOSS)
def test_predict_gives_the_outputs_of_every_row_by_name(cls):
    model = tiny(cls, output_hidden_states=True)
    batch = batch_of(model, 5, 6)
    got = model.predict(batch, batch_size=2, verbose=0)
    expected = model(batch["input_ids"], use_cache=False)
    assert set(got) == set(expected.keys())
    for name in got:
        if name != "hidden_states":
            close(got[name], expected[name], 1e-5)
    close(got["hidden_states"][1], expected.hidden_states[1], 1e-5)
    alone = model.predict(batch["input_ids"], verbose=0)
    assert all(equal(alone[name].shape, got[name].shape) for name in got if name != "hidden_states")


def test_predict_heeds_the_mask_and_needs_no_compile():
    model = tiny()
    ids, mask = batch_of(model, 4, 6)["input_ids"], padded_mask(4, 6)
    data = tf.data.Dataset.from_tensor_slices({"input_ids": ids, "attention_mask": mask}).batch(3)
    close(model.predict(data, verbose=0)["logits"], model(ids, attention_mask=mask).logits, 1e-5)
    close(model.predict_on_batch({"input_ids": ids, "attention_mask": mask})["logits"],
          model(ids, attention_mask=mask).logits, 1e-5)  # fmt: skip


# -- callbacks -----------------------------------------------------------------------------------------------------


def test_callbacks_save_the_best_model_and_stop_early(tmp_path):
    model = compiled(metrics=["accuracy"])
    batch = batch_of(model, 4, 6)
    file, weights = tmp_path / "best.keras", tmp_path / "last.weights.h5"
    callbacks = [
        keras.callbacks.ModelCheckpoint(file, monitor="val_loss", save_best_only=True),
        keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=1, min_delta=10.0, restore_best_weights=True),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.BackupAndRestore(tmp_path / "backup"),
        keras.callbacks.TerminateOnNaN(),
    ]
    history = model.fit(batch, validation_data=batch, epochs=9, callbacks=callbacks, verbose=0).history
    assert len(history["val_loss"]) == 2
    best = keras.saving.load_model(file)
    assert best.evaluate(batch, verbose=0, return_dict=True)["loss"] == pytest.approx(min(history["val_loss"]))
    last = tiny(seed=3)
    last.load_weights(weights)
    assert float(last(batch).loss) == pytest.approx(history["val_loss"][-1], rel=1e-5)
    assert float(model(batch).loss) == pytest.approx(history["val_loss"][0], rel=1e-5)  # the second was no better


def test_tensorboard_gets_losses_and_a_histogram_for_every_parameter(tmp_path):
    pytest.importorskip("tensorboard")
    model = compiled(run_eagerly=False)
    batch = batch_of(model, 4, 6)
    model.fit(batch, callbacks=[keras.callbacks.TensorBoard(tmp_path, histogram_freq=1)], verbose=0)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_every_variable_has_a_path_of_its_own_and_says_where_it_stands():
    model = tiny(TFGPT2DoubleHeadsModel, n_layer=2, name="gpt")
    paths = [variable.path for variable in model.variables]
    assert len(set(paths)) == len(paths)
    assert "gpt/transformer/h_1/attn/c_attn/weight" in paths
    assert "gpt/multiple_choice_head/summary/bias" in paths


# -- refusing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [TFGPT2LMHeadModel, TFGPT2DoubleHeadsModel, TFGPT2Model])
def test_fitting_without_labels_says_what_is_missing(cls):
    model = compiled(cls, run_eagerly=cls is not TFGPT2LMHeadModel)
    wanted = {"lm": "labels", "double": "labels and mc_labels", "none": "a head"}[model.head.value]
    with pytest.raises(InputError, match=f"nothing to compute a loss from, expected {wanted} among the inputs"):
        model.fit(batch_of(model, 2, 5)["input_ids"], verbose=0)


def test_weights_that_the_models_own_loss_does_not_know_are_refused():
    model = compiled(TFGPT2ForSequenceClassification)
    batch = batch_of(model, 4, 6)
    for weights in ({"class_weight": {0: 1.0, 1: 2.0}}, {"sample_weight": np.ones(4)}):
        with pytest.raises(InputError, match=r"sample_weight or class_weight, .* with -100 .* loss of your own"):
            model.fit(batch["input_ids"], batch["labels"], **weights, verbose=0)


def test_what_compile_and_fit_cannot_take_is_refused():
    batch = batch_of(tiny(), 4, 6)
    ids, labels = batch["input_ids"], batch["labels"]
    with pytest.raises(InputError, match="metrics names the output 'logit'; did you mean 'logits'"):
        compiled(metrics={"logit": "accuracy"})
    with pytest.raises(InputError, match="got metrics and weighted_metrics, which are the same"):
        compiled(metrics=["accuracy"], weighted_metrics=["accuracy"])
    with pytest.raises(InputError, match="labels was given twice"):
        compiled().fit(batch, labels, verbose=0)
    with pytest.raises(InputError, match="got 2 inputs without names, expected a dict"):
        compiled().fit([ids, padded_mask(4, 6)], labels, verbose=0)
    with pytest.raises(InputError, match=r"takes no 'atention_mask'.*did you mean 'attention_mask'"):
        compiled().fit({"input_ids": ids, "atention_mask": ids, "labels": labels}, verbose=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.resize_token_embeddings(40),
        lambda model: model.prune_heads({0: [1]}),
        lambda model: model.set_input_embeddings(np.ones((40, 8))),
    ],
    ids=["resize", "prune", "replace"],
)
def test_a_model_changed_after_it_was_compiled_asks_to_be_compiled_again(change):
    model = tiny()
    batch = batch_of(model, 4, 6)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    change(model)  # the optimizer has not begun: it will learn the new parameters
    model.fit(batch, verbose=0)
    other = tiny()
    other.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    other.fit(batch, verbose=0)
    change(other)
    with pytest.raises(InputError, match=r"compiled before resize_token_embeddings, .*; compile it again"):
        other.fit(batch, verbose=0)
    assert other.evaluate(batch, verbose=0) == pytest.approx(float(other(batch).loss), rel=1e-5)
    other.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    before = values(other)["transformer.wte.weight"]
    other.fit(batch, verbose=0)
    assert not np.array_equal(values(other)["transformer.wte.weight"], before)


def test_what_was_traced_before_a_change_is_traced_again():
    model = tiny()
    batch = batch_of(model, 4, 6)
    model.compile(keras.optimizers.SGD(0.1))
    first = model.predict(batch, verbose=0)["logits"], model.evaluate(batch, verbose=0)
    model.resize_token_embeddings(41)
    second = model.predict(batch, verbose=0)["logits"], model.evaluate(batch, verbose=0)
    assert second[0].shape == (*first[0].shape[:-1], 41)
    assert second[1] == pytest.approx(float(model(batch).loss), rel=1e-5)
    assert second[1] != first[1]


# -- adapters --------------------------------------------------------------------------------------------------------


def moved(model, before):
    """Which of the model's own parameters are no longer what they were."""
    return {name for name, value in values(model).items() if not np.array_equal(value, before[name])}


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "traced"])
def test_fit_trains_an_adapter_and_the_head_and_nothing_else(eager):
    model = tiny(TFGPT2ForSequenceClassification)
    made = attach(model, Lora(2, 4.0, ("c_attn",)))
    assert [variable._value for variable in model.trainable_variables] == [
        made["score.weight"],
        *list(made.values())[:2],
    ]
    assert [variable.path for variable in model.trainable_weights] == [
        f"{model.name}/score/weight",
        *(f"{model.name}/transformer/h_0/attn/c_attn/lora_{letter}" for letter in "AB"),
    ]
    assert model.num_parameters(only_trainable=True) == sum(int(np.prod(value.shape)) for value in made.values())
    batch = batch_of(model, 4, 6)
    before, of_adapter = values(model), {name: value.numpy() for name, value in made.items()}
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=eager)
    losses = model.fit(batch, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert moved(model, before) == {"score.weight"}
    assert all(not np.array_equal(value.numpy(), of_adapter[name]) for name, value in made.items())
    detach(model)
    assert len(model.trainable_variables) == len(before)
    with pytest.raises(InputError, match=r"or an adapter came or went; compile it again"):
        model.fit(batch, verbose=0)
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=eager)
    before = values(model)
    model.fit(batch, verbose=0)
    assert {"score.weight", "transformer.h.0.mlp.c_fc.weight"} <= moved(model, before)


def test_a_model_that_was_fitted_before_its_adapter_came_asks_to_be_compiled_again():
    model = compiled(run_eagerly=False)
    batch = batch_of(model, 4, 6)
    model.fit(batch, verbose=0)
    before = model.predict(batch, verbose=0)["logits"]
    made = attach(model, Lora(2, 4.0, ("c_attn",)))
    kernels = values(model)
    with pytest.raises(InputError, match=r"or an adapter came or went; compile it again"):
        model.fit(batch, verbose=0)
    model.compile(keras.optimizers.SGD(1.0))
    model.fit(batch, epochs=3, verbose=0)
    assert not moved(model, kernels)
    close(model.predict(batch, verbose=0)["logits"], model(batch).logits, 1e-5)
    assert not np.allclose(model.predict(batch, verbose=0)["logits"], before)
    with pytest.raises(InputError, match="expected none; merge it or detach it first"):
        attach(model, Lora(2, 4.0, ("c_attn",)))
    assert all(value.dtype == tf.float32 for value in made.values())


def test_an_adapter_has_dropout_in_fit_alone_and_its_best_numbers_come_back():
    def losses(dropout):
        model = tiny()
        for value in attach(model, Lora(2, 4.0, ("c_attn",), dropout)).values():
            value.assign(tf.ones(value.shape))
        model.compile(keras.optimizers.SGD(0.0), run_eagerly=True)
        batch = batch_of(model, 4, 6)
        return model.fit(batch, verbose=0).history["loss"][0], model.evaluate(batch, verbose=0)

    (plain, of_plain), (dropped, of_dropped) = losses(0.0), losses(0.5)
    assert of_plain == of_dropped == pytest.approx(plain)
    assert dropped != pytest.approx(plain)

    model = tiny()
    made = attach(model, Lora(2, 4.0, ("c_attn",)))
    start = {name: value.numpy() for name, value in made.items()}
    held = model.get_weights()
    made["transformer.h.0.attn.c_attn.lora_B"].assign_add(tf.ones((24, 2)))
    model.set_weights(held)  # as EarlyStopping does
    assert all(np.array_equal(value.numpy(), start[name]) for name, value in made.items())


def test_a_file_of_keras_is_not_written_without_the_adapter_and_an_export_has_it(tmp_path):
    model = tiny()
    for value in attach(model, Lora(2, 4.0, ("c_attn",))).values():
        value.assign(tf.ones(value.shape))
    kept = tmp_path / "kept.keras"
    kept.write_bytes(b"as it was")
    for save in (
        lambda: model.save(kept),
        lambda: model.save_weights(tmp_path / "kept.weights.h5"),
        lambda: keras.saving.save_model(model, tmp_path / "other.keras"),
    ):
        with pytest.raises(InputError, match="holds a LoRA adapter"):
            save()
    assert kept.read_bytes() == b"as it was"
    ids = tf.constant([[3, 4, 5]])
    model.export(tmp_path / "served")
    served = tf.saved_model.load(tmp_path / "served").signatures["prefill"]
    close(served(input_ids=ids, attention_mask=tf.ones_like(ids))["logits"], model(ids).logits[:, -1], 1e-5)


# -- several processes -----------------------------------------------------------------------------------------------


class Together:
    """In the place of a strategy that would wait for the other processes."""

    def scope(self):
        return contextlib.nullcontext()


def cluster_of(type="worker", index=0, **roles):
    return {"cluster": roles, "task": {"type": type, "index": index}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (0, 1)),
        (cluster_of(worker=["a:1"]), (0, 1)),
        (cluster_of(worker=["a:1", "b:1"], index=1), (1, 2)),
        (cluster_of(chief=["a:1"], worker=["b:1"]), (1, 2)),
        (cluster_of("chief", chief=["a:1"], worker=["b:1"]), (0, 2)),
        (cluster_of(chief=["a:1"], worker=["b:1", "c:1"], index=1), (2, 3)),
        (cluster_of("chief", chief=["a:1"]), (0, 1)),
    ],
)
def test_a_process_has_the_number_that_tensorflow_gives_it(config, expected, monkeypatch):
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", Together)
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with training.processes("CPU:0") as place:
        assert place == (*expected, "CPU:0")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(cluster_of(worker=["a:1"], ps=["b:1"])), "has the role 'ps', expected chief and worker"),
        (json.dumps(cluster_of("evaluator", worker=["a:1"])), "has the role 'evaluator', expected chief and worker"),
        (json.dumps(cluster_of(worker=["a:1"], index=3)), "task is worker 3, expected one of its cluster, which has 1"),
        (json.dumps(cluster_of(chief=["a:1", "b:1"])), "has 2 chiefs, expected one at most"),
        ("{", "TF_CONFIG cannot be read"),
        ("[]", "TF_CONFIG cannot be read"),
    ],
)
def test_a_cluster_that_cannot_train_is_refused(text, message, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match=message), training.processes("CPU:0"):
        pass


def test_model_of_is_what_these_tests_think_it_is():
    assert {variable.dtype for variable in model_of().trainable_variables} == {"float64"}
