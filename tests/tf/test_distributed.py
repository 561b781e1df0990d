"""Training on two devices equals training on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from tf.helpers import batch_of, close, keras, tf, tiny, values
from gpt2_tf import Perplexity

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
batch = batch_of(tiny(), 8, 6)
batch["labels"] = batch["input_ids"]  # the mean of means is the mean, where all rows have as many labels

def trained(strategy):
    with strategy.scope():
        model = tiny()
        model.gradient_checkpointing_enable()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy", Perplexity()])
    history = model.fit(batch, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    out = model.predict(batch, batch_size=4, verbose=0)["logits"]
    return values(model), history, model.evaluate(batch, verbose=0, return_dict=True), out, model

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
one, two = trained(tf.distribute.get_strategy()), trained(strategy)
for name, value in one[0].items():
    close(value, two[0][name], 1e-5)
for left, right in ((one[1], two[1]), (one[2], two[2])):
    assert left.keys() == right.keys()
    for name in left:
        close(left[name], right[name], 1e-5)
close(one[3], two[3], 1e-5)
two[4].save(sys.argv[2] + "/model.keras")
two[4].save_pretrained(sys.argv[2])
other = keras.saving.load_model(sys.argv[2] + "/model.keras")
for name, value in values(other).items():
    close(value, two[0][name], 0)
"""


def test_fitting_on_two_replicas_is_fitting_on_one(tmp_path):
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", SCRIPT, tests, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
