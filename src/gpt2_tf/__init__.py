"""GPT-2 for TensorFlow / Keras 3: the same models, files and names as `gpt2_pt`, over `gpt2_core`."""
