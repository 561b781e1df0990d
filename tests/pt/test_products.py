"""Products by oneDNN: PyTorch's own numbers and gradients, of every order, and only where nothing looks inside."""

from __future__ import annotations

import pytest

from gpt2_pt import GPT2LMHeadModel, products
from gpt2_pt.chunked import chunked_loss
from gpt2_pt.products import linear, serves
from pt.helpers import model_of, torch

try:
    products.times(torch.ones(2, 3), torch.ones(4, 3))
except (RuntimeError, AttributeError, NotImplementedError):
    pytest.skip("no oneDNN here", allow_module_level=True)


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """As on an AMD processor; how often oneDNN is asked."""
    calls = []
    real = products.times
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "times", lambda *arguments: calls.append(1) or real(*arguments))
    return calls


def given(rows=40, inputs=12, outputs=20, requires_grad=True):
    torch.manual_seed(0)
    shapes = ((2, rows // 2, inputs), (inputs, outputs), (outputs,))
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def plain(x, weight, bias):
    return torch.addmm(bias, x.flatten(0, 1), weight).view(*x.shape[:-1], -1)


def test_the_product_and_its_gradients_are_pytorchs(counted):
    x, weight, bias = given()
    slope = torch.randn(2, 20, 20)
    found = linear(x, weight, bias)
    torch.testing.assert_close(found, plain(x, weight, bias))
    ours = torch.autograd.grad(found, (x, weight, bias), slope)
    assert len(counted) == 3
    for one, other in zip(ours, torch.autograd.grad(plain(x, weight, bias), (x, weight, bias), slope), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_of_gradients_are_pytorchs():
    x, weight, bias = given()

    def second(function):
        (first,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for one, other in zip(second(linear), second(plain), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_what_needs_no_gradient_gets_none(counted, fixed):
    parts = given()
    parts[fixed].requires_grad_(False)
    linear(*parts).sum().backward()
    assert [part.grad is None for part in parts] == [index == fixed for index in range(3)]
    assert len(counted) == (3 if fixed == 2 else 2)


def test_a_slope_that_is_one_number_for_all_is_taken_as_it_is():
    x, weight, bias = given()
    linear(x, weight, bias).sum().backward()  # its strides are 0
    torch.testing.assert_close(weight.grad, x.detach().flatten(0, 1).sum(0)[:, None].expand_as(weight))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_others_who_look_at_operations_find_pytorchs_own(counted):
    x, weight, bias = given()
    flat = x.detach().flatten(0, 1)
    assert serves(flat, weight)
    assert not serves(flat[:8], weight)
    assert not serves(flat.double(), weight.double())
    assert not serves(flat.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(flat, weight)
        assert linear(x, weight, bias).dtype is torch.bfloat16
    seen = []
    torch.func.vmap(lambda row: seen.append(serves(row, weight)) or linear(row, weight, bias))(x.detach())
    torch.func.jvp(lambda row: seen.append(serves(row, weight)) or linear(row, weight, bias), (flat,), (flat,))
    with torch.autograd.forward_ad.dual_level():
        seen.append(serves(flat, weight))
    fixed = (weight.detach(), bias.detach())
    torch.jit.trace(lambda row: seen.append(serves(row, weight)) or linear(row, *fixed), flat, check_trace=False)
    with torch.backends.mkldnn.flags(enabled=False):
        seen.append(serves(flat, weight))
    assert len(seen) >= 5 and not any(seen)
    assert not counted


def test_a_bias_of_any_strides_and_shapes_is_added_as_pytorch_adds_it(counted):
    x, weight, bias = given(requires_grad=False)
    strided = torch.stack((bias, 100 * bias), dim=1)[:, 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(linear(x, weight, strided), plain(x, weight, bias))
    assert len(counted) == 1
    for other in (bias[:1].expand(20), bias[:1], bias[None]):
        torch.testing.assert_close(linear(x, weight, other), plain(x, weight, other))
    assert linear(x, weight[:, :0]).shape == (2, 20, 0)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(x, weight[1:])


def test_modes_that_look_at_operations_find_pytorchs_own(counted):
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias = given()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 40 * 12 * 20
    assert not counted
    linear(x, weight, bias)
    assert counted


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_what_is_asked_first_does_not_depend_on_the_defaults_of_the_moment(monkeypatch, default):
    monkeypatch.undo()
    monkeypatch.setattr(products, "_is_of_amd", lambda: True)
    products.prefers_onednn.cache_clear()
    expected = products.prefers_onednn()
    products.prefers_onednn.cache_clear()
    try:
        if default == "dtype":
            torch.set_default_dtype(torch.float64)
            assert products.prefers_onednn() is expected
        else:
            with torch.device("meta"):
                assert products.prefers_onednn() is expected
    finally:
        torch.set_default_dtype(torch.float32)
        products.prefers_onednn.cache_clear()


def test_the_loss_in_slices_says_that_it_has_no_second_gradients():
    hidden, table = torch.randn(4, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    loss = chunked_loss(hidden, table, torch.tensor([1, 2, 3, 4]), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"no gradients of gradients; take those of the model's own loss"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_a_model_trains_with_the_same_numbers(counted, monkeypatch):
    ids = torch.randint(0, 37, (4, 16), generator=torch.Generator().manual_seed(0))

    def gradients():
        model: GPT2LMHeadModel = model_of(vocab_size=37, n_positions=16, dtype=torch.float32)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss, {name: parameter.grad for name, parameter in model.named_parameters()}

    loss, found = gradients()
    assert counted
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)
    expected_loss, expected = gradients()
    torch.testing.assert_close(loss, expected_loss)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_loss_in_slices_has_the_same_gradients(monkeypatch):
    def gradients():
        torch.manual_seed(1)
        hidden, table = torch.randn(70, 12, requires_grad=True), torch.randn(37, 12, requires_grad=True)
        targets = torch.randint(0, 37, (70,))
        targets[::7] = -100
        loss = chunked_loss(hidden, table, targets, torch.tensor(0.1))
        loss.backward()
        return loss, hidden.grad, table.grad

    found = gradients()
    assert found[2].is_contiguous()
    monkeypatch.setattr(products, "prefers_onednn", lambda: False)
    for one, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(one, other)
