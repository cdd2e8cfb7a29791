"""Instructions: what of a conversation counts, through the store and into every layout's rows.

Faults to catch: a prompt that counts; an end mark that does not; a mask that is off by one; a separator of documents
that counts; a special token of a template that is spelled out; plain text among the records that ends in a traceback.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from stretto.arguments import parse
from stretto.cli.data import main
from stretto.data.chat import ChatTokenizer
from stretto.data.describe import silent
from stretto.data.errors import DataError
from stretto.data.evaluation import held_out_batches
from stretto.data.feed import Feed
from stretto.data.text import Text
from stretto.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.gloo

TEMPLATE = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TALK = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "four é!"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a template, as chat models have it."""
    import stretto.data.tokenizer as module

    found = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer.from_file(str(Path(module.__file__).parent / "tokenizers" / "python" / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(found / "tokenizer.json"))
    (found / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return found


def test_answers_and_their_end_marks_count(directory: Path) -> None:
    chat = ChatTokenizer.of(load_tokenizer(str(directory)))
    ids = chat.encode(json.dumps({"messages": TALK}))
    assert chat.decode(ids[ids >= 0]) == "four é!<|im_end|>yes<|im_end|>"
    assert chat.decode(ids).count("<|im_start|>") == 4
    assert np.where(ids < 0, ~ids, ids).tolist().count(start_of(directory)) == 4


def start_of(directory: Path) -> int:
    """The id that begins a turn."""
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    return next(int(each["id"]) for each in added if each["content"] == "<|im_start|>")


def test_of_a_pair_the_completion_and_the_end_count() -> None:
    chat = ChatTokenizer.of(load_tokenizer("byte"))
    ids = chat.encode(json.dumps({"prompt": "é: ", "completion": "ü!"}))
    assert ids.tolist() == [*(~n for n in "é: ".encode()), *"ü!".encode(), 256]


def test_a_token_over_the_border_of_an_answer_counts(directory: Path) -> None:
    """Catches: the first word of every answer that the prompt's last space has drawn into its token."""
    chat = ChatTokenizer.of(load_tokenizer(str(directory)))
    for prompt, answer, learned in (("return:", " self", " self"), ("return: ", "self", " self"), ("x", "é", "é")):
        ids = chat.encode(json.dumps({"prompt": prompt, "completion": answer}))
        assert ids[-1] == chat.eod
        assert chat.decode(ids[ids >= 0]) == learned
        assert chat.decode(ids) == prompt + answer


def test_a_pair_begins_as_a_document_of_its_model_does(directory: Path, tmp_path: Path) -> None:
    """Catches: pairs without the token that the model has seen at the head of every text; one that counts."""
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    told = {"bos_token": "<|im_start|>", "add_bos_token": True, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    inner = load_tokenizer(str(tmp_path))
    pair = ChatTokenizer.of(inner).encode(json.dumps({"prompt": "return:", "completion": " self"}))
    prompt, answer = inner.encode("return:").tolist(), inner.encode(" self").tolist()
    assert pair.tolist() == [*(~n for n in prompt), *answer[1:], inner.eod]
    talk = ChatTokenizer.of(inner).encode(json.dumps({"messages": TALK}))
    assert talk[:2].tolist() != [~start_of(directory)] * 2, "a template says itself how it begins"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": "a"}, "takes lines with messages"),
        ({"messages": [{"role": "user"}]}, "takes lines with messages"),
        ({"messages": TALK[:1]}, "no turn of the role assistant"),
        ({"prompt": "a", "completion": 3}, "takes lines with messages"),
    ],
)
def test_what_is_no_conversation_is_said(record: object, said: str, directory: Path) -> None:
    with pytest.raises(DataError, match=said):
        ChatTokenizer.of(load_tokenizer(str(directory))).encode(json.dumps(record))


@pytest.mark.parametrize("text", ["over the hills and far away", "[1, 2]", "3", "[" * 100_000], ids=lambda t: t[:6])
def test_what_is_no_record_is_said(text: str) -> None:
    """A directory may hold plain text beside its lines of JSON."""
    with pytest.raises(DataError, match="takes lines with messages"):
        ChatTokenizer.of(load_tokenizer("byte")).encode(text)


def test_a_template_is_held_to_what_it_may(directory: Path) -> None:
    inner = load_tokenizer(str(directory))
    with pytest.raises(DataError, match="has no chat template"):
        ChatTokenizer(inner, None, {}).encode(json.dumps({"messages": TALK}))
    with pytest.raises(DataError, match="cannot render"):
        ChatTokenizer(inner, "{{ ''.__class__.__mro__[1].__subclasses__() }}", {}).encode(
            json.dumps({"messages": TALK})
        )
    with pytest.raises(DataError, match="is none"):
        ChatTokenizer(inner, "{% for %}", {})
    last_alone = "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match="turn 2 otherwise when more turns follow"):
        ChatTokenizer(inner, last_alone, {}).encode(json.dumps({"messages": TALK}))


def test_rows_have_the_mask_of_the_store_in_every_layout(directory: Path, tmp_path: Path) -> None:
    talks = [{"messages": [{"role": "user", "content": f"number {n}"}, *TALK[1:2]]} for n in range(40)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in talks))
    words = ["--data", str(tmp_path / "talks.jsonl"), "--tokenizer", str(directory), "--format", "chat"]
    args = parse([*words, "--cache", str(tmp_path / "cache"), "--held-out", "0.2"], env={}, files=False).args
    text = Text.open(args)
    store = text.sources[0].splits.train
    assert store.header.masked
    chat = ChatTokenizer.of(load_tokenizer(str(directory)))
    answer = chat.encode(json.dumps(talks[0]))
    marked = int((answer >= 0).sum())
    batches = {}
    for dp in (1, 2, 4):
        feeds = [Feed(text.mix, seq_len=16, seed=0) for _ in range(dp)]
        ranks = [feed.batch(8, rank, dp, 2) for rank, feed in enumerate(feeds)]
        rows = [ranks[r][j] for j in range(len(ranks[0])) for r in range(dp)]
        batches[dp] = [torch.cat([getattr(b, n) for b in rows]) for n in ("tokens", "labels", "loss_mask")]
    assert all(torch.equal(a, b) for dp in (2, 4) for a, b in zip(batches[1], batches[dp], strict=True))
    tokens, labels, mask = batches[1]
    assert int(tokens.max()) < chat.vocab_size
    counts = set(answer[answer >= 0].tolist())
    assert set(labels[mask].tolist()) == counts
    assert set(labels[~mask].tolist()) >= {start_of(directory), chat.eod}
    held = text.eval_sets[0].store
    sizes = {"seq_len": 16, "global_batch": 2, "dp_rank": 0, "dp_size": 1, "micro_batch": 2}
    counted = sum(int(b.loss_mask.sum()) for (b,) in held_out_batches(held, **sizes))
    assert counted == marked * held.header.documents
    assert text.eval_sets[0].baselines is None
    assert np.array_equal(held.document(0), np.where(answer < 0, ~answer, answer)) or held.header.documents > 1


@pytest.mark.parametrize("packing", [False, True])
def test_inspect_shows_the_rows_of_a_run_on_conversations(
    directory: Path, tmp_path: Path, packing: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches: windows in place of packed rows; the text of prompts left out; bytes of a text that are not known."""
    monkeypatch.setenv("COLUMNS", "200")
    talks = [{"messages": [{"role": "user", "content": f"number {n}"}, *TALK[1:2]]} for n in range(40)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in talks))
    words = ["--data", str(tmp_path / "talks.jsonl"), "--tokenizer", str(directory), "--format", "chat"]
    words += ["--cache", str(tmp_path / "cache"), "--seq-len", "48", "--global-batch", "4", *["--packing"] * packing]
    assert main(["inspect", *words]) == 0
    said = capsys.readouterr().out
    args = parse(words, env={}, files=False).args
    text = Text.open(args)
    (batch,) = Feed(text.mix, seq_len=48, seed=args.run.seed, packing=packing).batch(4, 0, 1, 4)
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "│ talks" in line]
    assert len(shown) == 4
    chat = ChatTokenizer.of(load_tokenizer(str(directory)))
    for (*_, counted, begins), tokens, mask in zip(shown, batch.tokens, batch.loss_mask, strict=True):
        assert int(counted) == int(mask.sum())
        beginning = chat.decode(tokens[:30].numpy()).replace("\n", " ")
        assert begins.replace("|", "").strip()[:12] in beginning.replace("|", "")
    assert re.search(r"train +│ +\d+ │ +- │", said)
    assert ("packed (" in said) == packing


def test_a_run_is_told_of_steps_in_which_nothing_counts(directory: Path, tmp_path: Path) -> None:
    """Catches: a loss of 0 that nobody was told of, and a warning where every step has its answers."""
    pairs = [{"prompt": "what " * 200, "completion": f" {n}"} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))
    words = ["--data", str(tmp_path / "pairs.jsonl"), "--tokenizer", str(directory), "--format", "chat"]
    words += ["--cache", str(tmp_path / "cache"), "--seq-len", "16", "--micro-batch", "1", "--steps", "10"]

    def said(batch: int, *more: str) -> list[str]:
        args = parse([*words, "--global-batch", str(batch), *more], env={}, files=False).args
        return list(silent(args, Text.open(args)))

    store = Text.open(parse(words, env={}, files=False).args).mix.stores[0]
    windows = (store.header.tokens - 1) // 16
    labels = np.asarray(store.tokens[1 : 16 * windows + 1]).reshape(windows, 16)
    none = sum(all(int(token) & store.header.unused for token in row) for row in labels)
    assert f"{none:,} of {windows:,} windows of 16 tokens hold none that counts" in said(1)[0]
    assert f"about {10 * none / windows:,.0f} of 10 steps" in said(1)[0]
    assert not said(64)
