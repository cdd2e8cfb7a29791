"""`.metadata`: what `index.jsonl` says, as torch.distributed.checkpoint has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pickle import BUILD, EMPTY_DICT, MARK, NEWOBJ, NONE, REDUCE, SETITEMS, TUPLE
from typing import Any, ClassVar

from stretto.checkpoint.index import Piece, Tensor
from stretto.checkpoint.marker import DCP
from stretto.checkpoint.pickled import Made, Named, Raw, integer, integers, pickled, remembered, text


def dcp_metadata(tensors: Iterable[Tensor]) -> bytes:
    """`.metadata`: the same for torch.distributed.checkpoint, which unpickles it."""
    described: dict[str, Made] = {}
    stored: dict[Raw, Raw] = {}
    form = _Form()
    for tensor in tensors:
        encoding = Made(Named(DCP, "_MEM_FORMAT_ENCODING"), (0,))
        layout = Made(Named("torch.serialization", "_get_layout"), ("torch.strided",))
        properties = (Named("torch", tensor.dtype), layout, False, encoding, False)
        described[tensor.name] = _instance(
            "TensorStorageMetadata",
            properties=Made(Named(DCP, "TensorProperties"), (), properties),
            size=Made(Named("torch", "Size"), (tuple(tensor.shape),)),
            chunks=[form.chunk(p) for p in tensor.pieces],
        )
        name = text(tensor.name)
        stored |= {form.key(name, p): form.place(p) for p in tensor.pieces}
    about = _instance("StorageMeta", checkpoint_id=None, save_id=None, load_id=None, modules=[])
    said = {"state_dict_metadata": described, "planner_data": None, "storage_data": stored, "storage_meta": about}
    return pickled(_instance("Metadata", **said, version="1.0.0"), form.first)


class _Form:
    """What is said of each piece, as instructions: there may be a million."""

    first: ClassVar[tuple[str | Named, ...]] = (
        Named("torch", "Size"),
        *(Named(DCP, name) for name in ("ChunkStorageMetadata", "MetadataIndex")),
        Named("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *("offsets", "sizes", "fqn", "offset", "index", "relative_path", "length"),
    )

    def __init__(self) -> None:
        self._size, chunk, key, place, *names = remembered(self.first).values()
        self._chunk, self._key, self._place = (
            begin + integers(()) + NEWOBJ + EMPTY_DICT + MARK for begin in (chunk, key, place)
        )
        self._names = dict(zip(self.first[4:], names, strict=True))
        self._files: dict[str, bytes] = {}

    def chunk(self, p: Piece) -> Raw:
        """A ChunkStorageMetadata."""
        return Raw(self._chunk + self._said("offsets", p.offsets) + self._said("sizes", p.sizes) + SETITEMS + BUILD)

    def key(self, name: bytes, p: Piece) -> Raw:
        """A MetadataIndex."""
        fields = self._names["fqn"] + name + self._said("offset", p.offsets) + self._names["index"] + NONE
        return Raw(self._key + fields + SETITEMS + BUILD)

    def place(self, p: Piece) -> Raw:
        """A _StorageInfo."""
        file = self._files.setdefault(p.file, text(p.file))
        where = self._names["offset"] + integer(p.start) + self._names["length"] + integer(p.length)
        return Raw(self._place + self._names["relative_path"] + file + where + SETITEMS + BUILD)

    def _said(self, name: str, numbers: Sequence[int]) -> bytes:
        return self._names[name] + self._size + MARK + integers(numbers) + TUPLE + REDUCE


def _instance(name: str, **state: Any) -> Made:
    return Made(Named(DCP, name), (), state)
