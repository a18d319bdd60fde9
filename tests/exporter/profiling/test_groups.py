"""Assigning operations to parts of the model, by node name, or by order if the engine has names of its own."""

from __future__ import annotations

import pytest

from vp_engines.backends.recording import Operation
from vp_exporter.profiling.groups import ATTENTION, EMBEDDING, GROUPS, HEAD, MLP, NORM, REDUCTION, RUNTIME, assign

A, E, H, M, N, R = ATTENTION, EMBEDDING, HEAD, MLP, NORM, REDUCTION
# As named by ONNX Runtime's profiler (1.31): a block that reduces, fused nodes, the end.
ONNX_RUNTIME = [
    ("embed/Reshape.0", "Reshape", E, None),
    ("embed/Gather.0", "Gather", R, None),
    ("embed/MatMul.0", "MatMul", E, None),
    ("vit.blocks.0.norm1/LayerNormalization.0", "LayerNormalization", N, 0),
    ("blocks.0/MatMul.0", "MatMul", A, 0),
    ("blocks.0/Add.0", "Add", A, 0),
    ("model/Split.0", "Split", A, 0),
    ("blocks.0/Unsqueeze.0", "Unsqueeze", R, 0),
    ("blocks.0/Attention.0", "Attention", A, 0),
    ("blocks.0.statistics/MatMul.0", "MatMul", R, 0),
    ("blocks.0.see/MatMul.0", "MatMul", R, 0),  # name in early bundles
    ("vit.blocks.0.attn.proj/MatMul.0", "MatMul", A, 0),
    ("blocks.0/Add.1", "Add", A, 0),
    ("blocks.0.reduce/TopK.0", "TopK", R, 0),
    ("model/Concat.0", "Concat", R, 0),
    ("vit.blocks.0.norm2/LayerNormalization.0", "LayerNormalization", N, 0),
    ("vit.blocks.0.mlp.fc1/MatMul.0", "MatMul", M, 0),
    ("BiasGelu_token_3", "BiasGelu", M, 0),
    ("vit.blocks.0.mlp.fc2/MatMul.0", "MatMul", M, 0),
    ("blocks.0/Add.2", "Add", M, 0),
    ("SkipLayerNorm_AddFusion_2", "SkipLayerNormalization", N, None),
    ("blocks.11/MatMul.0", "MatMul", A, 11),
    ("vit.norm/LayerNormalization.0", "LayerNormalization", N, None),
    ("head/Gather.0", "Gather", H, None),
    ("vit.head/Gemm.0", "Gemm", H, None),
]
# As named by OpenVINO (2026.4): a fused operation has the name of its last node.
OPENVINO = [
    ("embed/MatMul.0", "FullyConnected gemm_mlas_f32", E, None),
    ("MVN_30", "MVN jit_avx2_f32", N, None),
    ("blocks.0/Add.0", "FullyConnected gemm_mlas_f32", A, None),
    ("VariadicSplit_11333", "VariadicSplit unknown_f32", A, None),
    ("blocks.0/Transpose.1", "Subgraph jit_avx2_f32", A, 0),
    ("blocks.0.see/MatMul.0", "MatMul gemm_mlas_f32", R, 0),
    ("blocks.0/Add.1", "FullyConnected gemm_mlas_f32", A, 0),
    ("vit.blocks.0.norm2/LayerNormalization.0", "MVN jit_avx2_f32", N, 0),
    ("vit.blocks.0.mlp.fc1/Add.0", "FullyConnected brgemm_avx2_f32", M, 0),
    ("blocks.0/Add.2", "FullyConnected brgemm_avx2_f32", M, 0),
]
# As named by torch's profiler for AOTInductor (2.11), and in the style of TensorRT.
INDUCTOR = [
    ("cpp_fused_clone_permute_view_0", E, None),
    ("aoti_torch_cpu__linear_pointwise", E, None),
    ("cpp_fused_add_constant_pad_nd_native_layer_norm_1", N, 0),
    ("aoti_torch_cpu__linear_pointwise", A, 0),
    ("aoti_torch_cpu__scaled_dot_product_flash_attention_for_cpu", A, 0),
    ("aoti_torch_cpu__linear_pointwise_binary", A, 0),
    ("aoti_torch_cpu_sort_stable", R, 0),
    ("cpp_fused_gather_2", R, 0),
    ("cpp_fused_native_layer_norm_3", N, 0),
    ("aoti_torch_cpu__linear_pointwise", M, 0),
    ("aoti_torch_cpu__linear_pointwise_binary", M, 0),
    ("cpp_fused_native_layer_norm_3", N, 1),
    ("aoti_torch_cpu__linear_pointwise", A, 1),
    ("triton_per_fused_softmax_4", A, 1),
    ("cpp_fused_native_layer_norm_3", N, 1),
    ("aoti_torch_cpu__linear_pointwise", M, 1),
    ("cpp_fused_native_layer_norm_select_5", N, None),
    ("aoti_torch_cpu_addmm_out", H, None),
]


def operations(names: list[tuple[str, str]]) -> list[Operation]:
    return [Operation(name, kind, float(i), 1.0) for i, (name, kind) in enumerate(names)]


@pytest.mark.parametrize("known", [ONNX_RUNTIME, OPENVINO])
def test_names_of_the_graph(known: list[tuple[str, str, str, int | None]]) -> None:
    found = assign(operations([(name, kind) for name, kind, _, _ in known]))
    assert found == [(group, block) for _, _, group, block in known]


def test_names_of_the_engine() -> None:
    found = assign(operations([(name, "") for name, _, _ in INDUCTOR]))
    assert found == [(group, block) for _, group, block in INDUCTOR]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("{ForeignNode[vit.blocks.3.mlp.fc1/MatMul.0 + vit.blocks.3.mlp.fc2/MatMul.0]}", MLP),
        ("vit.blocks.3.attn.q_norm/LayerNormalization.0", NORM),
        ("vit.fc_norm/LayerNormalization.0", NORM),
        ("blocks.10.reduce/inner/GatherND.2", REDUCTION),
    ],
)
def test_other_names(name: str, group: str) -> None:
    assert assign(operations([(name, "")]))[0][0] == group


def test_what_spans_two_parts_goes_with_what_ran_before() -> None:
    names = ["embed/MatMul.0", "blocks.0/MatMul.0", "blocks.0.reduce/TopK.0 + vit.blocks.0.mlp.fc1/MatMul.0"]
    assert [group for group, _ in assign(operations([(name, "") for name in names]))] == [
        EMBEDDING,
        ATTENTION,
        ATTENTION,
    ]


def test_attentions_that_an_engine_does_not_show() -> None:
    names = ["conv", "MVN_1", "gemm", "gemm", "MVN_2", "gemm", "MVN_3", "gemm", "MVN_4", "gemm", "MVN_5", "gemm"]
    found = assign(operations([(name, "") for name in names]))
    assert [group for group, _ in found] == [E, N, A, A, N, M, N, A, N, M, N, H]
    assert [block for _, block in found] == [None, 0, 0, 0, 0, 0, 1, 1, 1, 1, None, None]


def test_no_operation_is_the_runtimes() -> None:
    assert assign([]) == []
    found = assign(operations([("a", ""), ("b", "")]))
    assert [group for group, _ in found] == [EMBEDDING, EMBEDDING]
    assert RUNTIME in GROUPS
