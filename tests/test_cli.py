import io
import json

import pytest
from evaluating import copy_model, write_tokenizer

from jaxsvd import cli


def generate(*arguments):
    return cli.run("generate", [str(argument) for argument in arguments])


def test_text_goes_to_stdout_and_statistics_to_stderr(smollm, capfd):
    assert generate("--model", smollm, "-p", "What is the capital of France?", "--max-new-tokens", 16) == 0
    out, err = capfd.readouterr()
    assert out == "The capital of France is Paris.\n"
    for word in ("tokens/s", "GB/s", "loaded in", "compiled in", "first token", "peak memory", "float32"):
        assert word in err


def test_quiet_is_quiet(source, capfd):
    assert generate("--model", source, "-p", "The capital of France is", "--raw", "--max-new-tokens", 4, "-q") == 0
    out, err = capfd.readouterr()
    assert out.strip() and err == ""


def test_json_is_one_object(source, capfd, tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("Once upon a time")
    monkeypatch.setattr("sys.stdin", io.StringIO("The capital of France is"))
    arguments = ["--model", source, "-p", "-", "--prompt-file", file, "--raw", "--max-new-tokens", 5, "--json", "-q"]
    assert generate(*arguments) == 0
    answer = json.loads(capfd.readouterr().out)
    assert [result["prompt"] for result in answer["results"]] == ["The capital of France is", "Once upon a time"]
    assert all(len(result["token_ids"]) == 5 for result in answer["results"])
    assert all(result["finish_reason"] == "length" for result in answer["results"])
    assert answer["statistics"]["new_tokens"] == 10


def test_several_prompts_are_printed_whole(source, capfd):
    assert generate("--model", source, "-p", "One, two,", "-p", "A, B,", "--raw", "--max-new-tokens", 4, "-q") == 0
    out = capfd.readouterr().out
    assert out.index("=== One, two,") < out.index("=== A, B,")


def test_stop_and_sampling_options_arrive(source, capfd):
    base = ["--model", source, "-p", "One, two, three,", "--raw", "--max-new-tokens", 12, "--json", "-q"]
    texts = []
    for extra in ([], ["--temperature", 1.5, "--seed", 1], ["--temperature", 1.5, "--seed", 2]):
        assert generate(*base, *extra) == 0
        texts.append(json.loads(capfd.readouterr().out)["results"][0]["text"])
    assert len(set(texts)) == 3
    assert generate(*base, "--temperature", 1.5, "--seed", 1) == 0
    assert json.loads(capfd.readouterr().out)["results"][0]["text"] == texts[1]
    stop = texts[0][5:9]
    assert generate(*base, "--stop", stop) == 0
    assert json.loads(capfd.readouterr().out)["results"][0]["text"] == texts[0][: texts[0].index(stop)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no-such-model", "-p", "x"], "qwen3-4b"),
        (["--model", "no-such/model", "-p", "x"], "Hub can't be reached"),
        (["--model", "MODEL"], "no prompt"),
        (["--model", "MODEL", "-p", " "], "empty"),
        (["--model", "MODEL", "--prompt-file", "/no/such/file"], "can't be read"),
        (["--model", "MODEL", "-p", "x", "--top-p", "2"], "top_p"),
        (["--model", "MODEL", "-p", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["--model", "MODEL", "-p", "x", "--dtype", "int8"], "float32, bfloat16, float16"),
        (["--model", "MODEL", "-p", "x", "--backend", "abacus"], "backend"),
        (["--model", "MODEL", "-p", "x", "--max-new-tokens", "100000"], "room for"),
    ],
)
def test_bad_input_is_one_clear_message_and_exit_code_2(smollm, capfd, arguments, words):
    assert generate(*[smollm if argument == "MODEL" else argument for argument in arguments], "-q") == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and "Traceback" not in err and len(err.splitlines()) == 1


# Every option, on a tiny model.


@pytest.fixture
def answer(worded, capfd):
    """The JSON of a run on the tiny model, or on the one that is given."""

    def ask(*arguments, model=worded[0], text=("--prompt", "Four score")):
        assert generate("--model", model, *text, "--max-new-tokens", 12, *arguments, "--json", "-q") == 0
        return json.loads(capfd.readouterr().out)

    return ask


def ids_of(found):
    return found["results"][0]["token_ids"]


def test_filters_leave_the_likeliest_token(answer):
    greedy, hot = ids_of(answer("--raw")), ("--raw", "--temperature", 5, "--seed", 1)
    assert ids_of(answer(*hot)) != greedy
    for option, value in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert ids_of(answer(*hot, option, value)) == greedy, option


@pytest.mark.parametrize("option", ["--repetition-penalty", "--presence-penalty"])
def test_penalties_forbid_what_was_said(answer, option):
    greedy, found = (ids_of(answer("--raw", *extra)) for extra in ((), (option, 1000)))
    assert len(set(greedy)) < 12 == len(set(found))


def test_the_end_of_a_text_is_ignored(answer, worded, tmp_path):
    model, greedy = copy_model(worded[0], tmp_path / "model"), ids_of(answer("--raw"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": greedy[3]}), "utf-8")
    (model / "generation_config.json").unlink(missing_ok=True)
    (ended,) = answer("--raw", model=model)["results"]
    assert ended["finish_reason"] == "stop" and len(ended["token_ids"]) == greedy.index(greedy[3]) + 1
    (whole,) = answer("--raw", "--ignore-eos", model=model)["results"]
    assert (whole["finish_reason"], whole["token_ids"]) == ("length", greedy)


def test_the_chat_template_is_used_where_there_is_one(answer, worded, tmp_path, capfd):
    tokens = {option: answer(*option)["statistics"]["prompt_tokens"] for option in ((), ("--chat",), ("--raw",))}
    chat, raw = len("[user] Four score\n[assistant] "), 1 + len("Four score")  # <s>, and characters
    assert tokens == {(): chat, ("--chat",): chat, ("--raw",): raw}
    model = copy_model(worded[0], tmp_path / "model")
    write_tokenizer(model, template=None)
    assert answer(model=model)["statistics"]["prompt_tokens"] == raw
    assert generate("--model", model, "-p", "x", "--chat", "-q") == 2
    assert "template" in capfd.readouterr().err


def test_dtype_and_lengths_arrive(answer, worded, capfd):
    half, full = (answer("--raw", *extra)["statistics"] for extra in (("--dtype", "bfloat16"), ()))
    assert 2 * half["bytes_per_step"] == full["bytes_per_step"]
    assert generate("--model", worded[0], "-p", "Four score", "--raw", "--buckets", "32", "--max-length", 24) == 2
    assert "max_length is 24" in capfd.readouterr().err
    assert generate("--model", worded[0], "-p", "Four", "--raw", "--max-new-tokens", 2, "--buckets", "24/48") == 0
    assert "prefill of 24 tokens" in capfd.readouterr().err
