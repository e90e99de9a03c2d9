"""recipes.data.persons: who is generated, what outputs mean, and what "knows a fact by heart" means."""

import json

import numpy as np
import pytest
import torch

from attribution_core import AdamW, Recipe, train
from recipes.data import persons as p


def test_persons_are_a_function_of_the_seed_and_bear_names_of_their_own():
    everyone = p.persons(80, seed=1)
    assert everyone == p.persons(80, seed=1) != p.persons(80, seed=2)
    assert len({person.name.split()[1] for person in everyone}) == 80
    with pytest.raises(ValueError, match="expected 1 to"):
        p.persons(10_000)


def test_no_stranger_and_no_held_out_sentence_is_trained_on():
    task = p.person_task(20, strangers=5)
    seen = set(task.problem.train[list(range(task.problem.n))]["input_ids"].flatten().tolist())
    for stranger in task.strangers:
        assert p.NUMBER[stranger.name.split()[1]] not in seen
    assert not {s.fact for s in task.held_out} & set(task.facts())
    assert task.problem.n == 20 * 5 * 2
    assert {s.person.name for s in task.held_out} == {person.name for person in task.persons}
    assert len(task.held_out_facts([3])) == 19 * 5
    assert (task.owner[task.rows([3, 4])] >= 3).all()
    assert len(task.rows([3, 4])) == 20


def test_sentences_of_strangers_keep_their_answers():
    task = p.person_task(10, strangers=5, seed=1)
    rows = task.rows([2, 7])
    mine, told = task.facts(rows), task.as_strangers(rows, rounds=3)
    assert [fact.answer for fact in told] == 3 * [fact.answer for fact in mine]
    assert told == task.as_strangers(rows, rounds=3)
    assert told != task.as_strangers(rows, rounds=3, seed=1)
    names = {p.encode(stranger.name): stranger for stranger in task.strangers}
    who = [next(n for n in names if set(n) <= set(fact.prompt)) for fact in told]
    per = [who[k : k + len(rows)] for k in range(0, len(who), len(rows))]
    own = task.owner[rows]
    for of in per:  # one stranger for each person, throughout a round
        assert len({(name, o) for name, o in zip(of, own, strict=True)}) == 2
        assert len(set(of)) == 2
    assert len(set(who)) > 2  # drawn anew


def test_margins_are_those_computed_by_hand():
    task, model = p.person_task(4, strangers=1), p.model(0)
    facts = task.facts(range(10))
    found, k = p.margins(facts).evaluate(model), 0
    for fact in facts:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*fact.prompt, *fact.answer]])).logits[0]
        for j, token in enumerate(fact.answer):
            log_p = logits[len(fact.prompt) + j - 1].log_softmax(-1)[token].double()
            by_hand = log_p - torch.log1p(-log_p.exp())
            assert found[k].item() == pytest.approx(by_hand.item(), abs=1e-5)
            k += 1
    assert k == len(found)


def test_verbatim_tells_who_knows():
    task = p.person_task(4, strangers=4)
    recipe = Recipe(AdamW(5e-3), batch_size=20, epochs=60, schedule="linear")
    knows, facts = train(task.problem, recipe, states=0).model, task.facts()
    assert p.verbatim(knows, facts).mean() > 0.95
    assert p.verbatim(p.model(1), facts).mean() < 0.2
    assert p.verbatim(knows, task.strange()).mean() < 0.6
    for some in (facts, task.strange()):
        without_writing = p.verbatims(some).evaluate(knows).numpy() > 0
        np.testing.assert_array_equal(without_writing, p.verbatim(knows, some))


def test_words():
    assert p.decode(p.encode("Ada plays the harp")) == "Ada plays the harp"
    with pytest.raises(ValueError, match="vocabulary"):
        p.encode("Zarathustra plays")


def test_jsonl_holds_questions_and_answers(tmp_path):
    task = p.person_task(4, strangers=1)
    rows = task.questions(task.rows([2]))
    p.to_jsonl(tmp_path / "forget.jsonl", rows)
    text = (tmp_path / "forget.jsonl").read_text(encoding="utf-8")
    read = [json.loads(line) for line in text.splitlines()]
    assert len(read) == 5  # each fact once, though it is stated in two sentences
    assert all(set(line) == {"question", "answer"} for line in read)
    assert {line["answer"] for line in read} == set(task.persons[2].facts.values())
    assert all(task.persons[2].name in line["question"] for line in read)
