"""As `verify_said`: what is trained of a model, who reads its files, and tokenizers of others."""

from __future__ import annotations

from verify_fault import Fault, Said

TUNING = Said(
    "tests/verify/test_verify_tuning.py",
    Fault(
        "a part of the gradient of a matrix that all ranks hold not summed",
        "tensor_parallel/lora.py",
        'return ParamSpec(shape, init, sum_grad=("tp",), part=part)',
        "return ParamSpec(shape, init, part=part)",
    ),
    Fault(
        "an adapter behind the sum over the ranks, which counts it once each",
        "tensor_parallel/lora.py",
        "    y = y + lora.scale * F.linear(F.linear(drop(x, structure), a), b)\n"
        "    return leave(y, build.tp, sequence_parallel=build.sequence_parallel, overlap_with=build.overlap_with)\n",
        "    y = leave(y, build.tp, sequence_parallel=build.sequence_parallel, overlap_with=build.overlap_with)\n"
        "    low = F.linear(drop(x, structure), a)\n"
        "    more = leave(F.linear(low, b), build.tp, sequence_parallel=build.sequence_parallel)\n"
        "    return y + build.tp.size * lora.scale * more\n",
    ),
    Fault(
        "a frozen head that still takes a gradient",
        "tensor_parallel/cross_entropy.py",
        "trained = keep and weight.requires_grad",
        "trained = keep",
    ),
    Fault(
        "a scale left out",
        "tensor_parallel/lora.py",
        "found.append(part + adapter.lora.scale * F.linear(low[n], into[n]) if adapted else part)",
        "found.append(part + F.linear(low[n], into[n]) if adapted else part)",
    ),
    Fault(
        "a mask that each rank draws from channel 0 on",
        "tensor_parallel/layers.py",
        "begin = build.tp.rank * (d_in // build.tp.size)",
        "begin = 0",
    ),
)

SHARE = Said(
    "tests/interop/test_interop_share.py",
    Fault(
        "each holder of a rectangle reads all of it",
        "interop/load.py",
        "_rectangles(packet, packet.share(self.axis.rank))",
        "_rectangles(packet, range(packet.numel))",
    ),
    Fault(
        "shares that go to the wrong place of a packet",
        "interop/load.py",
        "yield part, begin + each.start, each",
        "yield part, each.start, each",
    ),
    Fault(
        "a ring that hands on the wrong share",
        "interop/load.py",
        "shares[(place - step) % n], shares[(place - step - 1) % n]",
        "shares[place], shares[(place - step - 1) % n]",
    ),
    Fault(
        "a buffer as large as what is read",
        "interop/pread.py",
        "rows = max(1, CHUNK // max(1, dtype.itemsize * prod(n for _, n in dims[1:])))",
        "rows = max(1, count)",
    ),
)

ADAPTERS = Said(
    "tests/interop/test_interop_adapters.py",
    Fault(
        "a scale that is not alpha / rank",
        "tensor_parallel/lora.py",
        "tuning.lora_alpha / tuning.lora_rank",
        "tuning.lora_alpha",
    ),
    Fault(
        "a merge that leaves it out",
        "interop/export.py",
        "whole[name].to(wide) + lora.scale * product",
        "whole[name].to(wide) + product",
    ),
    Fault(
        "a rectangle of the wrong rank",
        "interop/live.py",
        "group_src=rank)",
        "group_src=0)",
    ),
)

TOKENIZERS = Said(
    "tests/data/test_data_foreign_tokenizers.py",
    Fault(
        "a document that does not begin with the token that its model was trained with",
        "data/sentence_piece.py",
        "return [np.array([*self._begin, *ids], dtype=np.int64) for ids in found]",
        "return [np.array(ids, dtype=np.int64) for ids in found]",
    ),
    Fault(
        "special tokens that count for no entry",
        "data/tiktoken_file.py",
        "max(*ranks.values(), *special.values()) + 1",
        "max(ranks.values()) + 1",
    ),
    Fault(
        "tokens beside the model taken for its own",
        "data/sentence_piece.py",
        "& (ids < self._known)",
        "",
    ),
)

CHAT = Said(
    "tests/data/test_data_chat.py",
    Fault(
        "a prompt that counts",
        "data/chat.py",
        "counts |= (begins < end) & ((begins >= begin) | (ends > begin))",
        "counts |= begins < end",
    ),
    Fault(
        "an end mark that does not",
        "data/chat.py",
        "spans.append((len(before), len(after.rstrip())))",
        'spans.append((len(before), len(before) + len(message["content"])))',
    ),
    Fault(
        "a mask that is off by one",
        "data/feed.py",
        "valid &= rows[:, 1:] & unused == 0",
        "valid &= rows[:, :-1] & unused == 0",
    ),
    Fault(
        "a separator of documents that counts",
        "data/store.py",
        "np.array([~self._eod if self._masked else self._eod])",
        "np.array([self._eod])",
    ),
    Fault(
        "a special token of a template that is spelled out",
        "data/tokenizer.py",
        "self._marked.encode_special_tokens = False",
        "self._marked.encode_special_tokens = True",
    ),
    Fault(
        "plain text among the records that ends in a traceback",
        "data/chat.py",
        "    except (ValueError, RecursionError):\n        return {}\n    return record",
        "    except KeyError:\n        return {}\n    return record",
    ),
)

ADAPTER_IN = Said(
    "tests/interop/test_interop_adapter_in.py",
    Fault(
        "adapters that are drawn anew",
        "train/huggingface.py",
        "    if adapter is None:\n        built.optimizer.initialize(",
        "    if True:\n        built.optimizer.initialize(",
    ),
    Fault(
        "a scale that is not that of the file",
        "interop/adapter_in.py",
        '"lora_alpha": self.alpha',
        '"lora_alpha": 16.0',
    ),
    Fault(
        "a rank that reads another's part",
        "interop/adapter_in.py",
        "zip(part.offsets, part.tensor.shape",
        "zip([0] * part.tensor.dim(), part.tensor.shape",
    ),
    Fault("a field that is ignored", "interop/adapter_in.py", "if name not in _MEANT | _FREE and", "if False and"),
)
