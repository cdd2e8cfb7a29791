"""Weights gathered in FP8 are those of the whole matrix quantized, to the bit, however it is cut; at half the bytes.

Faults to catch: the largest number of a rank's own part for that of the matrix; the largest number of all that a rank
has; scales that the ranks of tp do not agree on; NaN that the rank beside does not see; scales of the step before;
bytes of the step before; bytes at another place; scales one behind the other; a copy across of a visit before; bytes
that are quantized anew while others read them; a message for each unit; one message where updates come one by one;
norms of each block gathered by themselves; copies across that the ledger leaves out; experts of one rank counted as
gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from readable import make_readable
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stretto.arguments import parse
from stretto.arguments.schema import Arguments
from stretto.distributed import Bucket, DataParallel, data_parallel
from stretto.distributed.memory import here
from stretto.distributed.quantized import Matrix, QuantizedBucket
from stretto.estimate import rank_ledger
from stretto.estimate.steady import steady
from stretto.layout import Layout
from stretto.parallel_state import ParallelState, default_axes
from stretto.params import Init, ParamSpec, declare
from stretto.schedule.sharding import MODES
from stretto.tensor_parallel.fp8 import Tensorwise, Weight
from stretto.tensor_parallel.fp8_shards import WeightQuantizer
from stretto.testing import Pool
from stretto.verify import against_reference, build, random_batch
from stretto.world import Axis, Work, World

pytestmark = pytest.mark.gloo

Shapes = list[list[tuple[int, int]]]


class Net(nn.Module):
    """Blocks of matrices, of any shapes, and a vector each."""

    def __init__(self, shapes: Shapes, seed: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Module() for _ in shapes)
        generator = torch.Generator().manual_seed(seed)
        for block, matrices in zip(self.blocks, shapes, strict=True):
            for n, shape in enumerate([*matrices, (3,)]):
                values = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-4, 3, (1,)).item()
                block.register_parameter(f"w{n}", nn.Parameter(values.bfloat16()))
                declare(block, f"w{n}", ParamSpec(shape, Init(), weight_decay=len(shape) > 1))


SHAPES = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3), min_size=1, max_size=3
)


@settings(max_examples=settings.default.max_examples // 4)
@given(shapes=SHAPES, seed=st.integers(0, 1000), special=st.sampled_from([0.0, 1e4, torch.inf, torch.nan]))
@pytest.mark.parametrize(("tp", "dp", "readable"), [(1, 2, True), (1, 3, False), (2, 2, False), (1, 4, True)])
def test_any_unit_cut_anywhere_is_the_matrix_quantized(
    pool: Pool, tp: int, dp: int, readable: bool, shapes: Shapes, seed: int, special: float
) -> None:
    for wrong in pool.run(tp * dp, _differ, tp, shapes, seed, special, readable):
        assert wrong == []


def _differ(world: World, tp: int, shapes: Shapes, seed: int, special: float, readable: bool) -> list[str]:
    """What of matrices that have come is not the whole matrix quantized; before an update, and after it."""
    layout, wrong = Layout.of(tp=tp, dp=world.size // tp), []
    with ParallelState.build(layout, world, axes=(*default_axes(layout), ("dp:gather", "cp"))) as state:
        if readable:
            make_readable(state)
        net = Net(shapes, seed + state.coords["tp"])
        gemms = Tensorwise(state.axis("tp"))
        for param in net.parameters():
            if param.dim() > 1:
                gemms.expect(param)
        with DataParallel({0: net}, state, sharding=MODES["fsdp"], quantizer=WeightQuantizer(gemms)) as weights:
            assert all(
                isinstance(b, QuantizedBucket) == (b.items[0].param in gemms.matrices) for b in weights.all_buckets
            )
            read = [x for m in gemms.gathered.values() for x in (m.bytes, m.bytes_across, m.plain_scale)]
            wrong += [f"{x.shape} where cuBLAS reads none" for x in read if x.storage_offset() * x.itemsize % 16]
            for visit in ("first", "again", "after an update"):
                if visit == "after an update":
                    _update(weights, seed, special)
                found = dict(_come(weights, gemms))
                with weights.whole():
                    for name, param in net.named_parameters():
                        if param in found:
                            wrong += [
                                f"{visit}: {name}: {n}"
                                for n in _unlike(found[param], gemms.make(param.data, column=True))
                            ]
    return wrong


def _come(weights: DataParallel, gemms: Tensorwise) -> Iterator[tuple[nn.Parameter, Weight]]:
    """What GEMMs read, copied, for a backward and without one; then it is let go of."""
    for each in weights.all_buckets:
        each.gather()
    for each in weights.all_buckets:
        each.gathered()
    for param in gemms.matrices:
        w = gemms.weight(param, column=True)
        assert isinstance(w, Matrix)
        yield param, Weight(w.plain.clone(), w.plain_scale.clone(), w.across.clone(), w.across_scale.clone())
    for each in weights.all_buckets:
        each.release()


def _update(weights: DataParallel, seed: int, special: float) -> None:
    for n, each in enumerate(weights.all_buckets):
        each.settle()
        each.shard.mul_(2.0 ** (3 - n)).add_(each.shard.roll(1), alpha=0.3)
        for gap in each.flat.gaps:
            inside = range(max(gap.start, each.own.start), min(gap.stop, each.own.stop))
            if inside:
                each.shard[inside.start - each.own.start : inside.stop - each.own.start] = 0
        at = seed % max(1, each.items[0].param.numel())
        if special and at in each.own:
            each.shard[at - each.own.start] = special
        each.updated()


def _unlike(found: Weight, wanted: Weight) -> list[str]:
    pairs = {name: (getattr(found, name), getattr(wanted, name)) for name in Weight.__dataclass_fields__}
    return [
        name
        for name, (one, other) in pairs.items()
        if one.dtype != other.dtype or not torch.equal(_bits(one), _bits(other))
    ]


def _bits(x: Tensor) -> Tensor:
    """NaN has several."""
    return torch.nan_to_num(x.float(), nan=12345.0, posinf=torch.inf)


SIZES = "--hidden 64 --heads 4 --kv-heads 2 --ffn 96 --layers 3 --vocab 53 --seq-len 16 --micro-batch 1 --clip-grad 0"
AT_NIGHT = pytest.mark.nightly
RUNS = [
    ("1 1 2", ""),
    ("1 1 3", "--keep-units 1 --bias --norm layer --activation gelu --recompute block"),
    pytest.param("1 1 4", "--dp-shard 2 --optimizer muon", marks=AT_NIGHT),
    ("2 1 2", "--sequence-parallel --freeze model.layers.1.* --ffn-chunks 2 --seq-len 32 --masters remainder"),
    ("1 2 2", "--optimizer-cpu-offload --masters remainder"),
    pytest.param("1 1 2", "--lora-rank 4 --lora-targets q,down", marks=AT_NIGHT),
    pytest.param("1 1 2", "--mtp-layers 1 --reduce-dtype bf16", marks=AT_NIGHT),
    pytest.param("1 2 2", "--schedule zb-h1", marks=AT_NIGHT),
    pytest.param(
        "2 2 2", "--sequence-parallel --layers 5 --schedule interleaved --vpp 2 --global-batch 8", marks=AT_NIGHT
    ),
    pytest.param("1 1 2", "--experts 4 --top-k 2 --expert-ffn 32 --shared-ffn 32 --ep 2", marks=AT_NIGHT),
]


def arguments(sizes: str, words: str) -> Arguments:
    tp, pp, dp = map(int, sizes.split())
    layout = f"--tp {tp} --pp {pp} --nproc {tp * pp * dp} --global-batch {2 * dp}"
    return parse(
        f"--preset demo {SIZES} --dtype bf16 --fp8 tensorwise --sharding fsdp {layout} {words}".split(), env={}
    ).args


@pytest.mark.parametrize(("sizes", "words"), RUNS)
def test_a_run_is_the_run_whose_weights_are_gathered_in_bf16(pool: Pool, sizes: str, words: str) -> None:
    """Losses, gradients, updates and an evaluation, to the bit; and of what comes half the bytes."""
    args = arguments(sizes, words)
    ranks = args.parallel.tp * args.parallel.pp * (args.parallel.dp or 1)
    wide, quantized_ = (pool.run(ranks, _run, args, how, timeout=120.0) for how in (False, True))
    for one, other in zip(wide, quantized_, strict=True):
        assert one[0] == other[0]
        assert one[1].keys() == other[1].keys()
        assert not [name for name, tensor in one[1].items() if not torch.equal(tensor, other[1][name])]
        assert other[2] == []
        bytes_, before = other[3], one[3]
        assert 2 * bytes_["matrices"] == before["matrices"] > 0
        assert {n: x for n, x in bytes_.items() if n != "matrices"} == {
            n: x for n, x in before.items() if n != "matrices"
        }


def _run(world: World, args: Arguments, in_fp8: bool) -> tuple[list[Any], dict[str, Tensor], list[str], Counter[str]]:
    told: list[Any] = []
    tensors: dict[str, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        if not in_fp8:  # the same units, gathered as they are
            patch.setattr(data_parallel, "QuantizedBucket", lambda g, a, s, _, **options: Bucket(g, a, s, **options))
        with build(args, args.parallel.layout, world) as session:
            buckets = session.built.weights.all_buckets
            sent = _counted(patch, buckets)
            told.append(session.evaluate(random_batch(args, 9)))
            for step in range(2):
                told.append(session.step(random_batch(args, step)))
                tensors |= {f"{step}/{name}": grad for name, grad in session.full_grads().items()}
            told.append(session.evaluate(random_batch(args, 9)))
            units = [each for each in buckets if isinstance(each, QuantizedBucket)]
            moving = [each for each in units if not each.frozen]
            if in_fp8:  # before the first use, and after each update
                apart = args.optimizer.optimizer_cpu_offload
                stages = len(session.built.stages)
                times = len(units) + 2 * len(moving) if apart else stages * (1 + 2 * bool(moving))
                assert sent.pop("scales") == times
            sent = Counter(sent)
            return told, tensors | session.full_state(), session.unequal_replicas(), sent


def _counted(patch: pytest.MonkeyPatch, buckets: Sequence[Bucket]) -> Counter[str]:
    """From now on: bytes of what this rank gives the others of matrices and of all else, and how often; and how often
    it agrees on scales."""
    sent, scales = Counter[str](), WeightQuantizer.scales

    def agreeing(self: WeightQuantizer, parts: Sequence[Tensor], over: Axis) -> Tensor:
        sent["scales"] += 1
        return scales(self, parts, over)

    patch.setattr(WeightQuantizer, "scales", agreeing)

    def counted(each: Bucket) -> Callable[[], Work]:
        begin = each._begin
        kind = "matrices" if all(_in_fp8(item.logical[0].name) for item in each.items) else "others"
        given = each.own_bytes if isinstance(each, QuantizedBucket) else each.shard

        def counting() -> Work:
            sent[kind] += given.nbytes
            sent[f"gathers of {kind}"] += 1
            return begin()

        return counting

    for each in buckets:
        patch.setattr(each, "_begin", counted(each))
    return sent


def _in_fp8(name: str) -> bool:
    return "_proj.weight" in name and ".experts." not in name


def test_the_units_are_as_ever_but_for_what_is_little(pool: Pool) -> None:
    """Held against a run without: losses, gradients and weights to the bit, over two ranks."""
    args = arguments("1 1 2", "")
    plain, found = (pool.run(2, _units, args, how)[0] for how in (False, True))
    assert plain[:2] == (["Bucket"] * 5, found[1])
    assert Counter(found[0]) == {"Bucket": 3, "QuantizedBucket": 3}
    assert not [name for name, tensor in plain[2].items() if not torch.equal(tensor, found[2][name])]


def _units(world: World, args: Arguments, in_fp8: bool) -> tuple[list[str], list[float], dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        if not in_fp8:
            patch.setattr(WeightQuantizer, "takes", lambda *_: False)
        with build(args, args.parallel.layout, world) as session:
            losses = [session.step(random_batch(args, step))[0] for step in range(3)]
            return [type(b).__name__ for b in session.built.weights.all_buckets], losses, session.full_state()


def test_over_one_rank_nothing_is_gathered() -> None:
    args = arguments("1 1 1", "")
    with build(args, Layout.of(), World.single()) as session:
        session.step(random_batch(args, 0))
        assert {type(each) for each in session.built.weights.all_buckets} == {Bucket}
        assert not session.built.fp8[0].gathered


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("1 1 2", ""),
        ("1 1 3", "--keep-units 2 --bias"),
        pytest.param("2 1 2", "--tied --recompute block", marks=AT_NIGHT),
        ("1 1 2", "--experts 4 --top-k 2 --expert-ffn 32 --shared-ffn 32 --ep 2"),
    ],
)
def test_the_ledger_says_what_is_held(pool: Pool, sizes: str, words: str) -> None:
    """At most, of all moments, and of the parts that stay; and nothing is copied on its way."""
    args = arguments(sizes, words)
    kept = steady(args, 0, embedding=True)
    every = [(at, back) for at in range(args.model.layers + 2) for back in (False, True)]
    gathered = max(kept.sections.gathered(at, back=back) for at, back in every)
    filling = max(kept.filling + kept.sections.filling(at, back=back) for at, back in every)
    ranks = args.parallel.tp * (args.parallel.dp or 1)
    for found in pool.run(ranks, _held, args):
        assert found["gathered"] == gathered
        assert found["reducing"] <= filling
        assert found["in FP8"] == kept.quantized == rank_ledger(args, 0).quantized
        assert found["weights"] == kept.weights
        assert found["copied"] == 0


def _held(world: World, args: Arguments) -> dict[str, int]:
    found = Counter[str]()
    with build(args, args.parallel.layout, world) as session:
        built, buckets = session.built, session.built.weights.all_buckets

        def look(*_: object) -> None:
            for each in buckets:
                assert not (isinstance(each, QuantizedBucket) and each.whole)
            now = [t for b in buckets for t in _passing(b) if here(t)]
            found["gathered"] = max(found["gathered"], sum(t.nbytes for t in now))
            filled = sum(b.grads.nbytes for b in buckets if here(b.grads) and b.sharding.grads)
            found["reducing"] = max(found["reducing"], filled)

        for module in built.stages[0].modules():
            module.register_forward_pre_hook(look)
        for param in built.weights._home:
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(look)
        within, experts = built.stepper.steady, built.fp8[1:]

        @contextmanager
        def noting() -> Iterator[None]:
            with within():
                yield
                look()
                assert not built.fp8[0].held()
                found["in FP8"] = sum(tensor.nbytes for each in experts for tensor in each.held())

        built.stepper.steady = noting
        with Copied() as copied:
            for step in range(2):
                built.stepper.step(session.microbatches(random_batch(args, step)), 1e-3)
        found["in FP8"] += sum(b.own_bytes.nbytes + b.scales.nbytes for b in buckets if _is(b))
        found["weights"] = sum(b.shard.nbytes for b in buckets)
        found["copied"] = copied.elements
    return dict(found)


def _passing(each: Bucket) -> tuple[Tensor, ...]:
    """What of its weights comes and goes."""
    if isinstance(each, QuantizedBucket):
        return each.weights, each.bytes, each.transposed
    return (each.weights,) if each.sharding.params else ()


def _is(each: Bucket) -> bool:
    return isinstance(each, QuantizedBucket)


class Copied(TorchDispatchMode):
    """Counts bytes that are copied as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, Tensor) and out.element_size() == 1 and out.numel() >= 64
        if func.overloadpacket.__name__ in ("copy_", "cat", "clone", "stack") and made:
            source = next(x for x in args[::-1] if isinstance(x, Tensor))
            self.elements += out.numel() * (source.dtype == out.dtype and source.is_contiguous())
        return out


@pytest.mark.parametrize("words", ["", pytest.param("--sequence-parallel --recompute selective", marks=AT_NIGHT)])
def test_verify_takes_it(pool: Pool, words: str) -> None:
    args = arguments("2 1 2" if words else "1 1 2", words)
    for found in pool.run(args.parallel.tp * 2, _verified, args, timeout=140.0):
        assert found == []


def _verified(world: World, args: Arguments) -> list[str]:
    found = against_reference(args, args.parallel.layout, world)
    return [*found.unequal, *(d.quantity.kind for d in found.failures)]
