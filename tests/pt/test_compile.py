"""`torch.compile` without graph breaks, `torch.export` with free sizes, and the tree functions both rest on."""

from __future__ import annotations

import io
import shutil

import pytest
from torch.utils import _pytree as pytree

from gpt2_pt import GPT2DoubleHeadsModel, GPT2LMHeadModel, Past
from gpt2_pt.outputs import LMOutput
from models import padded_mask
from pt.helpers import MODELS, ids_of, model_of, torch

export = pytest.importorskip("torch.export")
CompileCounter = pytest.importorskip("torch._dynamo.testing").CompileCounter


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    """fullgraph: a graph break is an error. The backend runs the graph as it was captured."""
    return torch.compile(model, fullgraph=True, **({"backend": "eager"} | options))


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# -- compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
def test_every_model_compiles_to_one_graph(cls):
    model = model_of(cls)
    ids = ids_of(model, 2, 6)
    out, expected = compiled(model)(ids), model(ids)
    assert out.keys() == expected.keys()
    close(out[0], expected[0])
    for pair, other in zip(out.past, expected.past, strict=True):
        close(pair, other)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_language_model_compiles_with_everything_it_takes(dynamic):
    model = model_of(n_layer=1)
    run = compiled(model, dynamic=dynamic)
    for rows, T in ((2, 6), (3, 7)):
        ids = ids_of(model, rows, T)
        inputs = {
            "attention_mask": torch.from_numpy(padded_mask(rows, T)),
            "token_type_ids": ids,
            "labels": ids,
            "output_attentions": True,
            "output_hidden_states": True,
        }
        out, expected = run(ids, **inputs), model(ids, **inputs)
        for key in ("loss", "logits", "attentions", "hidden_states"):
            close(out[key], expected[key])


@pytest.mark.parametrize(("gradients", "mask"), [(False, True), (True, False)])
def test_a_compiled_continuation_equals_the_plain_one(gradients, mask):
    model = model_of(n_layer=1)
    run = compiled(model)
    ids = ids_of(model, 2, 9)
    real = torch.from_numpy(padded_mask(2, 9)) if mask else None
    with torch.set_grad_enabled(gradients):
        past = run(ids[:, :4], attention_mask=None if real is None else real[:, :4]).past
        out = run(ids[:, 4:], past, real)
        close(out.logits, model(ids, attention_mask=real).logits[:, 4:])
        eager = model(ids[:, :4], attention_mask=None if real is None else real[:, :4]).past
        close(run(ids[:, 4:], eager, real).logits, out.logits)
        close(model(ids[:, 4:], past, real).logits, out.logits)


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_gradients_equal_plain_ones(backend):
    model = model_of(n_layer=1)
    ids, found = ids_of(model, 2, 6), []
    for run in (model, compiled(model, backend=backend)):
        model.zero_grad()
        run(ids, labels=ids, attention_mask=torch.from_numpy(padded_mask(2, 6))).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name in found[0]:
        close(found[0][name], found[1][name])


def test_decoding_compiles_three_times_and_never_again():
    # The prompt, the first token behind it, and then once for every length.
    model = model_of(n_positions=64, n_layer=1)
    ids = ids_of(model, 2, 30)
    counter = CompileCounter()
    run = compiled(model, backend=counter)
    counts = []
    with torch.no_grad():
        past = run(ids[:, :8]).past
        for at in range(8, 30):
            out = run(ids[:, at : at + 1], past)
            past = out.past
            counts.append(counter.frame_count)
        close(out.logits[:, 0], model(ids).logits[:, 29])
    assert counts[0] == 2
    assert set(counts[1:]) == {3}


def test_training_on_batches_of_many_lengths_compiles_a_few_times():
    model = model_of(n_layer=1)
    counter = CompileCounter()
    run = compiled(model, backend=counter)
    for rows, T in ((2, 8), (2, 9), (2, 10), (3, 11), (5, 16)):
        ids = ids_of(model, rows, T)
        run(ids, labels=ids)
    assert counter.frame_count == 3


def test_a_compiled_model_in_training_with_checkpointing_is_one_graph():
    model = model_of(n_layer=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    model.gradient_checkpointing_enable()
    ids = ids_of(model, 2, 6)
    close(compiled(model)(ids, labels=ids).loss, model(ids, labels=ids).loss)


def test_generate_works_with_a_compiled_transformer():
    model = model_of(n_positions=32, n_layer=1)
    ids = ids_of(model, 2, 5)
    expected = model.generate(ids, max_new_tokens=8, eos_token_id=())
    model.transformer.compile(fullgraph=True, backend="eager")
    assert torch.equal(model.generate(ids, max_new_tokens=8, eos_token_id=()), expected)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_generated_machine_code_computes_the_same():
    model = model_of(dtype=torch.float32)
    ids = ids_of(model, 2, 6)
    run = compiled(model, backend="inductor")
    torch.testing.assert_close(run(ids, labels=ids).loss, model(ids, labels=ids).loss, rtol=1e-5, atol=1e-5)
    past = run(ids[:, :3]).past
    torch.testing.assert_close(run(ids[:, 3:], past).logits, model(ids).logits[:, 3:], rtol=1e-5, atol=1e-5)


# -- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_runs_batches_and_lengths_of_any_size(strict):
    model = model_of(n_layer=1)
    # Of lengths that differ by one PyTorch takes 1 for a special case; with labels that is a length of 2.
    B, T = export.Dim("B", min=1, max=64), export.Dim("T", min=3, max=16)
    ids, mask = ids_of(model, 2, 6), torch.from_numpy(padded_mask(2, 6))
    program = export.export(
        model, (ids,), {"attention_mask": mask, "labels": ids}, strict=strict,
        dynamic_shapes={"input_ids": {0: B, 1: T}, "attention_mask": {0: B, 1: T}, "labels": {0: B, 1: T}},
    )  # fmt: skip
    run = program.module()
    for rows, length in ((2, 6), (1, 3), (5, 16), (3, 9)):
        ids, mask = ids_of(model, rows, length), torch.from_numpy(padded_mask(rows, length))
        out, expected = run(ids, attention_mask=mask, labels=ids), model(ids, attention_mask=mask, labels=ids)
        assert type(out) is LMOutput
        close(out.logits, expected.logits)
        close(out.loss, expected.loss)
        assert out.past[0][0].shape == (rows, 2, length, 4)


def test_an_exported_model_continues_from_a_past_of_any_length():
    model = model_of()
    B, T, P = export.Dim("B", min=1, max=64), export.Dim("T", min=2, max=14), export.Dim("P", min=2, max=14)
    ids = ids_of(model, 2, 9)
    past = tuple((key.detach(), value.detach()) for key, value in model(ids[:, :5]).past)
    program = export.export(
        model, (ids[:, 5:8].contiguous(), past), strict=False,
        dynamic_shapes={"input_ids": {0: B, 1: T}, "past": (({0: B, 2: P}, {0: B, 2: P}),) * 2},
    )  # fmt: skip
    run = program.module()
    for rows, split in ((2, 5), (3, 2), (1, 7)):
        ids = ids_of(model, rows, 9)
        past = tuple((key.detach(), value.detach()) for key, value in model(ids[:, :split]).past)
        out = run(ids[:, split:], past)
        close(out.logits, model(ids).logits[:, split:])
        assert out.past[1][0].shape == (rows, 2, 9, 4)


def test_an_exported_program_survives_saving():
    model = model_of()
    ids = ids_of(model, 2, 6)
    file = io.BytesIO()
    export.save(export.export(model, (ids,), strict=False), file)
    file.seek(0)
    close(export.load(file).module()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("cls", MODELS)
def test_every_model_exports(cls):
    model = model_of(cls)
    ids = ids_of(model, 2, 6)
    close(export.export(model, (ids,), strict=False).module()(ids)[0], model(ids)[0])


# -- trees -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MODELS)
def test_outputs_are_trees_that_come_back_as_they_were(cls):
    model = model_of(cls)
    out = model(ids_of(model, 2, 5), output_hidden_states=True)
    leaves, spec = pytree.tree_flatten(out)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(out)
    assert again.keys() == out.keys()
    assert type(again.past) is Past
    doubled = pytree.tree_map(lambda tensor: tensor * 2, out)
    assert torch.equal(doubled[0], out[0] * 2)
    assert torch.equal(doubled.past[1][1], out.past[1][1] * 2)


def test_leaves_are_found_by_their_paths():
    model = model_of(GPT2DoubleHeadsModel)
    out = model(ids_of(model, 1, 3))
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert paths[:2] == [".logits", ".mc_logits"]
    assert paths[2:] == [f".past[{layer}][{which}]" for layer in range(2) for which in range(2)]


def test_a_past_that_went_through_a_tree_continues_on_its_own():
    model = model_of()
    ids = ids_of(model, 2, 6)
    with torch.no_grad():
        past = model(ids[:, :5]).past
        again = pytree.tree_map(torch.clone, past)
        one, two = model(ids[:, 5:], past), model(ids[:, 5:], again)
        assert torch.equal(one.logits, two.logits)
        moved = GPT2LMHeadModel(model.config, seed=None).to(torch.float64)
        moved.load_state_dict(model.state_dict())
        assert torch.equal(moved.eval()(ids[:, 5:], again).logits, one.logits)
