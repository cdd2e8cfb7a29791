"""Weights of a Hugging Face directory into every rank's slices of a model, whatever the layout.

Every byte of the files is read once over the job: what several ranks hold each of them reads a share of, and they hand
the shares round (`share`). What a rank alone holds goes from the file into its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.exchange import all_gather_json, device_of
from stretto.interop.config import HfConfig
from stretto.interop.errors import InteropError
from stretto.interop.files import DTYPES, TensorFiles
from stretto.interop.names import BUFFERS, EMBEDDING, FileTensor, Shapes, file_tensors, further_copies
from stretto.interop.share import Key, Packet, Part, packets
from stretto.layout.flat import Rectangle, overlap, rectangles
from stretto.params import Slice
from stretto.world import Axis

_SHOWN = 40

HEADS = ("lm_head.weight", "embed_out.weight")
"""What files may call a head. Some hold one that is tied a second time."""

ALONE = Axis.single("tp")


def load_weights(directory: Path, config: HfConfig, shapes: Shapes, slices: Sequence[Slice], axis: Axis = ALONE) -> int:
    """Fill `slices`, this rank's part of the logical tensors of these full `shapes`, from the files of a directory.

    `axis` has all ranks that load together, each with slices of its own. Sources may be of other dtypes. Returns the
    bytes that this rank has read. Besides what it fills a rank needs memory for two packets and the buffers of some
    threads, 200 MB.

    Raises:
        InteropError: before anything is read, with every tensor that is missing, left over, of another shape or of
            a dtype that holds no weights; or when a file ends early.
    """
    table = file_tensors(config.family.model_type, config.model, shapes)
    with TensorFiles(directory) as files:
        copies = _copies(files, config)
        names = _matched(files, table, copies, config.passed_over)
        numbers = {name: n for n, name in enumerate(shapes)}
        targets = {_key(part, numbers): part.tensor for part in slices}
        sources = {
            numbers[piece.logical]: _Source(held, n, names[held.name])
            for held in table
            for n, piece in enumerate(held.pieces)
        }
        loading = _Loading(files, sources, targets, axis)
        loading.run()
        for copy, name in copies.items():
            loading.require_same(numbers[name], copy)
        return loading.finish()


def require_weights(directory: Path, config: HfConfig, shapes: Shapes) -> None:
    """Raise InteropError as `load_weights` does before anything is read. No collective."""
    with TensorFiles(directory) as files:
        table = file_tensors(config.family.model_type, config.model, shapes)
        _matched(files, table, _copies(files, config), config.passed_over)


def _copies(files: TensorFiles, config: HfConfig) -> dict[str, str]:
    """What the files hold a second time, and of which tensor: a tied head, ends that further layers share."""
    tied = dict.fromkeys(HEADS, EMBEDDING) if config.model.tied else {}
    return {copy: name for copy, name in (tied | further_copies(config.model)).items() if copy in files.tensors}


def _key(part: Slice, numbers: Mapping[str, int]) -> Key:
    return numbers[part.name], tuple(part.offsets), tuple(part.tensor.shape)


@dataclass(frozen=True)
class _Source:
    """A logical tensor: piece `n` of a tensor that the files call `name`."""

    held: FileTensor
    n: int
    name: str


class _Loading:
    """One load on this rank. An error of a file is raised when all ranks are through: they wait for each other."""

    def __init__(
        self, files: TensorFiles, sources: Mapping[int, _Source], targets: Mapping[Key, Tensor], axis: Axis
    ) -> None:
        self.files, self.sources, self.targets, self.axis = files, sources, targets, axis
        said = all_gather_json(list(targets), axis)
        self.held: list[list[Key]] = [[(n, tuple(at), tuple(shape)) for n, at, shape in keys] for keys in said]
        self.read, self.wrong, self.of = 0, "", ""
        self.error: InteropError | None = None

    def run(self) -> None:
        """Fill all targets."""
        before: tuple[Packet, Tensor] | None = None
        for packet in packets(self.held, {n: self._dtype(n).itemsize for n in self.sources}):
            if self.axis.rank not in packet.holders:
                continue
            if len(packet.holders) == 1:
                for part in packet.parts:
                    self._fill(self.sources[part.key[0]], part.offsets, self._target(part))
                continue
            buffer = self._begin(packet)
            if before is not None:
                self._pass_round(*before)
            self._wait()
            before = packet, buffer
        if before is not None:
            self._pass_round(*before)
        self._wait()

    def require_same(self, number: int, copy: str) -> None:
        """What the files hold once more must be the same; each byte of it is read once, too."""
        source = self.sources[number]
        other = _Source(source.held, source.n, copy)
        if self.files.tensors[copy].shape != source.held.shape:
            self.wrong, self.of = copy, source.name
            return
        mine = [[key for key in keys if key[0] == number] for keys in self.held]
        for packet in packets(mine, {number: DTYPES[self.files.tensors[copy].dtype].itemsize}):
            if self.axis.rank not in packet.holders:
                continue
            share = packet.share(self.axis.rank)
            for part, _, rectangle in _rectangles(packet, share):
                offsets = tuple(a + b for a, b in zip(part.offsets, rectangle.offsets, strict=True))
                target = self._target(part)
                for dim, (o, n) in enumerate(zip(rectangle.offsets, rectangle.shape, strict=True)):
                    target = target.narrow(dim, o, n)
                found = torch.empty_like(target)
                self._fill(other, offsets, found)
                self._wait()
                if not torch.equal(found, target):
                    self.wrong, self.of = copy, source.name

    def finish(self) -> int:
        """Bytes that were read. Raises what went wrong on any rank."""
        if self.wrong and self.error is None:
            what = f"{self.files.directory}: {self.wrong} must hold {self.of} once more, and does not"
            self.error = InteropError(what, [])
        said = all_gather_json(str(self.error or ""), self.axis)
        if first := next(filter(None, said), ""):
            raise self.error or InteropError(first, [])
        return self.read

    def _begin(self, packet: Packet) -> Tensor:
        """Begin to read this rank's share of a packet, into its place in a buffer for the whole."""
        dtype = self._dtype(packet.parts[0].key[0])
        buffer = torch.empty(packet.numel, dtype=dtype)
        for part, at, rectangle in _rectangles(packet, packet.share(self.axis.rank)):
            offsets = tuple(a + b for a, b in zip(part.offsets, rectangle.offsets, strict=True))
            size = torch.Size(rectangle.shape).numel()
            self._fill(self.sources[part.key[0]], offsets, buffer[at : at + size].view(rectangle.shape))
        return buffer

    def _pass_round(self, packet: Packet, buffer: Tensor) -> None:
        """Shares go round the holders in a ring; then each has the packet whole, and takes its parts."""
        ranks = packet.holders
        place, n = ranks.index(self.axis.rank), len(ranks)
        whole = buffer.to(device_of(self.axis.group))
        shares = [packet.share(rank) for rank in ranks]
        for step in range(n - 1):
            out, back = shares[(place - step) % n], shares[(place - step - 1) % n]
            moves = [
                (dist.isend, whole[out.start : out.stop], ranks[(place + 1) % n]),
                (dist.irecv, whole[back.start : back.stop], ranks[(place - 1) % n]),
            ]
            ops = [
                dist.P2POp(move, _bytes(x), group=self.axis.group, group_peer=peer)
                for move, x, peer in moves
                if x.numel()
            ]
            for work in dist.batch_isend_irecv(ops) if ops else ():
                work.wait()
        at = 0
        for part in packet.parts:
            self._target(part).copy_(whole[at : at + part.numel].view(part.shape))
            at += part.numel

    def _target(self, part: Part) -> Tensor:
        whole = self.targets[part.key]
        return whole[part.row : part.row + part.count] if whole.dim() else whole

    def _fill(self, source: _Source, offsets: tuple[int, ...], into: Tensor) -> None:
        """Begin to read a rectangle of a logical tensor."""
        held, piece = source.held, source.held.pieces[source.n]
        columns = tuple(zip(offsets[1:], into.shape[1:], strict=True))
        place = held.place(source.n)
        for own, there in piece.runs(offsets[0], into.shape[0], held.stride):
            rows = into[own.start - offsets[0] : own.stop - offsets[0]]
            dims, step = ((there.start, there.stop - there.start), *columns), there.step
            if held.transposed:
                dims, rows = dims[::-1], rows.t()
            if place is not None:
                dims, rows = ((place, 1), *dims), rows[None]
            self.files.read(source.name, dims, rows, step)

    def _wait(self) -> None:
        try:
            self.read += self.files.wait()
        except InteropError as error:
            self.error = self.error or error

    def _dtype(self, number: int) -> torch.dtype:
        return DTYPES[self.files.tensors[self.sources[number].name].dtype]


def _rectangles(packet: Packet, share: range) -> Iterator[tuple[Part, int, Rectangle]]:
    """What of a packet's parts is in a share: each with its place in the buffer of the packet."""
    begin = 0
    for part in packet.parts:
        inside = overlap(share, range(begin, begin + part.numel))
        for each in rectangles(part.shape, range(inside.start - begin, inside.stop - begin)):
            yield part, begin + each.start, each
        begin += part.numel


def _bytes(x: Tensor) -> Tensor:
    """For back ends that do not know every dtype."""
    return x.view(torch.uint8)


def _matched(
    files: TensorFiles, table: Sequence[FileTensor], copies: Collection[str], passed_over: tuple[str, ...]
) -> Mapping[str, str]:
    """The name in the files of each tensor that is wanted: all of them, and none is left over but `copies` and those
    whose names begin as `passed_over` says."""
    there = {name for name in files.tensors if not BUFFERS.search(name) and name not in copies}
    there = {name for name in there if not name.startswith(passed_over)}
    names = {held.name: _name(held.name, there) for held in table}
    wrong = []
    for held in table:
        name = names[held.name]
        if name not in there:
            wrong.append(f"{held.name} {list(held.shape)}: missing")
            continue
        found = files.tensors[name]
        if found.shape != held.shape:
            wrong.append(f"{name}: {list(found.shape)} in {found.file}, but config.json makes it {list(held.shape)}")
        if found.dtype not in DTYPES:
            wrong.append(f"{name}: {found.dtype} in {found.file}, must be one of {', '.join(DTYPES)}")
    left = sorted(there - {*names.values()})
    wrong += [f"{name} {list(files.tensors[name].shape)}: left over" for name in left]
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        what = f"{files.directory}: {len(wrong)} tensors do not fit the model of its config.json"
        raise InteropError(what, [*wrong[:_SHOWN], *more])
    return names


def _name(name: str, there: set[str]) -> str:
    """A tensor's name in the files; those of a model without its head lack the first word."""
    bare = name.partition(".")[2]
    return bare if name not in there and bare in there else name
