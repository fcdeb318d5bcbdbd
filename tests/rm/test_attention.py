import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rm import native, varlen
from rm.attention import choose_backend, tree_attention
from rm.layout import Branch, Tree, pack
from tests.rm.trees import forests

BACKENDS = ("cpu_tree", "cpu_flash", "sdpa")  # those that run on CPU; the others have tests/rm/test_varlen.py
# longer than a tile of queries, a panel of keys, a family and a block; nothing a multiple of anything
LONG = [
    Tree([3] * 75, [Branch([3] * 41, [[3] * 7, [3] * 19, [3]]), Branch([3] * 131, [[3] * 13] * 45)]),
    Tree([3] * 2, [Branch([3] * 3, [[3] * 67])]),
]


def _attend(forest, backend, seed, heads=(4, 2), width=8, dtype=torch.float32):
    layout = pack(forest)[2]
    tokens = len(layout.segment)
    generator = torch.Generator().manual_seed(seed)
    query, key, value, grad = (
        torch.randn(tokens, count, width, generator=generator).to(dtype).requires_grad_()
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    out = tree_attention(query, key, value, layout, width**-0.5, backend)
    out.backward(grad.detach())
    return out, query.grad, key.grad, value.grad


@settings(deadline=None, max_examples=40)
@given(forests, st.integers(0, 1000))
def test_backends_agree_forward_and_backward(forest, seed):
    reference = _attend(forest, "sdpa", seed)
    for backend in set(BACKENDS) - {"sdpa"}:
        for got, want in zip(_attend(forest, backend, seed), reference, strict=True):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("heads", "width"), [((9, 3), 64), ((2, 2), 80), ((4, 1), 20), ((1, 1), 128)])
def test_backends_agree_on_long_segments_and_odd_widths(heads, width):
    reference = _attend(LONG, "sdpa", 0, heads, width)
    for backend in set(BACKENDS) - {"sdpa"}:
        for got, want in zip(_attend(LONG, backend, 0, heads, width), reference, strict=True):
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def _in_bfloat16(heads, width):
    """What the compiled kernel gives in bfloat16 on `LONG`, and the dense float32 answer to the same numbers."""
    got = _attend(LONG, "cpu_tree", 0, heads, width, torch.bfloat16)
    layout = pack(LONG)[2]
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(len(layout.segment), count, width, generator=generator).bfloat16().float().requires_grad_()
        for count in (heads[0], heads[1], heads[1], heads[0])
    )
    out = tree_attention(query, key, value, layout, width**-0.5, "sdpa")
    out.backward(grad.detach())
    return got, (out, query.grad, key.grad, value.grad)


def test_vectors_in_bfloat16_err_by_the_rounding_of_their_output_only(monkeypatch):
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: False)
    got, exact = _in_bfloat16((9, 3), 64)
    torch.testing.assert_close(got[0], exact[0].bfloat16(), atol=1e-6, rtol=2**-7)  # one unit in the last place
    for mine, want in zip(got[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine.float(), want, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not native.has_matrix_tiles(), reason="this processor has no matrix tiles (Intel AMX)")
@pytest.mark.parametrize(("heads", "width"), [((9, 3), 64), ((2, 2), 80), ((4, 1), 20), ((1, 1), 128), ((80, 1), 8)])
def test_matrix_tiles_err_by_the_rounding_of_probabilities(heads, width):
    for mine, want in zip(*_in_bfloat16(heads, width), strict=True):
        assert (mine.float() - want).norm() < 4e-3 * want.norm()
        assert (mine.float() - want).abs().max() < 2e-2 * want.abs().max()


@pytest.mark.skipif(not native.has_matrix_tiles(), reason="this processor has no matrix tiles (Intel AMX)")
@settings(deadline=None, max_examples=40)
@given(forests, st.integers(0, 1000))
def test_matrix_tiles_agree_with_vectors(forest, seed):
    tiles = _attend(forest, "cpu_tree", seed, dtype=torch.bfloat16)
    with mock.patch.object(native, "has_matrix_tiles", lambda: False):
        vectors = _attend(forest, "cpu_tree", seed, dtype=torch.bfloat16)
    for mine, want in zip(tiles, vectors, strict=True):
        assert (mine.float() - want.float()).abs().max() <= 2e-2 * want.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel_gives_the_same_gradients_on_any_number_of_threads(dtype):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = _attend(LONG, "cpu_tree", 0, dtype=dtype)
        torch.set_num_threads(3)
        shared = _attend(LONG, "cpu_tree", 0, dtype=dtype)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, second) for first, second in zip(alone, shared, strict=True))


def test_large_scores_do_not_overflow_and_far_ones_vanish():
    layout = pack([Tree([3] * 3, [Branch([3], [[3]])])])[2]
    query, key = torch.full((5, 1, 4), 60.0), torch.zeros(5, 1, 4)
    key[0], key[1] = 60.0, -60.0
    value = torch.arange(5.0)[:, None, None].expand(5, 1, 4).contiguous()
    for backend in BACKENDS:
        out = tree_attention(query, key, value, layout, 1.0, backend)
        assert out.abs().max() < 1e-6, backend  # all weight is on key 0, whose value is 0


@pytest.mark.parametrize("tiles", [False, native.has_matrix_tiles()])
def test_nan_stays_nan_in_bfloat16(tiles, monkeypatch):
    monkeypatch.setattr(native, "has_matrix_tiles", lambda: tiles)
    query, key = torch.ones(2, 5, 1, 4).bfloat16()
    key[0] = torch.nan  # of the prompt, which all see
    layout = pack([Tree([3] * 3, [Branch([3], [[3]])])])[2]
    assert tree_attention(query, key, query, layout, 1.0, "cpu_tree").isnan().all()


def test_without_a_compiler_another_backend_is_chosen_and_the_reason_told(tmp_path):
    code = "from rm import attention, native; print(attention.choose_backend('auto', 'cpu'), native.reason_missing())"
    environment = {"CC": str(tmp_path / "no-such-compiler"), "RUBRIC_RM_CACHE": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("cpu_flash ")
    assert "no-such-compiler" in done.stdout


def test_a_compiler_that_fails_leaves_nothing_behind(tmp_path):
    code = "from rm import native; print(native.reason_missing())"
    environment = {"CC": "cc --no-such-option", "RUBRIC_RM_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "no-such-option" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_unknown_backend_names_the_known_ones():
    known = "auto, flash_attention_2, torch_varlen, cpu_tree, cpu_flash, sdpa"
    with pytest.raises(ValueError, match=f"unknown backend 'flush'; choose one of {known}"):
        choose_backend("flush", "cpu")


def test_the_backend_follows_device_and_dtype(monkeypatch):
    half, full = torch.bfloat16, torch.float32
    assert choose_backend("auto", "cpu", half) == choose_backend("auto", "cpu", full) == "cpu_tree"
    assert choose_backend("auto", "cpu", torch.float16) == "cpu_flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(varlen, "_has_flash_attn", lambda: True)
    assert choose_backend("auto", "cuda", half) == "flash_attention_2"
    assert choose_backend("auto", "cuda", full) == "sdpa"
    monkeypatch.setattr(varlen, "_has_flash_attn", lambda: False)
    assert choose_backend("auto", "cuda", half) == "torch_varlen"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend("auto", "cuda", half) == "sdpa"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("torch_varlen", "cpu", torch.bfloat16, "torch_varlen computes in float16 or bfloat16 on CUDA, got .* on cpu"),
        ("flash_attention_2", "cuda", torch.float32, "got torch.float32 on cuda; choose auto"),
        ("cpu_tree", "cuda", torch.float32, "cpu_tree runs on CPU, got cuda; choose auto"),
    ],
)
def test_a_backend_that_cannot_run_there_is_refused(name, device, dtype, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(name, device, dtype)


def test_the_compiled_kernel_refuses_other_dtypes():
    assert native.reason_missing() is None
    with pytest.raises(ValueError, match=r"cpu_tree: takes float32 or bfloat16 on cpu, got torch.float64 on cpu"):
        _attend(LONG, "cpu_tree", 0, dtype=torch.float64)
