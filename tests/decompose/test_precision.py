"""fp32 stays fp32, in every thread, and the process gets its setting back."""

from __future__ import annotations

import threading

import pytest
import torch

from pissa.decompose.precision import full_precision


@pytest.fixture
def medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("medium")
def test_threads_that_overlap_share_one_setting_which_the_last_puts_back():
    first_inside, first_left = threading.Event(), threading.Event()
    seen = []

    def second() -> None:
        first_inside.wait(10)
        with full_precision():
            second_inside.set()
            first_left.wait(10)
            seen.append(torch.backends.mkldnn.matmul.fp32_precision)  # pyright: ignore[reportAttributeAccessIssue]

    second_inside = threading.Event()
    thread = threading.Thread(target=second)
    thread.start()
    with full_precision():
        first_inside.set()
        second_inside.wait(10)
    first_left.set()
    thread.join(10)
    assert seen == ["ieee"]
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.usefixtures("medium")
def test_an_error_inside_leaves_the_setting_as_it_was():
    with pytest.raises(RuntimeError), full_precision():
        raise RuntimeError
    assert torch.get_float32_matmul_precision() == "medium"


def test_products_inside_autocast_are_fp32():
    A = torch.ones(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert (A @ A).dtype == torch.float32
        assert (A @ A).dtype == torch.bfloat16


def test_a_backend_s_own_setting_is_put_back():
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with full_precision():
            assert backend.fp32_precision == "ieee"
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
