"""Operations, bytes and waterfalls of the training benchmark against figures worked out by hand."""

from __future__ import annotations

import random

import pytest

from benchmarks.train.flops import elementwise_bytes, flops_per_token, optimizer_bytes, rate
from benchmarks.train.shapes import SHAPES
from benchmarks.train.waterfall import ITEMS, Kernel, kind_of, waterfall

pytestmark = pytest.mark.pure


def test_parameters_and_operations_of_a_known_shape():
    """Catches a forgotten head, grouped keys counted like queries, the embedding counted as a product.

    D2 by hand: a layer has 4096 * (4096 + 2 * 1024) + 4096^2 + 3 * 4096 * 14336 = 218,103,808, the head 134,217,728.
    """
    d2 = SHAPES["D2"]
    assert d2.multiplied == 8 * 218_103_808 + 134_217_728
    assert d2.parameters == d2.multiplied + 134_217_728 + 17 * 4096
    assert flops_per_token(d2) == 6 * d2.multiplied + 12 * 8 * 4096 * 8192
    assert flops_per_token(d2, causal=True) == 6 * d2.multiplied + 6 * 8 * 4096 * 8192
    assert SHAPES["D4"].tokens == 65_536
    # one second a step on two devices
    assert rate(SHAPES["D4"], 1000.0, 2).tokens_per_second_per_gpu == 32_768
    assert rate(SHAPES["D4"], 1000.0, 2).mfu_full == pytest.approx(32_768 * flops_per_token(d2) / 989.5e12)


def test_bytes_are_near_those_that_were_measured_as_floors():
    """At a copy rate of 3.03 TB/s D1's elementwise floor was 27 ms and its optimizer 15 ms, D2's floor 39 ms."""
    d1, d2 = SHAPES["D1"], SHAPES["D2"]
    ms = {name: sum(elementwise_bytes(s, s.tokens).values()) / 3.03e9 for name, s in (("D1", d1), ("D2", d2))}
    assert ms["D1"] == pytest.approx(27, rel=0.1)
    assert ms["D2"] == pytest.approx(39, rel=0.1)
    assert optimizer_bytes(d1.parameters) / 3.03e9 == pytest.approx(15, rel=0.05)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "product"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("triton_poi_fused__scaled_dot_product_cudnn_attention_cat_mul_3", "elementwise"),
        ("triton_tem_fused_mm_1", "product"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize("pipeline", [False, True])
def test_every_instant_belongs_to_one_item(pipeline):
    """A step of 100 ms made by hand; a message under a product is hidden, one after it is exposed."""
    kernels = [
        Kernel("gemm", 0, 40),
        Kernel("ncclDevKernel_AllReduce", 30, 50),
        Kernel("elementwise_kernel", 45, 55),
        Kernel("flash_fwd", 55, 65),
        Kernel("Memcpy PtoP (Device -> Device)", 60, 70),
        Kernel("nvjet", 75, 80),
        Kernel("norm_kernel", 82, 86),
        Kernel("adam", 86, 95),
    ]
    found = waterfall(kernels, (0, 100), step=101, product_flops=30e9, tflops=1.0, pipeline=pipeline)
    expected = {
        "matmul ceiling": 30,
        "small shapes": 15,
        "attention": 10,
        "elementwise": 10,
        "exposed communication": 0 if pipeline else 10,
        "bubble": 10 if pipeline else 0,
        "optimizer": 13,
        "launch and host gaps": 12,
    }
    assert found.items == expected
    assert found.holds
    assert not waterfall(kernels, (0, 100), step=103, product_flops=1, tflops=1, pipeline=False).holds


def test_items_sum_to_the_window_whatever_overlaps():
    draw = random.Random(0)
    names = ["gemm", "flash", "other", "nccl SendRecv", "nccl", "adam"]
    for _ in range(50):
        starts = [draw.uniform(-5, 100) for _ in range(40)]
        kernels = [Kernel(draw.choice(names), start, start + draw.uniform(0, 12)) for start in starts]
        found = waterfall(kernels, (0, 100), step=100, product_flops=1e10, tflops=1.0, pipeline=True)
        assert found.total == pytest.approx(100)
        assert set(found.items) == set(ITEMS)
        assert min(found.items.values()) >= 0
