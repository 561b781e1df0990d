"""A GGUF file as llama.cpp's own package writes them, for tests that run without it.

Runs where the package gguf is installed (it was made with 0.19):

    pip install gguf
    python make_gguf.py gguf/mixed.gguf          # the file beside this one

A GPT-2 of two layers with every number format that is read, a tokenizer with a special and an added token and rows
without a token, and some keys that say nothing to us. Number k of tensor n is `value(n, k)`, which all these formats
hold exactly; tests/core/test_checkpoints_gguf.py has the same formula.
"""

from __future__ import annotations

import sys

import gguf
import numpy as np

WIDTH, INNER, POSITIONS, LAYERS, HEADS, EPSILON = 32, 32, 6, 2, 4, 1e-3
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "o n", "r e"]
ROWS = 272
F32, F16, BF16, Q8_0 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0"))


def value(n: int, size: int) -> np.ndarray:
    """64ths up to 127 either way, the largest once in every 32, so that the scale of Q8_0 is a 64th."""
    k = np.arange(size)
    number = (k * 37 + n * 11) % 253 - 126
    return np.where(k % 32 == n % 32, 127, number).astype(np.float32) / 64


def tensors() -> list[tuple[str, tuple[int, ...], object]]:
    found = [("token_embd.weight", (ROWS, WIDTH), Q8_0), ("position_embd.weight", (POSITIONS, WIDTH), F32)]
    for layer in range(LAYERS):
        kinds = (F16, BF16, Q8_0, Q8_0) if layer == 0 else (Q8_0, BF16, F16, F16)
        parts = (("attn_qkv", 3 * WIDTH, WIDTH), ("attn_output", WIDTH, WIDTH), ("ffn_up", INNER, WIDTH),
                 ("ffn_down", WIDTH, INNER))  # fmt: skip
        for (name, rows, columns), kind in zip(parts, kinds, strict=True):
            found.append((f"blk.{layer}.{name}.weight", (rows, columns), kind))
            found.append((f"blk.{layer}.{name}.bias", (rows,), F32))
        for name in ("attn_norm", "ffn_norm"):
            found += [(f"blk.{layer}.{name}.{kind}", (WIDTH,), F32) for kind in ("weight", "bias")]
    return [*found, ("output_norm.weight", (WIDTH,), F32), ("output_norm.bias", (WIDTH,), F32)]


def tokens() -> tuple[list[str], list[int]]:
    """The 256 bytes as vocabularies write them, what merges make, the end, an added token, and two rows of nothing."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    names += [merge.replace(" ", "") for merge in MERGES]
    kinds = [1] * len(names) + [3, 4]
    names += ["<|endoftext|>", "<user>"]
    return names + [f"[PAD{n}]" for n in range(len(names), ROWS)], kinds + [5] * (ROWS - len(names))


def main(path: str) -> None:
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_type("model")
    writer.add_name("Mixed")
    writer.add_author("nobody")
    writer.add_block_count(LAYERS)
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_file_type(7)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names, kinds = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(264)
    writer.add_eos_token_id(264)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    writer.add_array("training.losses", [2.5, 1.25])
    for number, (name, shape, kind) in enumerate(tensors()):
        array = value(number, int(np.prod(shape))).reshape(shape)
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
