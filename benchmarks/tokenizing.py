"""What tokenizing costs beside the library that does it: megabytes of text for each second of a core.

    python -m benchmarks.tokenizing [--megabytes 10] [--tokenizer python] [--repeat 3]

`tokenizers` is its own `encode_batch` over texts that are in memory. `stretto` reads JSON lines, tokenizes, compares a
share with what comes back, and writes stores, as one of the processes of `stretto data build` does. `datasets.map`
reads, tokenizes and writes with the package `datasets`, where it is installed. `megatron` is what Megatron-LM's
`tools/preprocess_data.py` does with a Hugging Face tokenizer, a document at a time through `transformers` into the
`IndexedDatasetBuilder` of the package `megatron-core`, where that is installed. Seconds are those of the processor, in
one thread each, so that whoever else uses the machine counts little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stretto.data.corpus import Corpus
from stretto.data.parts import Job, plan, work
from stretto.data.tokenizer import FileTokenizer, load_tokenizer

LENGTH = 3000
"""Characters of a document."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizing", description="MB of text/s/core")
    parser.add_argument("--megabytes", type=float, default=10)
    parser.add_argument("--tokenizer", default="python")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(asked.tokenizer)
    assert isinstance(tokenizer, FileTokenizer), "bytes need no tokenizer"
    texts = documents(asked.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        ways: dict[str, Callable[[Path], None]] = {
            "tokenizers": lambda _: library(tokenizer, texts),
            "stretto": lambda folder: ours(tokenizer, path, folder),
        }
        if importlib.util.find_spec("datasets"):
            ways["datasets.map"] = lambda folder: mapped(tokenizer, path, folder)
        if importlib.util.find_spec("megatron") and importlib.util.find_spec("transformers"):
            ways["megatron"] = lambda folder: indexed(tokenizer, path, folder)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(asked.repeat):  # in turns: a slow minute is everybody's
            for name, way in ways.items():
                folder = Path(root) / f"{name}-{turn}"
                folder.mkdir()
                begin = time.process_time()
                way(folder)
                rates[name].append(size / (time.process_time() - begin))
    table = Table("", "MB/s/core", "of tokenizers", title=f"{size:.1f} MB in {len(texts):,} documents")
    alone = statistics.median(rates["tokenizers"])
    for name, found in rates.items():
        middle = statistics.median(found)
        table.add_row(name, f"{middle:.2f} ({min(found):.2f} to {max(found):.2f})", f"{middle / alone:.2f}")
    Console().print(table)
    if asked.results:
        said = {"command": f"python -m benchmarks.tokenizing --megabytes {asked.megabytes:g} --repeat {asked.repeat}"}
        medians = {name: statistics.median(found) for name, found in rates.items()}
        asked.results.write_text(json.dumps({**said, "mb_per_core_s": medians, "all": rates}, indent=1) + "\n")


def documents(megabytes: float) -> list[str]:
    """Pieces of the standard library's sources, again and again."""
    pieces = [d.text[i : i + LENGTH] for d in Corpus.open(None).documents() for i in range(0, len(d.text), LENGTH)]
    return (pieces * (1 + int(megabytes * 1e6) // (len(pieces) * LENGTH)))[: int(megabytes * 1e6) // LENGTH]


def library(tokenizer: FileTokenizer, texts: list[str]) -> None:
    for start in range(0, len(texts), 1000):
        tokenizer._tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)


def ours(tokenizer: FileTokenizer, path: Path, folder: Path) -> None:
    corpus = Corpus.open(path)
    work(Job(folder, "benchmark", corpus, tokenizer, 0.05, plan(corpus)), lambda *_: None, timeout=60)


def mapped(tokenizer: FileTokenizer, path: Path, folder: Path) -> None:
    from datasets import load_dataset

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer._tokenizer.encode_batch(batch["text"], add_special_tokens=False)
        return {"ids": [each.ids for each in found]}

    table = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder))
    table.map(encode, batched=True, remove_columns=["text"])


def indexed(tokenizer: FileTokenizer, path: Path, folder: Path) -> None:
    """As `Encoder.encode` and `Partition.process_json_file` of that tool: JSON, ids, the end of the document, write."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=dtype)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            ids = theirs(json.loads(line)["text"], add_special_tokens=False).input_ids
            ids.append(tokenizer.eod)
            builder.add_document(ids, [len(ids)])
    builder.finalize(str(folder / "text.idx"))


if __name__ == "__main__":
    main()
