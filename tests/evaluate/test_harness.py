"""The adapter to lm-evaluation-harness, on local tasks, against transformers."""

import json
import os

import numpy as np
import pytest
import torch
from evaluating import TEXT, copy_model, reference, write_tokenizer

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # before datasets is imported
pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'jaxsvd[eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import jaxsvd
from jaxsvd.evaluate.harness import HarnessModel


def requests_of(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.fixture(scope="module")
def lm(worded):
    return jaxsvd.load(worded[0])


@pytest.fixture(scope="module")
def model(lm):
    return HarnessModel(lm, batch_size=3, max_gen_toks=12)


def likelihood(worded, lm, text, size):
    """Of the last `size` tokens of a text, a BOS in front, by transformers."""
    logprobs, greedy = reference(worded[1], [0, *lm.tokenizer.encode(text, special=False)])
    return logprobs[-size:].sum(), bool(greedy[-size:].all())


def generated(worded, ids, new):
    """The ids that greedily follow, by transformers."""
    with torch.no_grad():
        row = worded[1].generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new, pad_token_id=2)
    return row[0, len(ids) :].tolist()


# Likelihoods.


def test_likelihoods_of_continuations(worded, lm, model):
    pairs = [("Four score and", " seven"), ("a", "b"), ("x" * 40, "yz"), ("", "Four"), ("ends with spaces  ", "word")]
    found = model.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True)
    sizes = [6, 1, 2, 4, 6]  # the spaces at the end of a context count as the continuation's
    for (context, continuation), size, (logprob, greedy) in zip(pairs, sizes, found, strict=True):
        expected = likelihood(worded, lm, context + continuation, size)
        assert logprob == pytest.approx(expected[0], abs=1e-3)
        assert (greedy, type(greedy), type(logprob)) == (expected[1], bool, float)


def test_greedy_continuations_are_known_as_such(worded, lm, model):
    follow = lm.generate("Four score", max_new_tokens=3).text
    found = model.loglikelihood(requests_of("loglikelihood", ("Four score", follow), ("Four score", follow + "~")))
    assert [greedy for _, greedy in found] == [True, False]


def test_context_and_continuation_are_encoded_together(smollm):
    import transformers

    torch.set_num_threads(1)
    model = HarnessModel(str(smollm), batch_size=2, dtype="float32")
    pairs = [("The capital of France is ", "Paris"), ("The capital of France is", " a city called Lyon")]
    found = model.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    other = transformers.AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32).eval()
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        ids = tokenizer(context + continuation)["input_ids"]
        size = len(ids) - len(tokenizer(context.rstrip())["input_ids"])
        logprobs, likeliest = reference(other, ids)
        assert logprob == pytest.approx(logprobs[-size:].sum(), abs=1e-3)
        assert greedy == likeliest[-size:].all()
    assert found[0][1] and not found[1][1]
    assert model.prefix_token_id == 1  # SmolLM2's BOS, which its tokenizer does not add


def test_long_contexts_lose_their_beginning(worded, lm, caplog):
    model = HarnessModel(lm, max_length=20)
    (found,) = model.loglikelihood(requests_of("loglikelihood", (TEXT, "word")), disable_tqdm=True)
    ids = lm.tokenizer.encode(TEXT.rstrip() + " word", special=False)
    assert found[0] == pytest.approx(reference(worded[1], ids[-21:])[0][-5:].sum(), abs=1e-3)
    assert "lose their beginning: 1" in caplog.text
    with pytest.raises(jaxsvd.UsageError, match=r"'a{21}' has 21 tokens: expected 1 to 20"):
        model.loglikelihood(requests_of("loglikelihood", ("x", "a" * 21)), disable_tqdm=True)
    with pytest.raises(jaxsvd.UsageError, match="has 0 tokens"):
        model.loglikelihood(requests_of("loglikelihood", ("x", "")), disable_tqdm=True)


@pytest.mark.parametrize("max_length", [None, 32, 7])
def test_rolling_likelihoods_score_each_token_once(worded, lm, max_length):
    texts = [TEXT[:70], "short", ""]
    model = HarnessModel(lm, max_length=max_length, batch_size=2)
    found = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", *[(text,) for text in texts]))
    assert found[1] == pytest.approx(likelihood(worded, lm, "short", 5)[0], abs=1e-3)
    assert found[2] == 0
    ids, size, expected = lm.tokenizer.encode(texts[0], special=False), max_length or 512, 0.0
    for start in range(0, len(ids), size):  # the last window is filled up with what comes before it
        end = min(start + size, len(ids))
        window = [0, *ids[:end]] if not start else ids[max(end - size - 1, 0) : end]
        expected += reference(worded[1], window)[0][-(end - start) :].sum()
    assert found[0] == pytest.approx(expected, abs=1e-3)


# Texts.


def test_texts_are_those_of_transformers(worded, lm, model):
    contexts = ["Four score and", "a", "", "our fathers brought forth "]
    options = {"until": [], "max_gen_toks": 9}
    found = model.generate_until(requests_of("generate_until", *[(text, options) for text in contexts]))
    for context, text in zip(contexts, found, strict=True):
        assert text == lm.tokenizer.decode(generated(worded, lm.encode(context), 9))
    (default,) = model.generate_until(requests_of("generate_until", ("a", {"until": []})))
    assert default == lm.tokenizer.decode(generated(worded, lm.encode("a"), 12))


def whole_text(lm, context="Four score and", new=40):
    return lm.generate(context, max_new_tokens=new).text


def test_texts_end_at_until(lm, model):
    text = whole_text(lm)
    stop = text[6:8]
    for until in ([stop], stop, ["no such text", stop, ""]):
        options = {"until": until, "max_gen_toks": 40, "do_sample": False, "temperature": 0.7}
        (found,) = model.generate_until(requests_of("generate_until", ("Four score and", options)))
        assert found == text[: text.index(stop)]


def test_until_may_be_a_special_token(lm, model):
    assert model._options({"until": ["</s>", "\n\n"]}) | {"max_new_tokens": 0} == {
        "max_new_tokens": 0,
        "stop": ["\n\n"],
        "stop_token_ids": [1],
    }


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_names_of_the_length(lm, model, name):
    (found,) = model.generate_until(requests_of("generate_until", ("Four score and", {"until": [], name: 3})))
    assert found == lm.generate("Four score and", max_new_tokens=3).text


def test_sampling(lm, model):
    def run(harness, **options):
        requests = requests_of("generate_until", *[("Four score", {"until": [], **options})] * 3)
        return harness.generate_until(requests, disable_tqdm=True)

    greedy = run(model)
    assert len(set(greedy)) == 1 == len({*greedy, *run(model, temperature=2.0, do_sample=False)})
    sampled = run(model, temperature=2.0)
    assert len(set(sampled)) == 3  # a seed for each request
    assert run(model, temperature=2.0, do_sample=True) == sampled
    assert run(HarnessModel(lm, batch_size=3, max_gen_toks=12, seed=7), temperature=2.0) != sampled
    assert run(model, temperature=2.0, top_k=1) == greedy
    assert run(model, do_sample=True) not in (greedy, sampled)
    with pytest.raises(jaxsvd.UsageError, match=r"the task wants num_beams, but texts are made with until"):
        run(model, num_beams=4)


def test_long_contexts_leave_room_for_the_text(lm, caplog):
    model = HarnessModel(lm, max_length=20)
    options = {"until": [], "max_gen_toks": 8}
    (found,) = model.generate_until(requests_of("generate_until", (TEXT, options)))
    ids = lm.tokenizer.encode(TEXT, special=False)[-12:]
    assert found == lm.generate(ids, max_new_tokens=8).text
    assert "lose their beginning: 1" in caplog.text
    with pytest.raises(jaxsvd.UsageError, match="max_gen_toks is 20: with a max_length of 20"):
        model.generate_until(requests_of("generate_until", ("x", options | {"max_gen_toks": 20})))


# Batches.


def test_batches_are_of_one_size_and_like_lengths(lm, monkeypatch):
    seen = []
    score = lm.engine.score
    monkeypatch.setattr(lm.engine, "score", lambda rows: seen.append([len(row) for row in rows]) or score(rows))
    model = HarnessModel(lm, batch_size=2)
    pairs = [("a" * length, "b") for length in (3, 30, 5, 31, 4)]
    model.loglikelihood(requests_of("loglikelihood", *pairs), disable_tqdm=True)
    assert seen == [[33, 32], [7, 6], [5, 5]]


# Chats.


def test_chat_templates(worded, lm, model, tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(messages) == "[user] Hi\n[assistant] "
    more = [*messages, {"role": "assistant", "content": "Hello"}]
    assert model.apply_chat_template(more, add_generation_prompt=False) == "[user] Hi\n[assistant] Hello"
    assert "message" in model.chat_template(True) and model.chat_template(False) is None
    assert "/" not in model.tokenizer_name and worded[0].name in model.tokenizer_name
    assert model.tok_encode("<s>Hi") == model.tok_encode("Hi") == [0, *model.tok_encode("Hi", add_special_tokens=False)]
    with pytest.raises(jaxsvd.UsageError, match="no chat template 'tools'"):
        model.chat_template("tools")
    plain = copy_model(worded[0], tmp_path / "plain")
    write_tokenizer(plain, template=None)
    without = HarnessModel(str(plain))
    assert without.chat_template(True) is None
    with pytest.raises(jaxsvd.UsageError, match="no chat template"):
        without.apply_chat_template(messages)


# Arguments.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float32"}, "loaded already"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_length": 513}, "room for 512"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_gen_toks": -1}, "max_gen_toks is -1"),
    ],
    ids=str,
)
def test_bad_arguments(lm, options, message):
    with pytest.raises(jaxsvd.UsageError, match=message):
        HarnessModel(lm, **options)


def test_the_device_is_not_the_harness_s_to_choose(lm, caplog):
    with caplog.at_level("INFO", "jaxsvd"):
        HarnessModel(lm, device="cuda:0")  # its command line says so where there is no GPU
    assert "cuda:0 is not used: JAX chooses cpu" in caplog.text


def test_it_is_registered_beside_the_others(worded):
    assert get_model("jaxsvd") is HarnessModel
    assert get_model("dummy").__name__ == "DummyLM"
    made = HarnessModel.create_from_arg_string(
        f"pretrained={worded[0]},dtype=bfloat16,max_length=64", {"batch_size": "4", "device": None}
    )
    assert (made.model.engine.dtype.name, made.max_length, made.batch_size) == ("bfloat16", 64, 4)
    assert HarnessModel(made.model).batch_size == 8 and HarnessModel(made.model, max_batch_size=5).batch_size == 5


# Whole tasks.

QUESTIONS = [
    {"question": "Four score and", "choices": ["seven", "two", "nine hundred"], "answer": 0},
    {"question": "our fathers brought", "choices": ["forth", "back"], "answer": 1},
    {"question": "a new nation, on this", "choices": ["day", "continent", "table"], "answer": 1},
    {"question": "years", "choices": ["ago", "later"], "answer": 0},
]


def task(name, file, tmp_path, kind, **config):
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": kind,
        **config,
    }


def run_tasks(model, tmp_path, *tasks, **options):
    return lm_eval.simple_evaluate(model, tasks=list(tasks), bootstrap_iters=0, **options)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), "utf-8")
    return path


def test_whole_tasks(worded, lm, model, file, tmp_path):
    choice = task(
        "choice",
        file,
        tmp_path,
        "multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )
    stop = lm.generate("years", max_new_tokens=9).text[-2:]
    until = task(
        "until",
        file,
        tmp_path,
        "generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": [stop], "max_gen_toks": 9},
        metric_list=[{"metric": "exact_match"}],
    )
    rolling = task(
        "rolling",
        file,
        tmp_path,
        "loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )
    found = run_tasks(model, tmp_path, choice, until, rolling)
    right = []
    for doc, sample in zip(QUESTIONS, found["samples"]["choice"], strict=True):
        expected = [
            likelihood(worded, lm, f"{doc['question']} {choice}", len(choice) + 1)[0] for choice in doc["choices"]
        ]
        got = [float(response[0][0]) for response in sample["resps"]]
        np.testing.assert_allclose(got, expected, atol=1e-3)
        right.append(int(np.argmax(expected)) == doc["answer"])
    assert found["results"]["choice"]["acc,none"] == np.mean(right)
    assert 0 < np.mean(right) < 1  # or the test would say nothing
    for doc, sample in zip(QUESTIONS, found["samples"]["until"], strict=True):
        text = lm.tokenizer.decode(generated(worded, lm.encode(doc["question"]), 9))
        assert sample["resps"][0][0] == text.split(stop)[0]
    total = sum(likelihood(worded, lm, doc["question"], len(doc["question"]))[0] for doc in QUESTIONS)
    words = sum(len(doc["question"].split()) for doc in QUESTIONS)
    size = sum(len(doc["question"]) for doc in QUESTIONS)
    assert found["results"]["rolling"]["word_perplexity,none"] == pytest.approx(np.exp(-total / words), rel=1e-3)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / np.log(2), rel=1e-4)


def test_a_task_as_a_chat(worded, lm, model, file, tmp_path):
    chat = task(
        "chat",
        file,
        tmp_path,
        "generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"until": [], "max_gen_toks": 5},
        metric_list=[{"metric": "exact_match"}],
    )
    found = run_tasks(model, tmp_path, chat, apply_chat_template=True)
    for doc, sample in zip(QUESTIONS, found["samples"]["chat"], strict=True):
        ids = lm.encode(f"[user] {doc['question']}\n[assistant] ")
        assert sample["resps"][0][0] == lm.tokenizer.decode(generated(worded, ids, 5))
