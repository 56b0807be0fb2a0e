"""The lessons' indexer learns what dense attention looks at; its pieces are what they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import flashmla
from flashmla.lab import indexer, sparse_step, text, training
from flashmla.reference import dsa
from flashmla.reference.mha import attention

QUICK = indexer.Recipe(heads=4, steps=30, stretches=3, context=160, rows=48, warm_up=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(one_thread):
    return training.train(recipe=training.Recipe(steps=20, batch=4, context=96, warm_up=5))


@pytest.fixture(scope="module")
def indexers(model):
    return indexer.train(model, QUICK)


@pytest.fixture(scope="module")
def inputs(model):
    return indexer.layer_inputs(model, text.held_out(120))


def test_warming_up_brings_it_nearer_to_dense_attention(model, indexers, inputs):
    assert indexers.log["divergence_after"] < 0.5 * indexers.log["divergence_before"]
    rows, positions = torch.arange(60, 120, 4), torch.arange(120)
    fresh = indexer._fresh(model, QUICK)
    for layer, x in enumerate(inputs):
        target = indexer.dense_target(model, layer, x, rows)
        with torch.no_grad():
            trained, untrained = (some[layer](x, positions, rows) for some in (indexers, fresh))
        best, found, guessed = (
            indexer.mass_kept(target, logits, [16])[0] for logits in (target, trained, untrained)
        )
        assert guessed < found <= best


def test_warm_up_is_seeded_and_leaves_the_model_alone(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = dataclasses.replace(QUICK, steps=2)
    a, b = (indexer.train(model, recipe).state_dict() for _ in range(2))
    other = indexer.train(model, dataclasses.replace(recipe, seed=1)).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["layers.0.w_k.weight"], other["layers.0.w_k.weight"])
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in indexer.Indexers(2, 160, recipe).parameters())


def test_inputs_are_what_the_attention_reads(model, inputs):
    for layer, x in enumerate(inputs):
        assert torch.allclose(x, model.activations(text.held_out(120), layer).x, atol=1e-5)


def test_target_is_the_mean_of_the_heads_maps(model, inputs):
    maps = model.activations(text.held_out(120), 1).maps.mean(0)
    rows = torch.tensor([0, 7, 119])
    target = indexer.dense_target(model, 1, inputs[1], rows)
    assert torch.allclose(target, maps[rows], atol=1e-5)
    assert torch.allclose(target.sum(-1), torch.ones(3))


def test_loss_is_the_divergence(indexers, inputs, model):
    rows, x = torch.tensor([0, 3, 50]), inputs[0]
    target = indexer.dense_target(model, 0, x, rows)
    with torch.no_grad():
        got = float(indexer.loss_of(indexers[0], x, target, rows))
        guess = indexers[0](x, torch.arange(120), rows).double().log_softmax(-1)
    want = 0.0
    for row, p, log_q in zip(rows.tolist(), target.double(), guess, strict=True):
        want += float((p[: row + 1] * (p[: row + 1].log() - log_q[: row + 1])).sum()) / 3
    assert got == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("relu", [True, False])
def test_logits_are_the_formula_and_causal(relu):
    torch.manual_seed(0)
    made, x = indexer.Indexer(32, 3, relu), torch.randn(9, 32)
    rows, at = torch.tensor([2, 8]), torch.arange(9)
    with torch.no_grad():
        got = made(x, at, rows)
        q, k, w = made.queries(x, at), made.keys(x, at), made.weights(x)
    for i, row in enumerate(rows.tolist()):
        dots = q[row] @ k.T
        want = w[row] @ (dots.clamp(min=0) if relu else dots)
        assert torch.allclose(got[i, : row + 1], want[: row + 1], atol=1e-6)
        assert (got[i, row + 1 :] == float("-inf")).all()


def test_quantised_logits_are_the_oracle_s_and_near_the_exact_ones(indexers, inputs):
    x, rows = inputs[1], torch.arange(100, 120)
    parts = indexers[1].quantised(x, rows)
    start, end = torch.zeros(20, dtype=torch.int32), (rows + 1).int()
    got = flashmla.indexer_logits(*parts, start, end)
    numbers = [part.float().numpy() for part in parts]
    want = dsa.indexer_logits(*numbers, start.numpy(), end.numpy())
    seen = np.isfinite(want)
    assert np.array_equal(seen, np.isfinite(got.numpy()))
    assert np.abs(got.numpy()[seen] - want[seen]).max() < 1e-5
    with torch.no_grad():
        exact = indexers[1](x, torch.arange(120), rows).numpy()
    error = got.numpy()[seen] - exact[seen]
    assert 0 < np.sqrt(np.mean(error**2)) < 0.1 * exact[seen].std()


def test_kept_weights_come_back_equal(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLASHMLA_CACHE_DIR", str(tmp_path))
    recipe = dataclasses.replace(QUICK, steps=2)
    first = indexer.load(model, recipe)
    assert "warming up" in capsys.readouterr().out
    second = indexer.load(model, recipe)
    assert capsys.readouterr().out == ""
    assert second.log == first.log and not second.training
    kept = second.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in first.state_dict().items())
    assert list(tmp_path.iterdir()) == [indexer.weights_path(model, recipe)]
    other = dataclasses.replace(recipe, relu=False)
    assert indexer.weights_path(model, other) != indexer.weights_path(model, recipe)


def test_mass_kept_sums_the_target_in_the_logits_order():
    target = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    kept = indexer.mass_kept(target, logits, [0, 1, 2, 3, 9])
    assert kept == pytest.approx([0.0, 0.3, 0.45, 1.0, 1.0])


def test_blocks_are_chosen_by_their_best():
    logits = torch.tensor([[1.0, 5.0, 2.0, 3.0]])
    assert indexer.best_of_blocks(logits, 2).tolist() == [[5.0, 5.0, 3.0, 3.0]]


def test_predictions_with_dense_attention_are_the_model_s(model):
    def dense(layer, x, q, kv):
        q, kv = q.double().numpy(), kv.double().numpy()[:, None]
        scale = model.config.softmax_scale
        return torch.from_numpy(attention(q, kv, kv[..., :512], scale, causal=True)[0]).float()

    tokens = text.held_out(40)
    with torch.no_grad():
        want = model(tokens).log_softmax(-1)
    assert torch.allclose(indexer.predictions(model, tokens, dense), want, atol=1e-4)


# ---- a step on random caches -------------------------------------------------------------------


def test_prediction_is_bytes_or_operations():
    # One token: 1152 bytes at 1 GB/s, and next to no operations.
    dense, sparse = sparse_step.predicted_us(1000, 1.0, 1e9, b=1, h_q=1, k=10)
    assert dense == pytest.approx(1000 * 1.152)
    assert sparse == pytest.approx(1000 * 0.140 + 10 * 0.656)
    dense, sparse = sparse_step.predicted_us(1000, 1e9, 1.0, b=2, h_q=8, k=4000)
    assert dense == pytest.approx(2 * 1000 * 2 * 8 * 1088 / 1e6)
    assert sparse == pytest.approx(dense, rel=1e-6)  # all tokens chosen


def test_a_sparse_step_over_all_tokens_is_the_dense_one():
    step = sparse_step.DecodeStep(2, 4, 128, 256, "cpu", h_index=8)
    dense, sparse = step.dense(128)(0).float(), step.sparse(128)(0).float()
    assert dense.shape == (2, 1, 4, 512)
    error = (dense - sparse).norm() / dense.norm()
    assert 0 < error < 2**-3  # apart by FP8, scores of random numbers being large
    fewer = step.sparse(256)(0).float()
    assert (fewer - step.dense(256)(0).float()).norm() > error * dense.norm()
