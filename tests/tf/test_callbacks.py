"""Keras's `fit` with what goes on between epochs: saved for everyone to read, samples, TensorBoard, Keras's own."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_core.errors import InputError
from gpt2_core.tokenizer import GPT2Tokenizer
from gpt2_tf.callbacks import SavePretrained, WriteSamples
from tf.helpers import QUIET, TFGPT2LMHeadModel, keras, same_values

CONFIG = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 16, **QUIET}


@pytest.fixture(scope="module")
def model():
    from gpt2_core.config import GPT2Config

    made = TFGPT2LMHeadModel(GPT2Config(**CONFIG), seed=0)
    made.compile(keras.optimizers.AdamW(1e-2))
    return made


def fitted(model, *callbacks, epochs=3):
    ids = np.arange(64).reshape(8, 8)
    model.fit({"input_ids": ids, "labels": ids}, batch_size=4, epochs=epochs, verbose=0, callbacks=list(callbacks))


def test_epochs_are_saved_for_everyone_to_read(model, tmp_path):
    fitted(model, SavePretrained(tmp_path, keep=2, tokenizer=GPT2Tokenizer()))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["epoch-0002", "epoch-0003"]
    same_values(TFGPT2LMHeadModel.from_pretrained(tmp_path / "epoch-0003"), model)
    assert (tmp_path / "epoch-0003" / "vocab.json").is_file()


def test_only_better_epochs_are_saved_where_one_is_watched(model, tmp_path):
    saving = SavePretrained(tmp_path, monitor="loss", keep=9)
    saving.set_model(model)
    for epoch, loss in enumerate((3.0, 4.0, 2.0)):
        saving.on_epoch_end(epoch, {"loss": loss})
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["epoch-0001", "epoch-0003"]
    with pytest.raises(InputError, match=r"expected one of loss.*did you mean 'loss'"):
        SavePretrained(tmp_path, monitor="los").on_epoch_end(0, {"loss": 1.0})
    with pytest.raises(InputError, match="mode is 'least'"):
        SavePretrained(tmp_path, mode="least")
    with pytest.raises(InputError, match="keep is 0"):
        SavePretrained(tmp_path, keep=0)


def test_epochs_of_an_earlier_fit_are_not_touched_and_the_newest_always_stays(model, tmp_path):
    def saved(epochs, keep):
        saving = SavePretrained(tmp_path, keep=keep)
        saving.set_model(model)
        for epoch in range(epochs):
            saving.on_epoch_end(epoch)
        return sorted(folder.name for folder in tmp_path.iterdir())

    (tmp_path / "epoch-notes").mkdir()
    assert saved(3, keep=1) == ["epoch-0003", "epoch-notes"]
    assert saved(1, keep=1) == ["epoch-0001", "epoch-0003", "epoch-notes"]
    saving = SavePretrained(tmp_path / "again", keep=1)
    saving.set_model(model)
    for epoch in (0, 0, 1, 0):  # one callback in several fits
        saving.on_epoch_end(epoch)
        assert (tmp_path / "again" / f"epoch-{epoch + 1:04d}" / "config.json").is_file()
    assert [folder.name for folder in (tmp_path / "again").iterdir()] == ["epoch-0001"]


def test_an_adapter_is_saved_alone_after_each_epoch(tmp_path):
    from gpt2_core.adapters import Lora, read_adapter
    from gpt2_core.config import GPT2Config
    from gpt2_tf.adapters import attach

    model = TFGPT2LMHeadModel(GPT2Config(**CONFIG), seed=0)
    made = attach(model, Lora(2, 4.0, ("c_attn",)))
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    fitted(model, SavePretrained(tmp_path), epochs=1)
    arrays = read_adapter(tmp_path / "epoch-0001").arrays
    assert {name: array.tobytes() for name, array in arrays.items()} == {
        name: value.numpy().tobytes() for name, value in made.items()
    }


def test_the_model_writes_after_each_epoch_beside_keras_s_own_callbacks(model, tmp_path):
    texts = []
    whole = keras.callbacks.ModelCheckpoint(tmp_path / "last.weights.h5", save_weights_only=True)
    fitted(model, WriteSamples(GPT2Tokenizer(), "Once", count=3, write=texts.append), whole, epochs=2)
    assert [text.split(":")[0].strip() for text in texts] == ["after epoch 1", "after epoch 2"]
    assert all("Once" in text for text in texts)
    assert (tmp_path / "last.weights.h5").is_file()


def test_keras_s_tensorboard_watches_a_fit(model, tmp_path):
    pytest.importorskip("tensorboard")
    fitted(model, keras.callbacks.TensorBoard(tmp_path / "board"), epochs=1)
    assert list((tmp_path / "board").rglob("events*"))
