"""Texts of three invented domains, a tokenizer, and a tiny model that has learned the first one.

    cd examples/continual_pretraining
    python prepare.py
    cl-fast train plan.yml --dry-run
    cl-fast train plan.yml

All of it takes less than a minute on a CPU. Each domain has sentences of its own words, so the
table that the command prints shows what is learned, what is forgotten, and what replay keeps. With
`replay: 0`, and without old_texts, the general texts are forgotten.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOMAINS = {
    "general": "people house river morning letter window garden friend street answer",
    "cooking": "onion butter oven flour spoon salt kettle pepper recipe simmer",
    "sailing": "anchor harbour mast sail tide rope captain wind deck compass",
}
WORDS = {name: words.split() for name, words in DOMAINS.items()}
JOINING = ["the", "a", "and", "with", "near", "before", "after", "under"]
work = Path(__file__).parent / "work"


def sentences(domain: str, count: int, seed: int) -> list[str]:
    """Word i of a domain is followed by word 3 i + 1 or 3 i + 2: an order that can be learned."""
    rng, words = random.Random(f"{domain} {seed}"), WORDS[domain]
    made = []
    for _ in range(count):
        at, sentence = rng.randrange(10), []
        for _ in range(rng.randint(4, 12)):
            sentence += [rng.choice(JOINING), words[at]]
            at = (3 * at + rng.choice((1, 2))) % 10
        made.append(" ".join(sentence) + " .")
    return made


def main() -> None:
    work.mkdir(exist_ok=True)
    for name, seed, count in (("general", 0, 1500), ("general_held_out", 1, 150)):
        lines = [json.dumps({"text": text}) for text in sentences("general", count, seed)]
        (work / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("cooking", "sailing"):
        (work / f"{name}.txt").write_text("\n".join(sentences(name, 1500, 0)) + "\n")

    known = ["<eos>", "<unk>", ".", *JOINING, *(w for words in WORDS.values() for w in words)]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>"
    )

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(known),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=0,
        )
    )
    pretrain(model, tokenizer)
    model.save_pretrained(work / "base")
    tokenizer.save_pretrained(work / "base")
    print(f"{work}: texts, and a model that knows the general ones")


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The base model's own training, on the general texts."""
    row = [i for text in sentences("general", 1500, 0) for i in [*tokenizer(text)["input_ids"], 0]]
    blocks = torch.tensor(row[: len(row) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        for batch in blocks[torch.randperm(len(blocks))].split(8):
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
