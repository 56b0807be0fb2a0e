"""The checkers of exercises 01 and 02: the notebooks' solutions pass, planted mistakes do not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flashmla.lab.exercises import mha, mla


def visible_top_left(i, s_q, s_k):
    return min(i + 1, s_k)


def visible_one_short(i, s_q, s_k):
    return max(0, s_k - s_q + i)


def visible_negative(i, s_q, s_k):
    return s_k - s_q + i + 1


def fit_without_values(memory, layers, h_kv, d_qk, d_v, value_bytes):
    return memory // (layers * h_kv * d_qk * value_bytes)


def fit_equal_widths(memory, layers, h_kv, d_qk, d_v, value_bytes):
    return memory // (layers * h_kv * 2 * d_v * value_bytes)


def fit_one_layer(memory, layers, h_kv, d_qk, d_v, value_bytes):
    return memory // (h_kv * (d_qk + d_v) * value_bytes)


def fit_half_a_token(memory, layers, h_kv, d_qk, d_v, value_bytes):
    return memory / (layers * h_kv * (d_qk + d_v) * value_bytes)


def one_pass(q, cache, d_v, scale, *, rescale=True, maximum=True, base2=False, lse_max=True):
    """Right as it stands; each keyword plants one mistake."""
    m, total, out = (-np.inf if maximum else 0.0), 0.0, np.zeros(d_v)
    for key, value in cache:
        score = scale * (q @ key)
        m_new = max(m, score) if maximum else 0.0
        factor = np.exp(m - m_new) if rescale else 1.0
        with np.errstate(over="ignore", invalid="ignore"):
            weight = np.exp(score - m_new)
            total = total * factor + weight
            out = out * factor + weight * value
        m = m_new
    if total == 0:
        return out, np.inf
    with np.errstate(invalid="ignore"):
        lse = (m if lse_max else 0.0) + np.log(total)
        return out / total, lse / np.log(2) if base2 else lse


def one_pass_no_rescale(*args):
    return one_pass(*args, rescale=False)


def one_pass_no_maximum(*args):
    return one_pass(*args, maximum=False)


def one_pass_base_2(*args):
    return one_pass(*args, base2=True)


def one_pass_lse_without_maximum(*args):
    return one_pass(*args, lse_max=False)


def one_pass_empty_is_minus_infinity(*args):
    out, lse = one_pass(*args)
    return out, -np.inf if np.isinf(lse) else lse


def one_pass_empty_is_nan(q, cache, d_v, scale):
    out, lse = one_pass(q, cache, d_v, scale)
    return (out * np.nan if np.isinf(lse) else out), lse


def one_pass_reads_twice(q, cache, d_v, scale):
    largest = max((scale * (q @ key) for key, _ in cache), default=0.0)
    pairs = [(np.exp(scale * (q @ key) - largest), value) for key, value in cache]
    total = sum(weight for weight, _ in pairs)
    return sum(weight * value for weight, value in pairs) / total, largest + math.log(total)


def one_pass_forgets_lse(*args):
    return one_pass(*args)[0]


def rows_keys_and_values(tflops, gbps):
    return math.ceil(tflops * 1e3 / gbps / (2 * 1088 / (2 * 1088)))


def rows_one_operation(tflops, gbps):
    return math.ceil(tflops * 1e3 / gbps / (1088 / 1152))


def rows_rounded_down(tflops, gbps):
    return math.floor(tflops * 1e3 / gbps / (2176 / 1152))


def rows_a_byte_a_value(tflops, gbps):
    return math.ceil(tflops * 1e3 / gbps / (2176 / 576))


def values_expanded(p, kv, w_uv):
    values = np.einsum("sc,chd->shd", kv[:, :512], w_uv)
    return np.einsum("hs,shd->hd", p, values)


def values_expanded_head_by_head(p, kv, w_uv):
    return np.stack([p[i] @ (kv[:, :512] @ w_uv[:, i]) for i in range(len(p))])


def values_last_columns(p, kv, w_uv):
    return np.einsum("hc,chd->hd", p @ kv[:, 64:], w_uv)


def values_heads_mixed(p, kv, w_uv):
    return np.einsum("hc,chd->hd", p @ kv[:, :512], w_uv[:, ::-1])


def values_uniform(p, kv, w_uv):
    return np.einsum("c,chd->hd", kv[:, :512].mean(0), w_uv)


def form_always_absorbed(s_q, s_k):
    return "absorbed"


def form_forgets_the_query(s_q, s_k):
    return "absorbed" if 768 * s_q <= 512 * 256 else "expanded"


def form_forgets_the_expansion(s_q, s_k):
    return "absorbed" if s_q * 131072 + s_q * s_k * 1088 <= s_q * s_k * 320 else "expanded"


def form_unfinished(s_q, s_k):
    return ...


MISTAKES = [
    (mha.check_visible_keys, visible_top_left, "i=0, s_q=1, s_k=9"),
    (mha.check_visible_keys, visible_one_short, "expected 1, got 0"),
    (mha.check_visible_keys, visible_negative, "s_q=7, s_k=4"),
    (mha.check_tokens_that_fit, fit_without_values, "a key and a value"),
    (mha.check_tokens_that_fit, fit_equal_widths, "may differ in width"),
    (mha.check_tokens_that_fit, fit_one_layer, "Every layer"),
    (mha.check_tokens_that_fit, fit_half_a_token, "expected 7629"),
    (mha.check_one_pass, one_pass_no_rescale, "rescaled"),
    (mha.check_one_pass, one_pass_no_maximum, "with 40 keys"),
    (mha.check_one_pass, one_pass_base_2, "natural log"),
    (mha.check_one_pass, one_pass_lse_without_maximum, "maximum plus"),
    (mha.check_one_pass, one_pass_empty_is_minus_infinity, "lse with 0 keys.*expected inf"),
    (mha.check_one_pass, one_pass_empty_is_nan, "out with 0 keys"),
    (mha.check_one_pass, one_pass_reads_twice, "second time"),
    (mha.check_one_pass, one_pass_forgets_lse, r"must return \(out, lse\)"),
    (mla.check_balancing_rows, rows_keys_and_values, "read once"),
    (mla.check_balancing_rows, rows_one_operation, "expected 142"),
    (mla.check_balancing_rows, rows_rounded_down, "expected 142, got 141"),
    (mla.check_balancing_rows, rows_a_byte_a_value, "2 bytes"),
    (mla.check_values_from_latents, values_expanded, "bytes on the way"),
    (mla.check_values_from_latents, values_expanded_head_by_head, "bytes on the way"),
    (mla.check_values_from_latents, values_last_columns, "RoPE part"),
    (mla.check_values_from_latents, values_heads_mixed, "its own slice"),
    (mla.check_values_from_latents, values_uniform, "out for h=4"),
    (mla.check_cheaper_form, form_always_absorbed, "expected 'expanded'"),
    (mla.check_cheaper_form, form_forgets_the_query, "absorbing costs that a query"),
    (mla.check_cheaper_form, form_forgets_the_expansion, "expected 'absorbed'"),
    (mla.check_cheaper_form, form_unfinished, "returned Ellipsis"),
]


@pytest.mark.parametrize(
    "check, mistake, message", MISTAKES, ids=[mistake.__name__ for _, mistake, _ in MISTAKES]
)
def test_a_planted_mistake_is_caught(check, mistake, message, capsys):
    with pytest.raises(AssertionError, match=message):
        check(mistake)
    assert "passed" not in capsys.readouterr().out
