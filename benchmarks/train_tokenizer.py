"""Make the tokenizer that ships with the library: byte-level BPE over the train split of Python's standard library.

python -m benchmarks.train_tokenizer stretto/data/tokenizers/python/tokenizer.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stretto.arguments.sections import TOKENIZERS, DataConfig
from stretto.data.corpus import Corpus, position


def main(target: Path) -> None:
    data = DataConfig()
    texts = [d.text for d in Corpus.open(None).documents() if position(d.name) >= data.held_out]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZERS["python"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(tokenizer.to_str(pretty=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
