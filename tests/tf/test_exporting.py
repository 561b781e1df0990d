"""A SavedModel of each model, run by plain TensorFlow."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from gpt2_core import GPT2Config, GPT2Tokenizer
from gpt2_core.errors import InputError, WriteError
from gpt2_tf import TFGPT2DoubleHeadsModel, TFGPT2LMHeadModel
from models import padded_mask
from tf.helpers import MODELS, close, ids_of, keras, model_of, tf, tiny

# Runs where none of our packages can be imported: prompts in, greedy text out, by the two signatures alone.
SERVER = """
import json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
for name in ("gpt2_tf", "gpt2_core", "gpt2_pt", "keras"):
    sys.modules[name] = None
import tensorflow as tf

folder, wanted = sys.argv[1], json.loads(sys.argv[2])
model = tf.saved_model.load(folder).signatures
ids, mask = (tf.constant(wanted[name], tf.int32) for name in ("input_ids", "attention_mask"))
out, made = model["serving_default"](input_ids=ids, attention_mask=mask), []
for _ in range(wanted["steps"]):
    new = tf.argmax(out["logits"], axis=-1, output_type=tf.int32)[:, None]
    made.append(new)
    mask = tf.concat((mask, tf.ones_like(new)), axis=1)
    past = {name: value for name, value in out.items() if name.startswith("past")}
    out = model["decode"](input_ids=new, attention_mask=mask, **past)
print(json.dumps(tf.concat(made, axis=1).numpy().tolist()))
"""


def served(folder, ids, mask, steps):
    wanted = json.dumps({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "steps": steps})
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(folder), wanted], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def int32(value):
    return tf.cast(value, tf.int32)


def test_an_exported_model_writes_the_same_text_where_none_of_our_packages_is(tmp_path):
    model = model_of(dtype="float32", n_positions=40)
    ids, mask = ids_of(model, 3, 6).numpy(), padded_mask(3, 6)
    expected = model.generate(ids, mask, max_new_tokens=12, eos_token_id=()).numpy()[:, 6:]
    assert model.export(tmp_path / "model") == tmp_path / "model"
    assert served(tmp_path / "model", ids, mask, 12) == expected.tolist()
    assert GPT2Config.from_json_file(tmp_path / "model" / "assets.extra" / "config.json") == model.config


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_prefill_and_decode_take_batches_and_lengths_of_any_size(tmp_path, policy):
    model = model_of(dtype=policy)
    model.export(tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    assert set(loaded.signatures) == {"serving_default", "prefill", "decode"}
    for rows, T, side in ((1, 1, "left"), (2, 5, "left"), (3, 7, "right"), (5, 16 - 1, "right")):
        ids, mask = ids_of(model, rows, T + 1), padded_mask(rows, T, side)
        mask = np.concatenate((mask, np.ones((rows, 1), np.int64)), axis=1)
        out = loaded.prefill(int32(ids[:, :-1]), int32(mask[:, :-1]))
        assert out["past"].shape == (2, 2, rows, 2, T, 4)
        assert out["past"].dtype == model.compute_dtype
        assert out["logits"].dtype == tf.float32
        again = loaded.decode(int32(ids[:, -1:]), out["past"], int32(mask))
        tolerance = 1e-5 if policy == "float32" else 0.1
        for row in range(rows):
            real = ids[row][mask[row] == 1]
            alone = tf.cast(model(real[None]).logits, tf.float32)
            close(out["logits"][row], alone[0, -2] if len(real) > 1 else out["logits"][row], tolerance)
            close(again["logits"][row], alone[0, -1], tolerance)


def test_layers_of_unlike_heads_pass_on_a_past_each(tmp_path):
    model = model_of(dtype="float32", n_head=4)
    model.prune_heads({1: [0, 2]})
    model.export(tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    ids = int32(ids_of(model, 2, 6))
    out = loaded.prefill(ids[:, :5], tf.ones_like(ids[:, :5]))
    assert [out[f"past_{layer}"].shape[2] for layer in range(2)] == [4, 2]
    out = loaded.decode(ids[:, 5:], out["past_0"], out["past_1"], tf.ones_like(ids))
    close(out["logits"], model(ids).logits[:, -1], 1e-5)
    past = loaded.prefill(ids[:, :5], tf.ones_like(ids[:, :5]))
    named = loaded.signatures["decode"](
        input_ids=ids[:, 5:], attention_mask=tf.ones_like(ids), past_0=past["past_0"], past_1=past["past_1"]
    )
    close(named["logits"], out["logits"], 0)


@pytest.mark.parametrize("cls", [cls for cls in MODELS if cls is not TFGPT2LMHeadModel])
def test_every_other_model_is_exported_with_what_it_answers(tmp_path, cls):
    model = tiny(cls)
    model.export(tmp_path)
    ids = int32(ids_of(model, 3, 6))
    mask = int32(padded_mask(6 if ids.shape.rank == 3 else 3, 6).reshape(ids.shape))
    signatures = tf.saved_model.load(tmp_path).signatures
    double = cls is TFGPT2DoubleHeadsModel
    out = signatures["choose" if double else "serving_default"](input_ids=ids, attention_mask=mask)
    expected = model(ids, attention_mask=mask, use_cache=False)
    assert set(out) == ({"mc_logits"} if double else set(expected.keys()))
    for name in out:
        close(out[name], expected[name], 1e-5)
    assert ("decode" in signatures) == double


def test_gradients_flow_through_what_was_exported(tmp_path):
    model = tiny()
    model.export(tmp_path)
    loaded, ids = tf.saved_model.load(tmp_path), int32(ids_of(model, 2, 5))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(loaded.prefill(ids, tf.ones_like(ids))["logits"]))
    (table,) = [variable for variable in loaded.parameters if "wte" in variable.name]
    got = tape.gradient(loss, table)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(model(ids).logits[:, -1]))
    close(got, tape.gradient(loss, model.get_input_embeddings().weight), 1e-4)


def test_a_row_longer_than_the_model_is_refused_by_what_was_exported_too(tmp_path):
    model = tiny()
    model.export(tmp_path)
    loaded, ids = tf.saved_model.load(tmp_path), tf.ones((1, 17), tf.int32)
    with pytest.raises(tf.errors.InvalidArgumentError, match="more tokens than the 16 positions of this model"):
        loaded.prefill(ids, ids)


def test_a_tokenizer_goes_along_and_text_comes_back(tmp_path):
    from gpt2_tf.text import TFGPT2Tokenizer

    model = tiny(vocab_size=50257, n_embd=2, n_head=1)
    model.export(tmp_path, tokenizer=TFGPT2Tokenizer(padding_side="left", pad_token_id=50256))
    signatures = tf.saved_model.load(tmp_path).signatures
    texts = ["Hello world", "One.\n\nTwo \u00e9\u4f60"]
    enc = signatures["tokenize"](texts=tf.constant(texts))
    assert enc["input_ids"][1].numpy().tolist() == GPT2Tokenizer().encode(texts[1])
    assert signatures["prefill"](**enc)["logits"].shape == (2, 50257)
    back = signatures["detokenize"](**enc)["texts"].numpy()
    assert [text.decode() for text in back] == texts
    with pytest.raises(InputError, match=r"tokenizer is a GPT2Tokenizer, expected a TFGPT2Tokenizer"):
        model.export(tmp_path, tokenizer=GPT2Tokenizer())


def test_a_new_export_takes_the_place_of_the_old_one_and_a_failed_one_leaves_it(tmp_path, monkeypatch):
    model = tiny()
    ids = int32(ids_of(model, 1, 4))
    model.export(tmp_path / "model")
    model.get_input_embeddings().weight.assign_add(tf.ones((37, 8)))
    model.export(str(tmp_path / "model"))
    expected = model(ids).logits[:, -1]
    loaded = tf.saved_model.load(tmp_path / "model")
    close(loaded.prefill(ids, tf.ones_like(ids))["logits"], expected, 1e-5)
    before = {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}

    def failing(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", failing)
    with pytest.raises(WriteError):
        model.export(tmp_path / "model")
    assert {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()} == before


def test_a_signature_of_ones_own_may_fix_sizes_and_leave_out_the_mask(tmp_path):
    model = tiny()
    model.export(tmp_path, input_signature=[keras.InputSpec(shape=(None, 5), dtype="int32")], verbose=False)
    ids, loaded = int32(ids_of(model, 2, 5)), tf.saved_model.load(tmp_path)
    close(loaded.serve(ids)["logits"], model(ids).logits, 1e-5)
    assert loaded.signatures["serving_default"].structured_outputs["logits"].shape.as_list() == [None, 5, 37]
