"""Text from runs and exports: cached decoding equals uncached, and layers stay shared."""

import pytest
import torch
from built_models import config_of, trained
from tiny_models import gpt2, llama
from transformers import BloomConfig, BloomForCausalLM

from layer_tying import InputError, TiedLayers, Tying, export_compact, load
from layer_tying.cli import main
from layer_tying.data.tokenizer import load_tokenizer, read_tokenizer
from layer_tying.models.build import build_model
from layer_tying.saving.checkpoint import save_checkpoint
from layer_tying.saving.export_run import export_run
from layer_tying.saving.generate import generate

pytestmark = pytest.mark.numerics

CONTEXT = 32

SETTINGS = {"tying": {"export_dtype": None}}  # of a run, as far as an export asks for them


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each kind of model what a run leaves: its best checkpoint and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bytes", "")
    kinds = {"gpt2": "gpt2", "llama": "llama", "bert": "bert-causal", "masked": "bert-masked"}
    configs = {
        name: config_of(kind, 4, 16, vocab_size=260, length=CONTEXT, eos_id=256, pad_id=257)
        for name, kind in (kinds | {"vit": "vit"}).items()
    }
    made = {}
    for name, config in configs.items():
        made[name] = tmp_path_factory.mktemp(name)
        tying = Tying((0, 1, 0, 1))
        model = build_model(config, tying)
        best = made[name] / "checkpoints" / "best"
        facts = {"model": config.to_dict()}
        save_checkpoint(best, model, tying, step=1, config=SETTINGS, facts=facts)
        if name != "vit":
            tokenizer.save(made[name] / "tokenizer")
    return made


GENERATING = pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])


@GENERATING
def test_it_is_what_the_most_likely_tokens_are_one_by_one(name, runs):
    """Against whole forward passes, without a cache and without transformers' generate."""
    model, tokenizer = load(runs[name]), read_tokenizer(runs[name] / "tokenizer")
    ids = tokenizer.encode("the cat ").tolist()
    for _ in range(20):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    said = generate(runs[name], "the cat ", max_new_tokens=20, temperature=0)
    assert said == tokenizer.decode(ids[8:])


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert-causal"])
@pytest.mark.parametrize("tying", [Tying.all_tied(4), Tying((0, 1, 0, 1))], ids=str)
def test_cached_logits_equal_uncached(kind, tying):
    """Every layer has a slot of its own in the cache, no matter whose weights it uses."""
    model = trained(kind, True, tying)
    inputs = torch.randint(58, (2, 6), generator=torch.Generator().manual_seed(0))
    scores = {}
    for use_cache in (True, False):
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=8,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        scores[use_cache] = (out.sequences, torch.stack(out.logits))
    assert torch.equal(scores[True][0], scores[False][0])
    torch.testing.assert_close(scores[True][1], scores[False][1], rtol=1e-4, atol=1e-5)
    assert TiedLayers(model).tying == tying


@GENERATING
def test_an_export_says_what_its_run_says(name, runs, tmp_path):
    export_run(runs[name], tmp_path, "compact")
    options = {"seed": 3, "top_k": 40, "temperature": 0.9, "max_new_tokens": 12}
    assert generate(tmp_path, "the dog", **options) == generate(runs[name], "the dog", **options)


def test_seed_temperature_and_top_k(runs):
    samples = {generate(runs["gpt2"], "the dog", max_new_tokens=12, seed=s) for s in range(4)}
    assert len(samples) > 1
    assert generate(runs["gpt2"], "a", seed=1) == generate(runs["gpt2"], "a", seed=1)
    greedy = generate(runs["gpt2"], "the dog", temperature=0)
    assert generate(runs["gpt2"], "the dog", top_k=1, seed=5) == greedy


def test_the_context_is_filled_and_never_passed(runs):
    for prompt in ("", "the cat", "x" * (CONTEXT - 1)):
        said = generate(runs["gpt2"], prompt, temperature=0)  # a token is a byte, or the end
        assert len(said) <= CONTEXT - max(len(prompt), 1)


@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("gpt2", ["--prompt", "x" * 40], "40 tokens and the model's context 32: shorten it by 9"),
        ("gpt2", ["--max-new-tokens", "30"], "context of 32: ask for at most 29 new tokens"),
        ("gpt2", ["--max-new-tokens", "0"], "max-new-tokens is at least 1, got 0"),
        ("gpt2", ["--temperature", "-1"], "temperature is 0 or at least 1e-06, got -1.0"),
        ("gpt2", ["--temperature", "nan"], "temperature is 0 or at least 1e-06, got nan"),
        ("gpt2", ["--temperature", "1e-45"], "temperature is 0 or at least 1e-06, got "),
        ("gpt2", ["--seed", "99999999999999999999"], "seed is at least 0 and less than 2^63"),
        ("gpt2", ["--prompt", "a\udcff"], "the prompt is not UTF-8: 'a\\udcff'"),
        ("gpt2", ["--top-k", "0"], "top-k is at least 1, got 0"),
        ("masked", [], "holds a BertForMaskedLM, which does not generate text"),
        ("vit", [], "holds no saved tokenizer"),
    ],
)
def test_what_cannot_be_done_is_one_line(name, flags, says, runs, capsys):
    assert main(["generate", str(runs[name]), "--prompt", "the", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_the_command_prints_the_prompt_and_what_follows(runs, capsys):
    flags = ["--max-new-tokens", "5", "--temperature", "0"]
    assert main(["generate", str(runs["gpt2"]), "--prompt", "the cat", *flags]) == 0
    said = generate(runs["gpt2"], "the cat", max_new_tokens=5, temperature=0)
    assert capsys.readouterr().out == f"the cat{said}\n"


def test_it_samples_from_the_models_own_distribution(tmp_path):
    """Whatever the checkpoint's generation_config says: here, to keep one token only."""
    torch.manual_seed(0)
    model = gpt2(vocab_size=260)
    model.generation_config.top_p = 1e-4
    model.generation_config.do_sample = True
    export_compact(model, tmp_path)
    load_tokenizer("bytes", "").save(tmp_path)
    said = {generate(tmp_path, "the", max_new_tokens=6, seed=seed) for seed in range(4)}
    assert len(said) == 4


def test_the_space_before_the_first_new_word_is_kept(tmp_path):
    """The decoders of words leave it out before the first word that they are given."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"), "")
    model = gpt2(vocab_size=len(words))
    with torch.no_grad():
        model.lm_head.weight.fill_(0)
        model.lm_head.weight[6].fill_(1)  # "cat", where the sum of the last state is positive
        model.transformer.ln_f.weight.fill_(0)
        model.transformer.ln_f.bias.fill_(1)
    export_compact(model, tmp_path / "export")
    tokenizer.save(tmp_path / "export")
    said = generate(tmp_path / "export", "the", max_new_tokens=2, temperature=0)
    assert said == " cat cat"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    export_compact(gpt2(vocab_size=100), tmp_path)
    load_tokenizer("bytes", "").save(tmp_path)
    with pytest.raises(InputError, match="has 260 ids, and the model has 100"):
        generate(tmp_path, "the")


def test_a_model_without_an_end_of_its_context_generates(tmp_path):
    config = BloomConfig(vocab_size=260, hidden_size=16, n_layer=2, n_head=2)
    model = BloomForCausalLM(config).eval()
    export_compact(model, tmp_path)
    tokenizer = load_tokenizer("bytes", "")
    tokenizer.save(tmp_path)
    ids = torch.tensor([list(b"the")])
    for _ in range(3):  # the likeliest token, without a cache and without generate()
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0, 3:].tolist())
    assert generate(tmp_path, "the", max_new_tokens=3, temperature=0) == expected


def test_a_folder_that_is_neither_is_one_line(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no saved tokenizer"):
        generate(tmp_path, "the")


def test_outputs_that_are_not_finite_are_one_line(tmp_path):
    model = gpt2(vocab_size=260)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = torch.inf
    export_compact(model, tmp_path)
    load_tokenizer("bytes", "").save(tmp_path)
    with pytest.raises(InputError, match="outputs are not finite"):
        generate(tmp_path, "the")
