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
        if flag == layers:
            yield "parallel.stage_layers", (positive(g, layers),) * (vpp * pp), flag
    group = "--microbatch-group-size-per-virtual-pipeline-stage"
    if group in g and positive(g, group) != pp:
        raise RejectedError(group, f"groups are of as many microbatches as there are ranks, {pp}, or a few more")


ENDS = ("--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers")


def _ends(g: Given) -> Iterator[Setting]:
    """How many layers the first and the last stage have; the others share the rest equally."""
    said = [flag for flag in ENDS if flag in g]
    if not said or "--num-layers" not in g:
        return
    flag, pp = said[0], positive(g, "--pipeline-model-parallel-size") if "--pipeline-model-parallel-size" in g else 1
    if any(name in g for name in _SEVERAL):
        raise RejectedError(flag, "with several stages on a rank is not translated: say --stage-layers")
    first, last = ([positive(g, end)] if end in g else [] for end in ENDS)
    rest, others = positive(g, "--num-layers") - sum(first + last), pp - len(said)
    if others < 0 or rest < 0 or (rest % others if others else rest):
        raise RejectedError(flag, f"{rest} other layers are not shared equally by {others} other stages")
    yield "parallel.stage_layers", (*first, *[rest // max(others, 1)] * others, *last), ", ".join(said)


_SEVERAL = ("--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage")


def stages(g: Given) -> Iterator[Setting]:
    """An explicit layout; how many stages of it a rank has follows."""
    flag = "--pipeline-model-parallel-layout"
    if flag not in g:
        yield from _ends(g)
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
