"""Stages of a pipeline, from Megatron-LM's flags."""

from __future__ import annotations

from collections.abc import Iterator

from stretto.compat.megatron.given import Given, RejectedError, Setting, one, positive


def interleaved(g: Given) -> Iterator[Setting]:
    """Several stages on a rank are said by their number, or by the layers of each: then the schedule is interleaved."""
    count, layers, pp = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage", 1
    if "--pipeline-model-parallel-size" in g:
        pp = positive(g, "--pipeline-model-parallel-size")
    if count in g:
        flag, vpp = count, positive(g, count)
    elif layers in g and "--num-layers" in g:
        flag, each, whole = layers, positive(g, layers), positive(g, "--num-layers")
        vpp, rest = divmod(whole, each * pp)
        if rest or not vpp:
            raise RejectedError(flag, f"{whole} layers are no multiple of {each} layers * {pp} ranks")
    else:
        return
    if vpp > 1 and "--pipeline-model-parallel-layout" not in g:
        yield "parallel.vpp", vpp, flag
        yield "parallel.schedule", "interleaved", flag
    group = "--microbatch-group-size-per-virtual-pipeline-stage"
    if group in g and positive(g, group) != pp:
        raise RejectedError(group, f"groups are of as many microbatches as there are ranks, {pp}, or a few more")


def stages(g: Given) -> Iterator[Setting]:
    """An explicit layout; how many stages of it a rank has follows."""
    flag = "--pipeline-model-parallel-layout"
    if flag not in g:
        return
    pp = positive(g, "--pipeline-model-parallel-size") if "--pipeline-model-parallel-size" in g else 1
    text = one(g, flag)
    try:
        from stretto.schedule.partition import layers_of  # numpy comes with it: not for a help text

        layers = layers_of(text)
    except ValueError as error:
        raise RejectedError(flag, str(error)) from error
    count = len(layers)
    if count % pp:
        raise RejectedError(flag, f"{count} stages are no multiple of {pp} ranks")
    yield "parallel.stage_layers", layers, flag
    if count > pp:
        yield "parallel.vpp", count // pp, flag
        yield "parallel.schedule", "interleaved", flag
