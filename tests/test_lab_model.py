"""The lesson model: it learns, its two views and the oracle agree, its weights keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from flashmla.lab import text, training
from flashmla.lab.model import ContiguousCache, ModelConfig, decode, encode, load
from flashmla.reference import mla
from flashmla.reference.mha import attention

QUICK = training.Recipe(steps=40, batch=4, context=96, learning_rate=3e-3, warm_up=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(one_thread):
    """Trained for a few seconds: enough to be no longer symmetric, with latents of real size."""
    return training.train(recipe=QUICK)


def test_training_learns_more_than_how_often_each_byte_occurs(model):
    assert model.log["loss_before"] > 4
    assert model.log["loss_after"] < model.log["unigram_entropy"] - 0.3


def test_training_is_seeded():
    recipe = dataclasses.replace(QUICK, steps=2)
    a, b = (training.train(recipe=recipe).state_dict() for _ in range(2))
    other = training.train(recipe=dataclasses.replace(recipe, seed=1)).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding.weight"], other["embedding.weight"])


def test_the_attention_has_the_kernels_shape(model):
    seen = model.activations(text.held_out(40), layer=0)
    assert seen.q.shape == seen.k.shape == (40, 4, 192)
    assert seen.v.shape == (40, 4, 128)
    assert seen.q_absorbed.shape == (40, 4, 576)
    assert seen.kv.shape == (40, 576)
    assert seen.softmax_scale == pytest.approx(192**-0.5)
    assert torch.allclose(seen.maps.sum(-1), torch.ones(4, 40))
    assert torch.equal(seen.maps, seen.maps.tril())


def test_activations_of_a_layer_give_that_layer_s_output(model):
    tokens = text.held_out(40)
    states = model.hidden_states(tokens)
    for layer in range(model.config.n_layers):
        block = model.layer(layer)
        seen = model.activations(tokens, layer)
        heads, _ = attention(seen.q.numpy(), seen.k.numpy(), seen.v.numpy(), causal=True)
        out = block.attention.w_o(torch.from_numpy(heads).float().flatten(-2))
        after = block.feed_forward(states[layer] + out)
        assert torch.allclose(after, states[layer + 1], atol=2e-5)


def test_absorbed_scores_equal_the_heads_own(model):
    seen = model.activations(text.held_out(40))
    heads, head_lse = attention(seen.q.numpy(), seen.k.numpy(), seen.v.numpy(), causal=True)
    latent, lse = mla.mla_decode(
        seen.q_absorbed.numpy(), seen.kv[:, None].numpy(), seen.softmax_scale, causal=True
    )
    attend = model.layer(-1).attention
    values = attend.unabsorb(torch.from_numpy(latent).float())
    assert np.abs(lse - head_lse).max() < 1e-5
    assert np.abs(values.detach().numpy() - heads).max() < 1e-5


def test_the_oracle_computes_the_same_layer(model):
    tokens = text.held_out(40)
    block = model.layer(1)
    x = model.activations(tokens, 1).x
    with torch.no_grad():
        want = block.attention(x[None], torch.arange(40)[None])[0].numpy()
    weights = block.attention.reference_weights()
    for form in (mla.unabsorbed, mla.absorbed):
        got, _ = form(x.double().numpy(), weights)
        assert np.abs(got - want).max() < 1e-5


def test_decoding_with_a_cache_gives_the_naive_run_s_logits(model):
    tokens = text.held_out(48).view(2, 24)
    cache = ContiguousCache(model.config)
    positions = torch.arange(24).expand(2, 24)
    prompt = model.decode_step(tokens[:, :10], positions[:, :10], cache.attend)
    steps = [
        model.decode_step(tokens[:, t : t + 1], positions[:, t : t + 1], cache.attend)
        for t in range(10, 24)
    ]
    got = torch.cat([prompt, *steps], 1)
    with torch.no_grad():
        want = model(tokens)
    assert got.shape == (2, 24, 256)
    assert (got - want).abs().max() < 1e-4
    # A position that is off by one must show: otherwise the comparison above proves little.
    cache = ContiguousCache(model.config)
    model.decode_step(tokens[:, :10], positions[:, :10], cache.attend)
    late = model.decode_step(tokens[:, 10:11], positions[:, 11:12], cache.attend)
    assert (late - want[:, 10:11]).abs().max() > 1e-3


def test_kept_weights_come_back_equal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLASHMLA_CACHE_DIR", str(tmp_path))
    recipe = dataclasses.replace(QUICK, steps=2)
    first = training.load_or_train(recipe=recipe)
    assert "training" in capsys.readouterr().out
    second = training.load_or_train(recipe=recipe)
    assert capsys.readouterr().out == ""
    assert second.log == first.log
    assert not second.training
    kept = second.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in first.state_dict().items())
    assert list(tmp_path.iterdir()) == [training.weights_path(recipe=recipe)]


def test_the_name_of_the_weights_follows_what_made_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMLA_CACHE_DIR", str(tmp_path))
    name = training.weights_path()
    assert name == training.weights_path(ModelConfig(), training.Recipe())
    assert name != training.weights_path(ModelConfig(n_layers=3))
    assert name != training.weights_path(recipe=QUICK)
    monkeypatch.setattr(text, "corpus", lambda: b"another text")
    assert name != training.weights_path()


def test_better_words_cost_no_training(tmp_path):
    def code(source: str) -> bytes:
        path = tmp_path / "source.py"
        path.write_text(source)
        return training.code_of(path)

    plain = code("def f(x):\n    return x + 1\n")
    assert plain == code('"""Module."""\ndef f(x):\n    """Adds."""\n    return x + 1  # one\n')
    assert plain != code("def f(x):\n    return x + 2\n")


def test_load_gives_the_dtype_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMLA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(training, "Recipe", lambda: dataclasses.replace(QUICK, steps=1))
    model = load(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(text.held_out(8)).shape == (8, 256)


def test_bytes_go_in_and_come_out():
    assert decode(encode("naïve → softmax")) == "naïve → softmax"
    assert encode(b"\x00\xff").tolist() == [0, 255]
    trained, kept_back = text.split()
    assert bytes(trained.tolist()) + bytes(kept_back.tolist()) == text.corpus()
    assert torch.equal(text.held_out(5, start=3), kept_back[3:8])
    with pytest.raises(ValueError, match="tokens are held out"):
        text.held_out(10**9)
