"""What takes a process of its own: training on two devices equals training on one, and Keras's files travel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tf.helpers import keras, same_values, tiny

SCRIPT = """
import sys
import gpt2_tf
import keras
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
sys.path.insert(0, sys.argv[1])
folder = sys.argv[2]
came = keras.saving.load_model(folder + "/came.keras")  # nothing but gpt2_tf is imported yet
from tf.helpers import batch_of, close, same_values, tiny, values

same_values(came, tiny())
batch = batch_of(tiny(), 8, 6)
batch["labels"] = batch["input_ids"]  # the mean of means is the mean, where all rows have as many labels

def trained(strategy):
    with strategy.scope():
        model = tiny()
        model.gradient_checkpointing_enable()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy", gpt2_tf.Perplexity()])
    history = model.fit(batch, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    out = model.predict(batch, batch_size=4, verbose=0)["logits"]
    return values(model), history, out, model

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
one, two = trained(tf.distribute.get_strategy()), trained(strategy)
for left, right in ((one[0], two[0]), (one[1], two[1])):
    assert left.keys() == right.keys()
    for name in left:
        close(left[name], right[name], 1e-5)
close(one[2], two[2], 1e-5)
two[3].save(folder + "/went.keras")
two[3].save_pretrained(folder + "/went")
"""


def test_fitting_on_two_replicas_is_fitting_on_one(tmp_path):
    tiny().save(tmp_path / "came.keras")
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", SCRIPT, tests, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    went = keras.saving.load_model(tmp_path / "went.keras")
    same_values(went, type(went).from_pretrained(tmp_path / "went"))
