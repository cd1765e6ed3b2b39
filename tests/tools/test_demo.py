"""The demo's data and pretrained model: deterministic, without leakage, and small."""

import json
import re
from importlib import resources

import pytest
import torch
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo_corpus import pretraining_corpus
from benchmarks.demo_model import build_model, build_tokenizer, main, pretrain
from gtcompile.tools.models.demo_data import summarisation_examples
from gtcompile.tools.models.demo_model import load_demo

SPLITS = ("train", "validation", "test")
SUMMARY = re.compile(r"(\w+) (\w+) the (\w+) at the (\w+) on (\w+)\.")
SYNONYMS = {
    "mended": "repaired",
    "traded": "sold",
    "coloured": "painted",
    "washed": "cleaned",
    "made": "built",
    "discovered": "found",
    "purchased": "bought",
    "carried": "moved",
}


def facts(summary):
    """Person, deed, thing, place and day of a summary."""
    return SUMMARY.fullmatch(summary).groups()


def read_summary(source):
    """Derive a summary from a source by reading, independently of how it was generated."""
    told = re.sub(r"(\w+): I\b", r"\1", source.removeprefix("Chat: "))
    person, deed, thing = re.search(r"(\w+) (\w+) the \w+ (\w+) there\.", told).groups()
    visit = re.search(rf"{person} (went to|was at|spent) [^.]*", told)[0]
    place, day = re.search(r"the (\w+)", visit)[1], re.search(r"\w+day", visit)[0]
    return f"{person} {SYNONYMS.get(deed, deed)} the {thing} at the {place} on {day}."


@pytest.fixture(scope="module")
def demo():
    return load_demo()


@given(st.sampled_from(SPLITS), st.integers(0, 20), st.integers(0, 20))
def test_a_longer_list_of_examples_begins_with_the_shorter(split, one, more):
    assert summarisation_examples(split, one + more)[:one] == summarisation_examples(split, one)


def test_the_corpus_follows_from_its_seed():
    assert pretraining_corpus(3, 40) == pretraining_corpus(3, 40)
    assert pretraining_corpus(3, 40) != pretraining_corpus(4, 40)


@pytest.mark.parametrize("split", SPLITS)
def test_every_summary_can_be_read_from_its_source(split):
    for example in summarisation_examples(split, 300):
        assert read_summary(example["source"]) == example["target"]


def casts(split):
    """Person, thing and place of every visit a summary of `split` tells."""
    told = (facts(example["target"]) for example in summarisation_examples(split, 1000))
    return {(person, thing, place) for person, _, thing, place, _ in told}


@pytest.mark.parametrize(
    ("one", "other"), [("train", "test"), ("train", "validation"), ("validation", "test")]
)
def test_no_person_thing_and_place_occur_together_in_two_splits(one, other):
    assert not casts(one) & casts(other)


def retold_casts(story):
    """Person, thing and place of every visit, from the second line of a story."""
    places = dict(re.findall(r"(\w+) was at the (\w+) on \w+\.", story))
    things = dict(re.findall(r"(\w+) \w+ the (\w+)\.", story))
    return {(person, things[person], places[person]) for person in places.keys() & things.keys()}


def test_no_visit_of_the_task_is_told_in_the_pretraining_corpus():
    stories = [text for text in pretraining_corpus(0, 4000) if text.split(":")[0] != "List"]
    pretrained = {cast for story in stories for cast in retold_casts(story.split("\n")[1])}
    assert len(pretrained) > 1000
    for split in SPLITS:
        assert not pretrained & casts(split)


def test_the_corpus_contains_no_summary_and_the_prompt_in_lists_alone():
    corpus = pretraining_corpus(0, 3000)
    assert not SUMMARY.search("".join(corpus))
    assert {text.split(":")[0] for text in corpus if "TL;DR" in text} == {"List"}


def test_an_unknown_split_is_refused_by_name():
    with pytest.raises(ValueError, match="train, validation, test; got 'dev'"):
        summarisation_examples("dev", 1)


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="at least 0; got -1"):
        summarisation_examples("train", -1)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        pretraining_corpus(0, -1)


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_the_committed_files_take_less_than_five_megabytes():
    folder = resources.files("gtcompile.tools.models") / "demo"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names(folder)
    assert sum(len(file.read_bytes()) for file in folder.iterdir()) <= 5_000_000


def test_the_committed_tokenizer_is_the_scripts():
    committed = (resources.files("gtcompile.tools.models") / "demo" / "tokenizer.json").read_text(
        encoding="utf-8"
    )
    made = build_tokenizer(pretraining_corpus(0, 12_000))
    assert json.loads(committed) == json.loads(made.backend_tokenizer.to_str())


def test_the_committed_model_has_the_scripts_shape(demo):
    model, tokenizer = demo
    built = build_model(tokenizer)
    assert model.config.num_hidden_layers >= 8
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in built.named_parameters()
    ]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_survives_the_tokenizer(demo, text):
    tokenizer = demo[1]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_words_of_the_task_are_single_tokens(demo):
    tokenizer = demo[1]
    for example in summarisation_examples("test", 50):
        words = example["target"].removesuffix(".").split()
        assert len(tokenizer.encode(f" {example['target']}", add_special_tokens=False)) == len(words) + 1
    assert len(tokenizer.encode(" TL;DR:", add_special_tokens=False)) == 4


def test_the_pretrained_model_finds_facts_by_the_person_they_belong_to(demo):
    """What the demo rests on; the texts are new to it."""
    model, tokenizer = demo
    right = 0
    for example in summarisation_examples("test", 32):
        person, _, _, place, _ = facts(example["target"])
        question = tokenizer(f"{example['source']}\n {person} was at the", return_tensors="pt")
        answer = model(input_ids=question["input_ids"]).logits[0, -1].argmax()
        right += tokenizer.decode(answer) == f" {place}"
    assert right >= 24


def generate(model, tokenizer, prompts):
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:].tolist()


def test_a_batch_padded_on_the_left_generates_what_single_prompts_do(demo):
    prompts = [f"{example['source']} TL;DR:" for example in summarisation_examples("test", 3)]
    assert generate(*demo, prompts) == [generate(*demo, [prompt])[0] for prompt in prompts]


def test_pretraining_is_deterministic_and_lowers_the_loss():
    texts = pretraining_corpus(0, 160)[:40]
    tokenizer = build_tokenizer(texts)
    tokens = tokenizer(texts[0], return_tensors="pt", return_token_type_ids=False)
    models = [build_model(tokenizer) for _ in range(3)]
    for model in models[:2]:
        with Progress(disable=True) as progress:
            pretrain(model, tokenizer, texts, progress=progress)
    pretrained, again, fresh = (model(**tokens, labels=tokens["input_ids"]).loss for model in models)
    assert pretrained == again
    assert pretrained < fresh


def test_the_script_leaves_a_directory_with_files_alone(tmp_path):
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(typer.BadParameter, match="not an empty directory"):
        main(tmp_path, texts=1)
    assert names(tmp_path) == {"kept"}


def test_the_script_writes_a_model_that_loads_and_leaves_nothing_else(tmp_path):
    main(tmp_path / "made", texts=16)
    assert names(tmp_path) == {"made"}
    model = LlamaForCausalLM.from_pretrained(tmp_path / "made")
    assert model.config.vocab_size == len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "made"))
