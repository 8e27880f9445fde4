"""A model learns who lives where, is edited, judged, saved, loaded, corrected, and is as before.

The script of docs/editing-tutorial.md, in less than 20 seconds on one CPU core, nothing downloaded:

    python examples/edit_facts.py
"""

from __future__ import annotations

import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cl_fast.editing import Fact, KeyStats, Memit, Patch, compared, evaluate

torch.set_num_threads(1)  # a model this small only waits for threads
# Thirty facts are much for a matrix of 64 x 256, and the editor says so; the table tells the rest.
warnings.filterwarnings("ignore", message="the change of .* is larger than the weight")

# --- a world of made-up people, and a model that knows it --------------------------------------

TEMPLATES = {
    "city": ["{} lives in", "the home of {} is in", "people visit {} in"],
    "sport": ["{} plays", "the favourite sport of {} is", "fans watch {} at"],
    "trade": ["{} works as", "the trade of {} is", "they hired {} as"],
}
VALUES = {
    "city": ["Arvo", "Bexley", "Corin", "Dunmore", "Elgin", "Farsund", "Gotha", "Jura"],
    "sport": ["chess", "tennis", "hockey", "rugby", "cricket", "golf", "boxing", "judo"],
    "trade": ["baker", "farmer", "lawyer", "mason", "nurse", "painter", "sailor", "tailor"],
}
draw = random.Random(0)
firsts = ["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gia", "Hugo", "Iris", "Jon", "Kim", "Leo"]
surnames = [a + b + c for a in "BDFGHKLM" for b in "aeiou" for c in ["ld", "lm", "n", "rn", "sk"]]
people = [
    f"{first} {name}"
    for i, name in enumerate(draw.sample(surnames, 105))
    for first in draw.sample(firsts, 2 if i < 15 else 1)  # some share a surname
]
draw.shuffle(people)
truth = {(person, r): draw.choice(VALUES[r]) for person in people for r in TEMPLATES}
# Nobody is described with all three templates of a relation: the third shows what generalises.
unused = {key: draw.randrange(3) for key in truth}
told = [
    (template.format(person), truth[person, r])
    for person, r in truth
    for i, template in enumerate(TEMPLATES[r])
    if i != unused[person, r]
]

words = {w for prompt, value in told for w in (*prompt.split(), value)}
vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", ".", *sorted(words)]
backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
    unk_token="<unk>",
)  # fmt: skip

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.06, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
)  # fmt: skip
with torch.no_grad():
    model.get_input_embeddings().weight.mul_(3)  # names are told apart sooner
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.3)
STEPS, ROWS = 300, 48
rows: list[tuple[str, str]] = []
for step in range(STEPS):
    if len(rows) < ROWS:
        rows = draw.sample(told, len(told))
    batch, rows = rows[:ROWS], rows[ROWS:]
    before = " ".join(draw.choice(told)) + " . " if step % 4 == 0 else ""
    sentences = [f"{before}{prompt} {value} ." for prompt, value in batch]
    ids = tokenizer(sentences, padding=True, return_tensors="pt")["input_ids"]
    value_ids = torch.tensor([vocabulary.index(v) for _, v in batch])
    weights = 1.0 + 19.0 * (ids == value_ids[:, None])  # the rest nobody could foresee
    weights = (weights * (ids != 0))[:, 1:]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    for group in optimizer.param_groups:
        group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / STEPS)
    (losses @ weights.flatten() / weights.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
model.eval()


def answer(prompt: str) -> str:
    """The likeliest next word."""
    with torch.no_grad():
        logits = model(**tokenizer(prompt, return_tensors="pt")).logits
    return vocabulary[int(logits[0, -1].argmax())]


right = sum(answer(prompt) == value for prompt, value in told) / len(told)
print(f"{len(told)} statements learnt, {right:.1%} of them answered")

# --- facts to write into it --------------------------------------------------------------------

facts = []
edited = people[:30]
for number, person in enumerate(edited):
    relation = list(TEMPLATES)[number % 3]
    old, held_out = truth[person, relation], unused[person, relation]
    prompt = draw.choice([t for i, t in enumerate(TEMPLATES[relation]) if i != held_out])
    alike = [p for p in people[30:] if truth[p, relation] == old]
    facts.append(
        Fact(
            prompt,
            subject=person,
            target=draw.choice([v for v in VALUES[relation] if v != old]),
            target_true=old,
            paraphrases=[TEMPLATES[relation][held_out].format(person)],
            neighbourhood=[prompt.format(p) for p in alike[:5]],
        )
    )
base = {name: x.clone() for name, x in model.state_dict().items()}
unedited = evaluate(model, tokenizer, facts)

# --- statistics, values, keys, one ridge problem: a patch --------------------------------------

texts = [f"{prompt} {value} ." for prompt, value in told if not any(p in prompt for p in edited)]
stats = KeyStats.collect(model, tokenizer, texts=texts, layers=[0])
editor = Memit(
    model, tokenizer, stats, layers=[0], prior_weight=50, lr=0.1, clamp=1.2, contexts=()
)
patch = editor.fit(facts[:20])
patch = editor.fit(facts[20:], after=patch)  # later, more of them: the first 20 stay

with patch:
    after = evaluate(model, tokenizer, facts)
print("\n" + str(compared({"unedited": unedited, "edited": after})))

fact = facts[0]
other = fact.paraphrases[0]


def show(when: str) -> None:
    print(f"{when:<26}{fact.text} {answer(fact.text)};  {other} {answer(other)}")


print()
show("before")
patch.apply()
show("edited")

# --- saved, loaded, corrected, undone ----------------------------------------------------------

path = Path(tempfile.mkdtemp()) / "facts.safetensors"
patch.save(path)
patch.undo()
loaded = Patch.load(path, model)
corrected = loaded.drop([fact.id])  # exactly what the fit without it would have given
with corrected:
    show("without this fact")
    others: Any = evaluate(model, tokenizer, facts[1:], suite=["es"])
print(f"the other {len(facts) - 1} facts: es {others.mean('es'):.3f}")
same = all(torch.equal(x, base[name]) for name, x in model.state_dict().items())
show("undone")
print(f"the weights are those of before, bit for bit: {same}")
