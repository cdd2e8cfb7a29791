"""Agreement with rank groups recorded from megatron-core 0.19.2 (tests/golden/layout, source named there)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stretto.layout import Layout

pytestmark = pytest.mark.pure

DATA = Path(__file__).parents[1] / "golden" / "layout"
GENERATED = json.loads((DATA / "rank_generator.json").read_text())["cases"]
CREATED = json.loads((DATA / "parallel_groups.json").read_text())["cases"]


def name(case: dict[str, Any]) -> str:
    said = case.get("kwargs") or {k: case[k] for k in ("tp", "cp", "ep", "dp", "pp", "order") if k in case}
    return f"{case['world_size']}:" + ",".join(f"{k}={v}" for k, v in said.items())


@pytest.mark.parametrize("case", GENERATED, ids=name)
def test_generated_groups(case: dict[str, Any]) -> None:
    """A generator covers the dense axes, or, with ep > 1, the expert axes under the names of dense ones."""
    if case["ep"] == 1:
        sizes = {axis: case[axis] for axis in ("tp", "cp", "dp", "pp")}
        ours = {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp"}
    else:
        sizes = {"dp": case["tp"] * case["ep"] * case["dp"], "pp": case["pp"], "ep": case["ep"], "etp": case["tp"]}
        ours = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}
    layout = Layout.of(**sizes, order=case["order"])
    for axes, groups in case["groups"].items():
        asked = [ours[axis] for axis in axes.split("-") if axis in ours]
        assert layout.groups(*asked) == [tuple(group) for group in groups], axes


NAMES = {
    "DATA_PARALLEL_GROUP_WITH_CP": ("dp", "cp"),
    "DATA_PARALLEL_GROUP": ("dp",),
    "CONTEXT_PARALLEL_GROUP": ("cp",),
    "MODEL_PARALLEL_GROUP": ("tp", "pp"),
    "TENSOR_MODEL_PARALLEL_GROUP": ("tp",),
    "PIPELINE_MODEL_PARALLEL_GROUP": ("pp",),
    "EMBEDDING_GROUP": ("embed",),
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": ("tp", "dp", "cp"),
    "TENSOR_AND_DATA_PARALLEL_GROUP": ("tp", "dp"),
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": ("tp", "cp"),
    "EXPERT_MODEL_PARALLEL_GROUP": ("ep",),
    "EXPERT_TENSOR_PARALLEL_GROUP": ("etp",),
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": ("etp", "ep"),
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": ("etp", "ep", "pp"),
    "EXPERT_DATA_PARALLEL_GROUP": ("edp",),
    "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L0": ("cp.0",),
    "HIERARCHICAL_CONTEXT_PARALLEL_GROUP_L1": ("cp.1",),
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": ("etp", "ep", "edp", "pp"),
}


@pytest.mark.parametrize("case", CREATED, ids=name)
def test_created_groups(case: dict[str, Any]) -> None:
    said = case["kwargs"]
    tp, pp = said.get("tensor_model_parallel_size", 1), said.get("pipeline_model_parallel_size", 1)
    levels = said.get("hierarchical_context_parallel_sizes")
    cp = said.get("context_parallel_size", 1)
    layout = Layout.of(
        tp=tp,
        cp=tuple(levels) if levels else cp,
        dp=case["world_size"] // (tp * cp * pp),
        pp=pp,
        ep=said.get("expert_model_parallel_size", 1),
        etp=said.get("expert_tensor_parallel_size", tp),
    )
    for long_name, groups in case["groups"].items():
        if long_name == "POSITION_EMBEDDING_GROUP":  # ranks of the first stage, each alone
            continue
        axes = NAMES[long_name]
        ours = layout.groups(*axes)
        if long_name == "EMBEDDING_GROUP":  # there, middle stages are in no group; here, each is alone
            ours = [group for group in ours if len(group) == layout.size("embed")]
        assert sorted(ours) == sorted(tuple(sorted(group)) for group in groups), long_name
