"""The `gpt2` command: text from models, ids from text, and what is in a checkpoint.

Importing this package, and starting the command, loads no framework: a framework is imported when a model runs.
"""
