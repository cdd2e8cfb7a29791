"""As `verify_said`: what becomes of a corpus on its way to a batch."""

from __future__ import annotations

from verify_fault import Fault, Said

TEXT_FILES = Said(
    "tests/data/test_data_files.py",
    Fault(
        "a pipe that is taken for a file", "data/files.py", "return None if stat.S_ISREG(mode) else", "return None or"
    ),
    Fault("an open that waits for a writer", "data/files.py", "os.O_RDONLY | os.O_NONBLOCK", "os.O_RDONLY"),
    Fault(
        "names that steer the terminal",
        "data/files.py",
        "', '.join(map(_printable, names))",
        "', '.join(names)",
    ),
    Fault(
        "a file that is not UTF-8 passed over in silence",
        "data/formats.py",
        'pass_over("not UTF-8")\n    return',
        "return",
    ),
    Fault("JSON lines in a `.json` learnt as text", "data/formats.py", "(begin and is_record(begin, key))", "False"),
    Fault("a key that is not looked under", "data/formats.py", "else record.get(key)", 'else record.get("text")'),
    Fault(
        "an archive that ends in the middle taken as whole", "data/zstd.py", "if self._frame is not None:", "if False:"
    ),
    Fault("memory without bound for one line", "data/formats.py", "if len(line) > LARGEST_TEXT:", "if False:"),
)

LOST = Said(
    "tests/data/test_data_lost.py",
    Fault(
        "lost characters counted once each", "data/lost.py", 'len(c.encode("utf-8")) * count', 'len(c.encode("utf-8"))'
    ),
    Fault("lost text that is not held against its bound", "data/prepare.py", "if lost.share > most_lost:", "if False:"),
    Fault("bits over bytes that no model saw", "data/baselines.py", "bytes_per_token * (1 - share)", "bytes_per_token"),
)

PARTS = Said(
    "tests/data/test_data_parts.py",
    Fault(
        "a part made again after a kill",
        "data/parts.py",
        "left = [part for part in range(len(job.parts)) if job.account(part) is None]",
        "left = [*range(len(job.parts))]\n"
        '    for part in left:\n        job.store(part, "train").unlink(missing_ok=True)',
    ),
    Fault(
        "temporary files that stay", "data/prepare.py", "            left.unlink(missing_ok=True)", "            pass"
    ),
    Fault(
        "a waiter that gives up while the builder gets on",
        "data/lock.py",
        "if (now := self._heard()) != heard:",
        "if (now := heard) != heard:",
    ),
    Fault(
        "a line that is twice where a file is cut",
        "data/formats.py",
        "piece.stop is None or at < piece.stop",
        "piece.stop is None or at <= piece.stop",
    ),
    Fault(
        "lines that get other numbers",
        "data/parts.py",
        'line + block.count(b"\\n", 0, end + 1)',
        'line + block.count(b"\\n", 0, end)',
    ),
    Fault(
        "a file that changes while it is read",
        "data/prepare.py",
        "if _key(job.corpus, job.tokenizer, job.held_out) != job.key:",
        "if False:",
    ),
)

MIXTURE = Said(
    "tests/data/test_data_mixture.py",
    Fault(
        "a corpus that gets ahead of its share",
        "data/mixture.py",
        "if several * (share * (turn + 1) - period * had[c]) >= period",
        "if had[c] < share",
    ),
    Fault(
        "a place that is counted from the start of a batch",
        "data/mixture.py",
        "at = np.arange(first - self._begun, first - self._begun + count, dtype=np.int64)",
        "at = np.arange(count, dtype=np.int64)",
    ),
    Fault(
        "two corpora shuffled alike", "data/streams.py", "stretto corpus {seed} {self.number}", "stretto corpus {seed}"
    ),
    Fault(
        "windows of a corpus that are left out at the start",
        "data/mixture.py",
        "had = self._had - self._before[self._begin]",
        "had = self._had",
    ),
)

STREAMS = Said(
    "tests/data/test_data_streams.py",
    Fault(
        "samples of a corpus counted from the change on",
        "data/streams.py",
        "known = [replace(stream, had=had) for",
        "known = [replace(stream, had=0) for",
    ),
    Fault(
        "a corpus whose order follows its place in the list",
        "data/streams.py",
        "replace(wanted, number=next(new)) if found is None else found",
        "replace(found or wanted, number=next(new))",
    ),
    Fault(
        "a stretch that forgets where it began",
        "data/feed.py",
        "stretch = before or self.mix.begin",
        "stretch = self.mix.begin",
    ),
    Fault(
        "a corpus that comes back from its start",
        "data/streams.py",
        "strict=True)] + [*before.left]",
        "strict=True)]",
    ),
    Fault(
        "other text under an old path",
        "data/streams.py",
        "if found is None and w.path in paths]",
        "if found is None and w.path in ()]",
    ),
)

RUNS = Said(
    "tests/checkpoint/test_checkpoint_runs.py",
    Fault(
        "a rank that reads every piece",
        "checkpoint/index.py",
        "if any(intersection((_wholes(offsets), _wholes(sizes)), each) for each in rectangles):",
        "if rectangles:",
    ),
    Fault(
        "a run that is left out because its rectangle is too small",
        "checkpoint/index.py",
        "[max(each) - begin for each, begin in",
        "[min(each) - begin for each, begin in",
    ),
    Fault("a run whose bytes are not compared", "checkpoint/index.py", "if checksum(text) != digest:", "if not text:"),
    Fault(
        "pieces of two runs that overlap",
        "checkpoint/index.py",
        "if errors := disjoint_errors(",
        "if errors := [] and disjoint_errors(",
    ),
)

INDEXED = Said(
    "tests/data/test_data_indexed.py",
    Fault(
        "a place outside the file that is believed",
        "data/indexed.py",
        "if (some < 0).any() or not np.array_equal(",
        "if False and not np.array_equal(",
    ),
    Fault("tokens that the index does not account for", "data/indexed.py", "if at * item != self.size():", "if False:"),
    Fault(
        "an id that no vocabulary has", "data/indexed.py", "if low < 0 or high >= tokenizer.vocab_size:", "if low < 0:"
    ),
    Fault(
        "a document that ends where a sequence does",
        "data/indexed.py",
        "begins[np.asarray(first)]",
        "begins[: len(first)]",
    ),
)
