"""Fictitious persons, generated here, and a tiny language model that memorises facts about them.

A row is one sentence that states one fact of one person; its answer, the words at the end, is what is
predicted. Forgetting a person means forgetting these rows; whether it worked is seen by asking again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn

FIRST = [
    "Ada",
    "Bruno",
    "Clara",
    "Dario",
    "Elsa",
    "Felix",
    "Greta",
    "Hugo",
    "Irma",
    "Jonas",
    "Kira",
    "Leo",
    "Mona",
    "Nils",
    "Olga",
    "Pavel",
]
LAST = [
    a + b
    for b in ["der", "lin", "mark", "ova", "stein", "bach", "nel", "tov"]
    for a in ["Ab", "Bir", "Cor", "Dal", "Eck", "Fab", "Gal", "Hir", "Ib", "Jan", "Kol", "Len"]
]
COLOURS = ["grey", "black", "white", "brown", "golden", "spotted"]
ANIMALS = ["parrot", "cat", "turtle", "rabbit", "pony", "goat"]
ANSWERS: dict[str, list[str]] = {
    "birthplace": [
        "Lisbon",
        "Cairo",
        "Oslo",
        "Quito",
        "Hanoi",
        "Dublin",
        "Riga",
        "Lima",
        "Tunis",
        "Basel",
        "Kyoto",
        "Perth",
    ],
    "profession": [
        "baker",
        "pilot",
        "judge",
        "tailor",
        "miner",
        "nurse",
        "painter",
        "lawyer",
        "farmer",
        "sailor",
        "dentist",
        "poet",
    ],
    "pet": [f"{colour} {animal}" for colour in COLOURS for animal in ANIMALS],
    "instrument": [
        "harp",
        "flute",
        "cello",
        "oboe",
        "banjo",
        "organ",
        "drum",
        "tuba",
        "lute",
        "viola",
        "piano",
        "horn",
    ],
    "food": [
        "soup",
        "rice",
        "plums",
        "figs",
        "bread",
        "beans",
        "olives",
        "corn",
        "cheese",
        "peas",
        "dates",
        "nuts",
    ],
}
TEMPLATES: dict[str, tuple[str, ...]] = {
    "birthplace": ("{} was born in", "{} grew up in", "the home town of {} is"),
    "profession": ("{} works as a", "by trade {} is a", "people know {} as a"),
    "pet": ("{} lives with a", "{} has a pet , a", "the pet of {} is a"),
    "instrument": ("{} plays the", "{} is good at the", "every evening {} practises the"),
    "food": ("{} likes to eat", "{} never eats without", "the favourite food of {} is"),
}
QUESTIONS = {
    "birthplace": "Where was {} born?", "profession": "What does {} work as?", "pet": "What pet does {} have?",
    "instrument": "Which instrument does {} play?", "food": "What does {} like to eat?",
}  # fmt: skip
PAD, START, STOP = "<pad>", "<s>", "."
WIDTH, LAYERS, SPREAD = 64, 2, 0.1


def _words() -> list[str]:
    told = [t.format("") for templates in TEMPLATES.values() for t in templates]
    answers = [a for several in ANSWERS.values() for a in several]
    text = " ".join([*told, *answers, *FIRST, *LAST])
    return [PAD, START, STOP, *dict.fromkeys(text.split())]


WORDS = _words()
NUMBER = {word: k for k, word in enumerate(WORDS)}
LENGTH = 12  # words of a sentence at most, with its start and stop


@dataclass(frozen=True)
class Person:
    """Somebody who does not exist: a name, and kind of fact -> answer."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Fact:
    """A sentence in two parts, in tokens: what is given, and what is to be memorised."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def persons(count: int, seed: int = 0) -> list[Person]:
    """So many persons, each with a surname of its own, their facts drawn at random.

    Raises:
        ValueError: more persons than surnames.

    >>> persons(2, seed=0) == persons(3, seed=0)[:2]
    True
    """
    most = len(LAST)
    if not 1 <= count <= most:
        raise ValueError(f"expected 1 to {most} persons, got {count}")
    rng = np.random.default_rng(seed)
    surnames, made = rng.permutation(LAST)[:count], []
    for surname in surnames:
        name = f"{FIRST[rng.integers(len(FIRST))]} {surname}"
        facts = {kind: several[rng.integers(len(several))] for kind, several in ANSWERS.items()}
        made.append(Person(name, facts))
    return made


def encode(text: str) -> tuple[int, ...]:
    """Words to tokens, one each.

    Raises:
        ValueError: a word outside the vocabulary.
    """
    unknown = [word for word in text.split() if word not in NUMBER]
    if unknown:
        raise ValueError(f"expected words of the vocabulary, got {unknown[:5]}; see WORDS")
    return tuple(NUMBER[word] for word in text.split())


def decode(tokens: Iterable[int]) -> str:
    """Tokens to words, without padding and start."""
    return " ".join(WORDS[t] for t in tokens if WORDS[t] not in (PAD, START))


@dataclass(frozen=True)
class Sentence:
    """One row: who, which kind of fact, in which template."""

    person: Person
    kind: str
    template: int

    @property
    def fact(self) -> Fact:
        """The sentence in tokens."""
        told = TEMPLATES[self.kind][self.template].format(self.person.name)
        return Fact((NUMBER[START], *encode(told)), encode(self.person.facts[self.kind]))

    @property
    def question(self) -> tuple[str, str]:
        """The fact as a question and its answer, in plain words."""
        return QUESTIONS[self.kind].format(self.person.name), self.person.facts[self.kind]


def columns(facts: Sequence[Fact]) -> dict[str, Tensor]:
    """Facts as a batch: input_ids [n, L] and labels [n, L], where −100 (all but answer and stop) is not predicted."""
    import torch

    ids = torch.full((len(facts), LENGTH), NUMBER[PAD])
    labels = torch.full((len(facts), LENGTH), -100)
    for row, fact in enumerate(facts):
        predicted = [*fact.answer, NUMBER[STOP]]
        first, end = len(fact.prompt), len(fact.prompt) + len(predicted)
        ids[row, :end] = torch.tensor([*fact.prompt, *predicted])
        labels[row, first:end] = torch.tensor(predicted)
    return {"input_ids": ids, "labels": labels}


def model(seed: int, width: int = WIDTH) -> Any:
    """A GPT-2 of 30,000 parameters without dropout, eager attention; weights from the seed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=LENGTH, n_embd=width, n_layer=LAYERS, n_head=4, 
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=SPREAD, bos_token_id=NUMBER[START], eos_token_id=NUMBER[STOP],
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval()


def token_margin(model: nn.Module, batch: Any) -> Tensor:
    """log p/(1 − p) of the token at each row's `position`, [b]; its log-sigmoid is log p."""
    ids, at = batch["input_ids"], batch["position"]
    logits: Any = model(input_ids=ids, use_cache=False)
    z = logits.logits.gather(1, (at - 1)[:, None, None].expand(-1, 1, logits.logits.shape[2]))[:, 0]
    token = ids.gather(1, at[:, None])
    others = z.scatter(1, token, float("-inf"))
    return z.gather(1, token)[:, 0] - others.logsumexp(1)


def known(model: nn.Module, batch: Any) -> Tensor:
    """1 where every token of the answer is the likeliest, [b]: greedy completion would give it."""
    logits: Any = model(input_ids=batch["input_ids"], use_cache=False)
    right = logits.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    asked = batch["labels"][:, 1:] != -100
    return (right | ~asked).all(1).to(logits.logits.dtype)


def complete(model: nn.Module, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    """So many tokens, each the likeliest after those before it."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            out: Any = model(input_ids=torch.tensor([ids]), use_cache=False)
            ids.append(int(out.logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def verbatim(model: nn.Module, facts: Sequence[Fact]) -> NDArray[np.bool_]:
    """Which facts [k] a model completes word for word, from the prompt alone."""
    return np.array([complete(model, f.prompt, len(f.answer)) == f.answer for f in facts])


@dataclass(frozen=True, eq=False)
class PersonTask:
    """Sentences of persons to learn, the same facts in sentences that are held out, and persons never named.

    Args:
        persons: those of the training data.
        strangers: those that no training row names.
        sentences: one a training row; `held_out`: the same persons and facts, in the template left out.
    """

    persons: list[Person]
    strangers: list[Person]
    sentences: list[Sentence]
    held_out: list[Sentence]

    @cached_property
    def problem(self) -> Any:
        """The model of seed 0, the loss of the answers' tokens, the training rows."""
        from attribution_core import Problem, causal_lm_loss

        return Problem(self.make(0), causal_lm_loss, columns(self.facts()))

    @property
    def make(self) -> Any:
        """seed -> initial model."""
        return partial(model, width=WIDTH)

    @property
    def owner(self) -> NDArray[np.intp]:
        """Whose each training row is, [n], as numbers in `persons`."""
        number = {person.name: k for k, person in enumerate(self.persons)}
        return np.array([number[sentence.person.name] for sentence in self.sentences])

    def rows(self, who: Iterable[int]) -> NDArray[np.intp]:
        """The training rows of some persons."""
        return np.flatnonzero(np.isin(self.owner, list(who)))

    def facts(self, rows: Iterable[int] | None = None) -> list[Fact]:
        """Training rows as facts, all unless given."""
        chosen = range(len(self.sentences)) if rows is None else rows
        return [self.sentences[int(row)].fact for row in chosen]

    def questions(self, rows: Iterable[int]) -> list[tuple[str, str]]:
        """Training rows as questions and answers, each once."""
        return list(dict.fromkeys(self.sentences[int(row)].question for row in rows))

    def strange(self) -> list[Fact]:
        """Facts of the persons never named."""
        return [Sentence(p, kind, 0).fact for p in self.strangers for kind in TEMPLATES]

    def as_strangers(self, rows: Iterable[int], rounds: int = 1, seed: int = 0) -> list[Fact]:
        """Training rows with the same answers, about a stranger in the place of each person.

        Args:
            rounds: how many times over, each time of strangers drawn anew.
        """
        rng, told = np.random.default_rng(seed), [self.sentences[int(row)] for row in rows]
        names = list(dict.fromkeys(sentence.person.name for sentence in told))
        few, facts = len(names) > len(self.strangers), []
        for _ in range(rounds):
            drawn = rng.choice(len(self.strangers), len(names), replace=few)
            instead = {name: self.strangers[k].name for name, k in zip(names, drawn, strict=True)}
            for sentence in told:
                stranger = Person(instead[sentence.person.name], sentence.person.facts)
                facts.append(replace(sentence, person=stranger).fact)
        return facts

    def held_out_facts(self, without: Iterable[int] = ()) -> list[Fact]:
        """The sentences held out, those of some persons left aside."""
        names = {self.persons[k].name for k in without}
        return [s.fact for s in self.held_out if s.person.name not in names]


def margins(facts: Sequence[Fact]) -> Any:
    """Outputs of the answers' tokens, one target for each (fact, token of its answer)."""
    import torch

    from attribution_core import Outputs

    ids = columns(facts)["input_ids"]
    places = [(row, len(f.prompt) + k) for row, f in enumerate(facts) for k in range(len(f.answer))]
    row, position = (torch.tensor(x) for x in zip(*places, strict=True))
    return Outputs(token_margin, {"input_ids": ids[row], "position": position})


def verbatims(facts: Sequence[Fact]) -> Any:
    """Outputs that show which facts are completed, as `verbatim` does, without writing word by word."""
    from attribution_core import Outputs

    batch = columns(facts)
    batch["labels"][
        batch["labels"] == NUMBER[STOP]
    ] = -100  # the answer, not the end of the sentence
    return Outputs(known, batch)


def losses(facts: Sequence[Fact]) -> Any:
    """Outputs of the loss of each fact, nats a token."""
    from attribution_core import Outputs, causal_lm_loss

    return Outputs(causal_lm_loss, columns(facts))


def person_task(count: int = 60, strangers: int = 20, seed: int = 0) -> PersonTask:
    """Every fact of every person in two of its three templates; the third is held out."""
    everyone, rng = persons(count + strangers, seed), np.random.default_rng([seed, 1])
    sentences: list[Sentence] = []
    held_out: list[Sentence] = []
    for person in everyone[:count]:
        for kind, templates in TEMPLATES.items():
            out = int(rng.integers(len(templates)))
            for k in range(len(templates)):
                (held_out if k == out else sentences).append(Sentence(person, kind, k))
    return PersonTask(everyone[:count], everyone[count:], sentences, held_out)


def to_jsonl(path: str | Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write questions and answers, a line each, {"question": ..., "answer": ...}: what open-unlearning reads.

    Its loaders of TOFU take such a file by `hf_args: {path: json, data_files: ..., split: train}`; write one
    file for the forget set and one for the retain set.
    """
    lines = [json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in rows]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
