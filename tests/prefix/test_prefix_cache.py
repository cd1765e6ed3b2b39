"""The frozen prefix of a model computed once per example: the same training, for fewer FLOPs."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import gtcompile
from gtcompile.prefix.prefix_files import PrefixFiles

BLOCKS = 4
SIZES = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}


def make_llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, **changes)
    model = LlamaForCausalLM(config)
    model.config.use_cache = False
    return model.train()


def make_gpt2(dropout=0.0):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61,
        n_embd=16,
        n_layer=BLOCKS,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    model.config.use_cache = False
    return model.train()


def batches(epochs, examples=6, size=2, tokens=7, seed=0):
    """Shuffled batches of the same examples in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(3, 61, (examples, tokens), generator=generator)
    for _ in range(epochs):
        for rows in torch.randperm(examples, generator=generator).split(size):
            yield {"input_ids": data[rows], "labels": data[rows]}


def train(model, sets, *, epochs=4, seed=0):
    """Train with a set per step, in turns; return the losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step, batch in enumerate(batches(epochs, seed=seed)):
        gtcompile.train_only(model, sets[step % len(sets)])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


TOP = ["model.layers.3.*", "model.norm.weight"]


@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_the_same_bit_for_bit_and_later_epochs_start_from_cached_values(compiled):
    plain, cached = make_llama(), make_llama()
    for model in (plain, cached):
        if compiled:
            gtcompile.compile_blocks(model, compiler="eager")
    cache = gtcompile.PrefixCache(cached)
    assert train(plain, [TOP]) == train(cached, [TOP])
    # Of twelve steps, the first shows the order of the modules, three more store their examples, and the
    # first that could start from cached values computes them again and compares.
    assert (cache.stats.hits, cache.stats.misses) == (7, 4)
    assert (cache.stats.depth, cache.stats.disabled) == (3, None)
    for own, other in zip(plain.parameters(), cached.parameters(), strict=True):
        assert torch.equal(own, other)


NAMES = sorted(name for name, _ in make_llama().named_parameters())
SETS = st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=3)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(SETS, st.integers(0, 100))
def test_any_sets_in_any_order_train_as_without_a_cache(sets, seed):
    cached = make_llama()
    cache = gtcompile.PrefixCache(cached)
    assert train(make_llama(), sets, seed=seed) == train(cached, sets, seed=seed)
    assert cache.stats.disabled is None


def test_predicted_flops_of_a_hit_are_counted():
    model = make_llama()
    gtcompile.compile_blocks(model, compiler="eager")
    cache = gtcompile.PrefixCache(model)
    train(model, [TOP])
    batch = next(batches(1))
    trained = gtcompile.trained_parameters(model)
    whole = gtcompile.backward_costs(model, batch).step_flops(trained)
    with cache.pretend_hit():
        predicted = gtcompile.backward_costs(model, batch).step_flops(trained)
    hits = cache.stats.hits
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert cache.stats.hits == hits + 1
    assert predicted == counter.get_total_flops() < whole


def test_a_longer_frozen_prefix_keeps_the_values_and_their_price():
    model = make_llama()
    cache = gtcompile.PrefixCache(model)
    lower = ["model.layers.2.*", "model.layers.3.*"]
    train(model, [lower])
    hits, batch = cache.stats.hits, next(batches(1))
    trained = gtcompile.train_only(model, TOP)
    loss = model(**batch).loss
    assert (cache.stats.hits, cache.stats.depth) == (hits + 1, 2)
    cache.enabled = False
    assert torch.equal(loss, model(**batch).loss)
    cache.enabled = True
    with cache.pretend_hit():
        predicted = gtcompile.backward_costs(model, batch).step_flops(trained)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    assert counter.get_total_flops() == predicted


def test_labelled_logits_and_the_cache_together():
    def run(model, prepare):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gtcompile.train_only(model, TOP)
        losses = []
        for batch in batches(4):
            labels = batch["labels"].clone()
            labels[:, :4] = -100
            loss = model(**prepare({**batch, "labels": labels})).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain, both = make_llama(), make_llama()
    cache = gtcompile.PrefixCache(both)
    gtcompile.only_labelled_logits(both)
    expected = run(plain, dict)
    assert run(both, gtcompile.add_labelled_positions) == pytest.approx(expected, rel=1e-5)
    assert cache.stats.hits == 7


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_adapters_in_the_upper_blocks_leave_a_prefix():
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[2, 3])
        return peft.get_peft_model(make_llama(), config)

    plain, cached = make(), make()
    cache = gtcompile.PrefixCache(cached)
    assert train(plain, [None]) == train(cached, [None])
    assert (cache.stats.hits, cache.stats.depth) == (7, 2)


def test_the_encoder_of_an_encoder_decoder_is_a_prefix():
    def make():
        torch.manual_seed(0)
        config = BartConfig(
            vocab_size=61, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, use_cache=False,
        )  # fmt: skip
        return BartForConditionalGeneration(config).train()

    sets = [["model.decoder.layers.*"]]
    plain, cached = make(), make()
    cache = gtcompile.PrefixCache(cached)
    assert train(plain, sets) == train(cached, sets)
    assert (cache.stats.hits, cache.stats.depth) == (7, 2)


def disabled_with_a_warning(model, sets, caplog):
    cache = gtcompile.PrefixCache(model)
    train(model, sets)
    assert cache.stats.hits == 0
    assert "not cached any more" in caplog.text
    return cache.stats.disabled


def test_dropout_in_the_prefix_disables_the_cache(caplog):
    reason = disabled_with_a_warning(make_gpt2(dropout=0.5), [["transformer.h.3.*"]], caplog)
    assert "dropout" in reason


def test_blocks_that_hand_on_more_than_one_tensor_disable_the_cache(caplog):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=61,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config).train()
    assert "one tensor" in disabled_with_a_warning(model, [["decoder.*"]], caplog)


def warm(**settings_of_cache):
    """A model with a cache that holds all examples and whose next training step is a hit."""
    model = make_gpt2()
    cache = gtcompile.PrefixCache(model, **settings_of_cache)
    train(model, [["transformer.h.3.*"]])
    return model, cache


@pytest.mark.parametrize("how", ["in place", "loaded", "assigned"])
def test_a_change_in_the_prefix_empties_the_cache(how):
    model, cache = warm()
    state = {name: value + 0.1 for name, value in model.state_dict().items()}
    if how == "in place":
        with torch.no_grad():
            model.transformer.wpe.weight.add_(0.1)
    else:
        model.load_state_dict(state, assign=how == "assigned")
    hits, batch = cache.stats.hits, next(batches(1))
    loss = model(**batch).loss
    assert cache.stats.hits == hits
    cache.remove()
    assert torch.equal(loss, model(**batch).loss)


def test_evaluation_and_generation_compute_every_block():
    model, cache = warm()
    hits, batch = cache.stats.hits, next(batches(1))
    model.eval()
    model(**batch)
    model.generate(batch["input_ids"], max_new_tokens=1, do_sample=False)
    model.train()
    with torch.no_grad():
        model(**batch)
    assert cache.stats.hits == hits
    model(**batch)
    assert cache.stats.hits == hits + 1


def test_importance_is_measured_through_the_prefix():
    model, cache = warm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with_cache = gtcompile.measure_importance(model, optimizer, list(batches(1)))
    cache.remove()
    assert with_cache == gtcompile.measure_importance(model, optimizer, list(batches(1)))
    assert "transformer.h.0.attn.c_attn.weight" in with_cache


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions", "output_router_logits"])
@pytest.mark.parametrize("in_config", [False, True])
def test_what_every_block_computed_can_be_asked_for(name, in_config):
    model = make_llama(attn_implementation="eager")
    cache = gtcompile.PrefixCache(model)
    train(model, [TOP])
    before = cache.stats.forwards.copy()
    asked = {} if in_config else {name: True}
    if in_config:
        setattr(model.config, name, True)
    model(**next(batches(1)), **asked)
    assert cache.stats.forwards - before == {0: 1}


def test_values_beyond_the_limit_are_computed_as_before():
    row = 7 * 16 * 4
    _, cache = warm(max_bytes=2 * row)
    assert (cache.stats.bytes, cache.stats.disabled) == (2 * row, None)


def test_a_forward_that_fails_leaves_the_blocks_as_they_were():
    model, _ = warm()
    assert "forward" not in vars(model.transformer.h[0])
    forwards = [block.forward for block in model.transformer.h]
    batch = next(batches(1))
    with pytest.raises(ValueError, match="batch_size"):
        model(**batch | {"labels": batch["labels"][:1]})
    model(**batch)
    assert [block.forward for block in model.transformer.h] == forwards
    assert "forward" not in vars(model.transformer.h[0])


def test_what_cannot_work_is_refused():
    with pytest.raises(gtcompile.GTCompileError, match="no repeated blocks"):
        gtcompile.PrefixCache(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no module 'model\.layer\.0'; near names: model\.layers\.0"):
        gtcompile.PrefixCache(make_llama(), blocks=["model.layer.0"])
    with pytest.raises(gtcompile.GTCompileError, match="compiled as a whole"):
        gtcompile.PrefixCache(torch.compile(make_llama(), backend="eager"))
    cache = gtcompile.PrefixCache(make_llama())
    with pytest.raises(gtcompile.GTCompileError, match="one training forward first"), cache.pretend_hit():
        pass


class Stack(torch.nn.Module):
    """Blocks in a row whose outputs the model may also use elsewhere or write to."""

    def __init__(self, *, reads_all=False, writes=False):
        super().__init__()
        torch.manual_seed(0)
        blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)]
        self.blocks, self.head = torch.nn.ModuleList(blocks), torch.nn.Linear(4, 1)
        self.reads_all, self.writes = reads_all, writes

    def forward(self, x):
        outputs = []
        for block in self.blocks:
            x = block(x)
            if self.writes and not x.requires_grad:
                x *= 0.5
            outputs.append(x)
        return self.head(sum(outputs) if self.reads_all else x).pow(2).mean()


def losses_of_the_head(model, x, steps=5):
    gtcompile.train_only(model, ["head.*"])
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(steps):
        loss = model(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_a_model_that_reads_blocks_of_the_prefix_elsewhere_is_refused():
    model = Stack(reads_all=True)
    cache = gtcompile.PrefixCache(model)
    with pytest.raises(gtcompile.GTCompileError, match="elsewhere than in the next block"):
        losses_of_the_head(model, torch.randn(2, 4))
    assert losses_of_the_head(model, torch.ones(2, 4))
    assert cache.stats.hits == 1


def test_a_model_that_writes_to_the_output_of_a_block_trains_the_same():
    x, model = torch.randn(2, 4), Stack(writes=True)
    expected = losses_of_the_head(Stack(writes=True), x)
    cache = gtcompile.PrefixCache(model)
    assert losses_of_the_head(model, x) == expected
    assert cache.stats.hits == 2


def test_an_input_that_requires_grad_gets_its_gradient():
    x, model = torch.randn(2, 4, requires_grad=True), Stack()
    cache = gtcompile.PrefixCache(model)
    losses_of_the_head(model, x)
    assert x.grad is not None
    assert cache.stats.hits == 0


# Values on disk.

HEX = "0123456789abcdef" * 2
"""What the name of a prefix, or of a file without its suffix, looks like."""


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


def test_a_second_run_starts_from_the_files_of_the_first(tmp_path):
    expected = train(make_llama(), [TOP])
    for hits in (7, 10):  # the second run computes one batch to see the modules' order, and one to compare
        model = make_llama()
        cache = gtcompile.PrefixCache(model, folder=tmp_path)
        assert train(model, [TOP]) == expected
        assert cache.stats.hits == hits
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["truncated", "poisoned", "empty"])
def test_a_damaged_file_is_deleted_and_its_example_computed_again(damage, tmp_path, caplog):
    expected = train(make_llama(), [TOP])
    gtcompile_cache = gtcompile.PrefixCache(model := make_llama(), folder=tmp_path)
    train(model, [TOP])
    gtcompile_cache.remove()
    for path in files(tmp_path):
        content = path.read_bytes()
        whole = {"truncated": content[:-9], "poisoned": content[:-4] + b"\0\0\0\1", "empty": b""}
        path.write_bytes(whole[damage])
    model = make_llama()
    cache = gtcompile.PrefixCache(model, folder=tmp_path)
    assert train(model, [TOP]) == expected
    assert "computed again" in caplog.text
    assert cache.stats.hits == 7


def test_other_weights_have_other_files(tmp_path):
    for factor in (1.0, 2.0):
        model = make_llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(factor)
        gtcompile.PrefixCache(model, folder=tmp_path)
        train(model, [TOP])
    assert len(files(tmp_path)) == 12


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="folder that can be written to"):
        gtcompile.PrefixCache(make_llama(), folder=tmp_path / "file")


def test_what_a_killed_run_left_is_deleted(tmp_path):
    def run():
        model = make_llama()
        gtcompile.PrefixCache(model, folder=tmp_path)
        train(model, [TOP])

    run()
    (prefix,) = tmp_path.iterdir()
    killed, written_now = (prefix / f".{HEX}.safetensors.{end}" for end in ("killed", "now"))
    for path in (killed, written_now):
        path.touch()
    os.utime(killed, (0, 0))
    run()
    assert not killed.exists()
    assert written_now.exists()


def test_a_full_disk_and_a_limit_cost_time_only(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    expected = train(make_llama(), [TOP])
    model = make_llama()
    gtcompile.PrefixCache(model, folder=tmp_path / "limited", max_disk_bytes=1400)
    assert train(model, [TOP]) == expected
    assert len(files(tmp_path)) == 2  # 584 bytes each
    monkeypatch.setattr("os.replace", full)
    model = make_llama()
    gtcompile.PrefixCache(model, folder=tmp_path / "full")
    assert train(model, [TOP]) == expected
    assert "No space left" in caplog.text
    assert not list((tmp_path / "full").rglob(".*"))


def test_files_of_an_older_prefix_make_room(tmp_path):
    for factor in (1.0, 2.0):
        model = make_llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(factor)
        gtcompile.PrefixCache(model, folder=tmp_path, max_disk_bytes=6 * 600)
        train(model, [TOP])
    assert len(files(tmp_path)) == 6


FOREIGN = st.sampled_from(
    ["notes", "notes.safetensors", HEX, f"{HEX}.safetensors", f"{HEX[:-1]}.safetensors"]
)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["mine", ".git", HEX, HEX[:-1], HEX.upper()]), st.sets(FOREIGN), min_size=1
    )
)
def test_what_others_keep_in_the_folder_stays_and_does_not_count(folders):
    with tempfile.TemporaryDirectory() as name:
        shared = Path(name)
        theirs = {shared / "thesis.tex"}
        for folder, names in folders.items():
            (shared / folder / "inside").mkdir(parents=True)  # no prefix has a folder in it
            theirs |= {shared / folder / file for file in names} | {shared / folder / "inside" / "data"}
        for path in theirs:
            path.write_bytes(bytes(1000))
        files = PrefixFiles(shared, [b"prefix"], max_bytes=800)
        for key in (b"a" * 16, b"b" * 16):
            files.write(key, torch.zeros(8))
        assert all(path.exists() for path in theirs)
        assert files.read(b"a" * 16) is not None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(0, 4000))
def test_files_never_take_more_bytes_than_the_limit(lengths, limit):
    with tempfile.TemporaryDirectory() as name:
        for number, length in enumerate(lengths):
            PrefixFiles(Path(name), [bytes([number % 2])], limit).write(
                bytes([number]) * 16, torch.zeros(length)
            )
        one = PrefixFiles(Path(name), [b"one"], limit)
        for number, length in enumerate(lengths):
            one.write(bytes([number]) * 16, torch.zeros(length))
            assert sum(path.stat().st_size for path in files(Path(name))) <= limit


def test_a_run_killed_while_it_writes_leaves_no_half_written_value(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    gtcompile.PrefixCache(model := make_llama(), folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # a kill leaves no time to clean up
        with pytest.raises(KeyboardInterrupt):
            train(model, [TOP])
    (unfinished,) = tmp_path.rglob(".*")
    unfinished.write_bytes(unfinished.read_bytes()[:50])  # the kill may come in the middle of a file
    cache = gtcompile.PrefixCache(model := make_llama(), folder=tmp_path)
    assert train(model, [TOP]) == train(make_llama(), [TOP])
    assert (cache.stats.hits, len(files(tmp_path))) == (7, 6)


def test_runs_that_share_a_folder_at_the_same_time_train_as_alone(tmp_path):
    def steps(model, deletes):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gtcompile.train_only(model, TOP)
        for number, batch in enumerate(batches(4)):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if deletes and number == 6:  # to make room for its own files
                shutil.rmtree(tmp_path)
            yield loss.item()

    models = [make_llama(), make_llama()]
    caches = [gtcompile.PrefixCache(model, folder=tmp_path) for model in models]
    pairs = list(zip(steps(models[0], deletes=False), steps(models[1], deletes=True), strict=True))
    expected = train(make_llama(), [TOP])
    assert [list(losses) for losses in zip(*pairs, strict=True)] == [expected, expected]
    assert all(cache.stats.hits > 0 and cache.stats.disabled is None for cache in caches)
