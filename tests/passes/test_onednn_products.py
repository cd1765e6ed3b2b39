"""Products by oneDNN: PyTorch's to rounding, whatever sizes and strides; only where they are meant to be."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import onednn_products as benchmark
from gtcompile import compile_blocks, train_only
from gtcompile.graph.flops import count_flops, node_flops
from gtcompile.passes import onednn_products
from gtcompile.passes.onednn_products import PRODUCT, onednn_is_faster, use_onednn_products
from gtcompile.testing import assert_same_gradients
from tests.support.models import WIDTH, ResidualMLP, Stack

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
aten = torch.ops.aten
ROWS = 6


@pytest.fixture
def faster(monkeypatch):
    """A processor on which oneDNN is faster, whatever the size."""
    monkeypatch.setattr(onednn_products, "_mkl_lacks_avx512", lambda: True)
    monkeypatch.setattr(onednn_products, "LEAST_FLOPS", 0)


@st.composite
def matrices(draw, rows, columns):
    """A matrix in some layout: rows or columns apart or repeated, from somewhere in its memory."""
    layout = draw(st.sampled_from(["rows", "columns", "steps", "repeated", "apart"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    if layout == "columns":
        return torch.randn(columns, rows).t()
    if layout == "steps":
        return torch.randn(2 * rows + 1, 3 * columns + 1)[1::2, 1::3][:rows]
    if layout == "repeated":
        return torch.randn(1, columns).expand(rows, columns)
    if layout == "apart":
        return torch.randn(rows, columns + 3)[:, 2 : columns + 2]
    return torch.randn(rows, columns)


@given(st.data(), st.tuples(*[st.integers(0, 40)] * 3), st.booleans())
def test_products_are_those_of_pytorch(data, sizes, with_bias):
    m, k, n = sizes
    left, right = data.draw(matrices(m, k)), data.draw(matrices(k, n))
    bias = torch.randn(n) if with_bias else None
    expected = left @ right if bias is None else torch.addmm(bias, left, right)
    with FlopCounterMode(display=False) as counter:
        product = PRODUCT(left, right, bias)
    torch.testing.assert_close(product, expected)
    assert product.is_contiguous()
    assert counter.get_total_flops() == 2 * m * k * n


def all_kinds(x, w, vector, matrix):
    others = torch.addmm(matrix, x, w), torch.addmm(vector, x, w, beta=2), torch.addmm(vector[:1], x, w)
    return x @ w, torch.addmm(vector, x, w), *others, x.bfloat16() @ w.bfloat16()


def test_float32_products_are_replaced_and_cost_the_same(faster):
    inputs = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5), torch.randn(3, 5)
    module = make_fx(all_kinds)(*inputs)
    before = list(map(node_flops, operators(module)))
    module = use_onednn_products(module)
    targets = [node.target for node in operators(module)]
    assert targets.count(PRODUCT) == 2
    assert (targets.count(aten.addmm.default), targets.count(aten.mm.default)) == (3, 1)
    assert list(map(node_flops, operators(module))) == before
    torch.testing.assert_close(module(*inputs), all_kinds(*inputs))


def test_small_products_stay_with_torch(monkeypatch):
    monkeypatch.setattr(onednn_products, "_mkl_lacks_avx512", lambda: True)
    for width, replaced in ((8, 0), (512, 1)):
        module = make_fx(torch.mm)(torch.randn(512, width), torch.randn(width, 64))
        module = use_onednn_products(module)
        assert [node.target for node in operators(module)].count(PRODUCT) == replaced


def operators(module):
    return [node for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("variants", ["hoisted", "specialized"])
@pytest.mark.parametrize(
    "trained", [{"layers.1.up.weight", "layers.2.down.weight"}, {"layers.0.up.bias"}, set()]
)
def test_all_products_of_compiled_blocks_are_replaced(faster, variants, trained):
    model = Stack([ResidualMLP() for _ in range(3)], tied=False)
    eager = copy.deepcopy(model)
    compile_blocks(model, variants=variants)
    for one in (model, eager):
        train_only(one, trained | {"head.weight"})
    counted, expected = count_step(model), count_step(eager)
    assert_same_gradients(model, gradients_of(eager), rtol=1e-4, atol=1e-6)
    assert sum(counted.values()) == sum(expected.values())
    outside = 4 if trained else 3  # embedding and head, two gradients of the head
    assert counted[aten.mm] + counted[aten.addmm] == outside * 2 * ROWS * WIDTH**2


def count_step(model):
    torch.manual_seed(1)
    batch = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    model(*batch).backward()  # compiles
    model.zero_grad()
    with count_flops() as counter:
        model(*batch).backward()
    return counter.get_flop_counts()["Global"]


def gradients_of(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_nothing_is_replaced_where_onednn_is_disabled(faster):
    assert onednn_is_faster()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_is_faster()


def test_the_benchmark_says_whose_are_used(faster, capsys):
    benchmark.main(rows=4, hidden=8, vocabulary=8, pairs=2)
    said = capsys.readouterr().out
    assert "4 x 8 x" in said
    assert said.rstrip().endswith("Compiled regions use oneDNN's here.")
