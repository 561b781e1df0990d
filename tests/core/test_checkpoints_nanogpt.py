"""gpt2_core.checkpoints.nanogpt: ckpt.pt as train.py saves it, and what sample.py reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2_core.checkpoints import About, Tensor, bin, detect, nanogpt, open_checkpoint
from gpt2_core.checkpoints.configs import config_of
from gpt2_core.config import GPT2Config
from gpt2_core.conversion import carry_out, open_source, plan_conversion
from gpt2_core.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError, UnsafeCheckpointError
from gpt2_core.parameters import Head, parameter_table
from gpt2_core.verification import outputs

CONFIG = GPT2Config(
    vocab_size=64,
    n_positions=16,
    n_embd=8,
    n_layer=2,
    n_head=2,
    activation_function="gelu",
    bos_token_id=1,
    eos_token_id=1,
)
ARGUMENTS = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 64, "dropout": 0.25}
KERNELS = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def parameters() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    return {row.name: chance.normal(0.1, 0.4, row.shape).astype(np.float32) for row in parameter_table(CONFIG)}


def state(*, bias: bool = True, prefix: str = "", masks: bool = False) -> dict[str, Tensor]:
    """The state dict of nanoGPT's GPT: Linear layers are (out, in), the head is the token table."""
    made: dict[str, Tensor] = {}
    for name, value in parameters().items():
        if bias or not name.endswith(".bias"):
            made[prefix + name] = Tensor.of(np.ascontiguousarray(value.T) if name.endswith(KERNELS) else value)
    made[f"{prefix}lm_head.weight"] = made[f"{prefix}transformer.wte.weight"]
    if masks:
        mask = np.tril(np.ones((16, 16), np.float32))[None, None]
        made |= {f"{prefix}transformer.h.{layer}.attn.bias": Tensor.of(mask) for layer in range(2)}
    return made


def checkpoint(**changes: Any) -> dict[str, Any]:
    """What train.py gives to torch.save; ``changes`` replace entries."""
    optimizer = {
        "state": {0: {"step": Tensor.of(np.array(7.0, np.float32))}},
        "param_groups": [{"lr": 6e-4, "params": [0]}],
    }
    return {
        "model": state(),
        "optimizer": optimizer,
        "model_args": ARGUMENTS | {"bias": True},
        "iter_num": 2000,
        "best_val_loss": Tensor.of(np.array(3.25, np.float32)),
        "config": {"dataset": "openwebtext", "learning_rate": 6e-4, "compile": True},
    } | changes


def saved(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    bin.write_tree(folder / "ckpt.pt", checkpoint(**changes))
    return folder


def test_a_checkpoint_of_the_trainer_is_read_with_its_configuration(tmp_path: Path) -> None:
    with open_checkpoint(saved(tmp_path)) as opened:
        assert opened.format == "nanogpt" and opened.head == "lm"
        for name, value in parameters().items():
            assert np.array_equal(opened.array(name), value), name
        known = config_of(opened, beside=False)
        assert known.config == CONFIG.replace(
            resid_pdrop=0.25, embd_pdrop=0.25, attn_pdrop=0.25, bos_token_id=None, eos_token_id=None
        )
        assert set(opened.ignored) == {"optimizer", "iter_num", "best_val_loss", "config"}
        assert opened.names_in_file["transformer.h.0.mlp.c_fc.weight"] == "transformer.h.0.mlp.c_fc.weight"
        assert any("exact GELU" in note for note in opened.notes)


@pytest.mark.parametrize("masks", [False, True])
def test_a_compiled_model_and_one_with_masks_are_the_same_model(tmp_path: Path, masks: bool) -> None:
    saved(tmp_path, model=state(prefix="_orig_mod.", masks=masks))
    with open_source(tmp_path) as source:
        assert all(np.array_equal(tensor.array(), parameters()[name]) for name, tensor in source.tensors().items())
        assert sum("causal mask" in why for why in source.matching.ignored.values()) == 2 * masks


def test_without_biases_they_are_zero_and_that_is_said(tmp_path: Path) -> None:
    saved(tmp_path, model=state(bias=False), model_args=ARGUMENTS | {"bias": False})
    with open_source(tmp_path) as source:
        for name, tensor in source.tensors().items():
            expected = np.zeros_like(parameters()[name]) if name.endswith(".bias") else parameters()[name]
            assert np.array_equal(tensor.array(), expected), name
        assert any("bias=False" in note for note in source.checkpoint.notes)
        plan = plan_conversion(source, tmp_path / "out", "safetensors", verify="logits")
        assert any("bias=False" in note for note in plan.notes)
        carry_out(plan)


def test_files_of_early_2023_do_not_mention_bias_and_have_it(tmp_path: Path) -> None:
    with open_checkpoint(saved(tmp_path, model_args=ARGUMENTS)) as opened:
        assert np.array_equal(opened.array("transformer.ln_f.bias"), parameters()["transformer.ln_f.bias"])


def test_a_padded_vocabulary_is_kept_row_by_row(tmp_path: Path) -> None:
    with open_source(saved(tmp_path)) as source:
        assert source.config.vocab_size == 64 and source.tensors()["transformer.wte.weight"].shape == (64, 8)


def test_what_is_written_has_all_that_sample_py_reads(tmp_path: Path) -> None:
    config = CONFIG.replace(activation_function="gelu_new", resid_pdrop=0.3, extra={"note": "kept"})
    nanogpt.write(tmp_path, parameters(), about=About(config))
    tree, file = bin.read_tree(tmp_path / "ckpt.pt")
    assert tree["model_args"] == ARGUMENTS | {"bias": True, "dropout": 0.3}
    assert set(tree["model"]) == set(state())
    for name, tensor in state().items():
        assert np.array_equal(tree["model"][name].array(), tensor.array()), name
    file.close()
    with open_checkpoint(tmp_path) as opened:
        assert config_of(opened, beside=False).config == config
        assert opened.notes == () and "config" not in opened.ignored


def test_the_token_table_is_stored_once_though_it_stands_there_twice(tmp_path: Path) -> None:
    nanogpt.write(tmp_path / "a.pt", parameters(), about=About(CONFIG))
    numbers = sum(value.nbytes for value in parameters().values())
    assert (tmp_path / "a.pt").stat().st_size - numbers < 16_000


def test_the_activation_is_remarked_on_where_it_is_not_nanogpts() -> None:
    assert nanogpt.remarks(About(CONFIG)) == ()
    (remark,) = nanogpt.remarks(About(CONFIG.replace(activation_function="gelu_new")))
    assert "5e-4" in remark


def test_torch_reads_what_we_write_and_we_read_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    nanogpt.write(tmp_path, parameters(), about=About(CONFIG))
    loaded = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    tied = loaded["model"]
    assert tied["lm_head.weight"].data_ptr() == tied["transformer.wte.weight"].data_ptr()
    assert np.allclose(nano_logits(torch, tied, ARGUMENTS), reference_logits(tmp_path), atol=1e-5)
    compiled = {f"_orig_mod.{name}": value for name, value in tied.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(value) for value in tied.values()], betas=(0.9, 0.95))
    torch.save(
        checkpoint(model=compiled, optimizer=optimizer.state_dict(), best_val_loss=torch.tensor(3.0)), tmp_path / "t.pt"
    )
    with open_checkpoint(tmp_path / "t.pt") as opened:
        assert opened.format == "nanogpt"
        assert all(np.array_equal(opened.array(name), value) for name, value in parameters().items())


def reference_logits(folder: Path) -> np.ndarray:
    with open_source(folder) as source:
        return outputs(source.config, Head.LM, source.tensors())["logits"]


def nano_logits(torch: Any, weights: dict[str, Any], arguments: dict[str, Any]) -> np.ndarray:
    """nanoGPT's forward pass from its specification: Linear layers, exact GELU, epsilon 1e-5, a tied head."""
    from gpt2_core.verification import FIXED_IDS

    functional, width, heads = torch.nn.functional, arguments["n_embd"], arguments["n_head"]
    ids = torch.tensor(FIXED_IDS[: arguments["block_size"]]) % arguments["vocab_size"]

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: len(ids)]
    for layer in range(arguments["n_layer"]):
        block = f"transformer.h.{layer}."
        parts = linear(norm(x, f"{block}ln_1"), f"{block}attn.c_attn").split(width, dim=-1)
        q, k, v = (part.view(len(ids), heads, -1).transpose(0, 1) for part in parts)
        attended = (
            functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(len(ids), width)
        )
        x = x + linear(attended, f"{block}attn.c_proj")
        x = x + linear(functional.gelu(linear(norm(x, f"{block}ln_2"), f"{block}mlp.c_fc")), f"{block}mlp.c_proj")
    return functional.linear(norm(x, "transformer.ln_f"), weights["lm_head.weight"]).numpy()[None]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": [1]}, "expected a dict with a state dict as model"),
        ({"model_args": [1]}, "model_args are not a dict"),
        ({"model_args": ARGUMENTS | {"use_rmsnorm": True}}, "use_rmsnorm beyond nanoGPT's"),
        ({"model_args": {"n_layer": 2}}, "lack block_size, n_embd, n_head, vocab_size"),
        ({"model_args": ARGUMENTS | {"n_layer": -1}}, "expected sizes"),
        ({"model_args": ARGUMENTS | {"n_head": "two"}}, "expected sizes"),
        ({"model_args": ARGUMENTS | {"bias": 1}}, "bias true or false"),
        ({"model_args": ARGUMENTS | {"n_layer": 2**30}}, "speak of 1073741824 layers"),
        ({"model_args": ARGUMENTS | {"bias": False}}, "bias=False, but it holds transformer.h.0.ln_1.bias"),
        ({"model": {"a": 1}}, "more than tensors by name: a"),
        ({"model": state() | {"_orig_mod.x": Tensor.of(np.zeros(2))}}, "expected all or none"),
    ],
)
def test_what_is_no_model_of_nanogpt_is_said_to_be_none(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointFormatError, match=message):
        nanogpt.read(saved(tmp_path, **changes))


def test_what_does_not_fit_its_own_model_args_is_reported_together(tmp_path: Path) -> None:
    odd = state() | {"transformer.wpe.weight": Tensor.of(np.zeros((3, 8), np.float32)), "extra": Tensor.of(np.zeros(2))}
    del odd["transformer.ln_f.bias"]
    with pytest.raises(CheckpointMismatchError) as error:
        open_source(saved(tmp_path, model=odd))
    assert error.value.missing == ("transformer.ln_f.bias",) and error.value.unexpected == ("extra",)
    assert error.value.misshaped == (("transformer.wpe.weight", (3, 8), (16, 8)),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, ("true",)

    torch.save({"model": {}, "model_args": Evil()}, tmp_path / "ckpt.pt")
    with pytest.raises(UnsafeCheckpointError, match="system"):
        open_checkpoint(tmp_path)


def test_a_plain_state_dict_is_not_taken_for_nanogpts(tmp_path: Path) -> None:
    bin.write(tmp_path / "ckpt.pt", state())
    assert detect(tmp_path / "ckpt.pt")[0] == "bin"
    (tmp_path / "x.pt").write_bytes(b"PK\3\4" + bytes(100))
    assert nanogpt.find(tmp_path / "x.pt") is None
    with pytest.raises(CheckpointError, match="needs about"):
        nanogpt.write(tmp_path, state())
