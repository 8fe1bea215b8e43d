"""The paper's benchmarks: the harness runs the task files, with scores worked out by hand and prompts cut right."""

import importlib
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

EXAMPLES = Path(__file__).parents[2] / "examples"
FIXTURES = Path(__file__).parents[1] / "fixtures"
PAPER_TASKS = [f"{task}/{path.stem}" for task in ("lv_eval", "infinite_bench")
               for path in sorted((EXAMPLES / "lm_eval_tasks" / task).glob("*_*.yaml")) if path.stem != f"{task}_paper"
               and path.stem != task]  # fmt: skip
DRY = ["--random-weights", "--data", str(FIXTURES), "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def examples_import_one_another(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(scope="module")
def lv():
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "lm_eval_tasks" / "lv_eval" / "utils.py")))


@pytest.fixture(scope="module")
def infinite():
    folder = EXAMPLES / "lm_eval_tasks" / "infinite_bench"
    return SimpleNamespace(**(runpy.run_path(str(folder / "utils.py")) | runpy.run_path(str(folder / "answers.py"))))


def evaluate(task, answer, limit=None):
    """Scores and prompts of a task whose prompts are answered by a function of the record."""
    import lm_eval
    from lm_eval.api.model import LM

    prompts = []

    class Told(LM):
        def generate_until(self, requests, disable_tqdm=False):
            prompts.extend(request.args[0] for request in requests)
            return [answer(request.doc) for request in requests]

        def loglikelihood(self, requests):
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    tasks = {"tasks": {task.config.task: task}, "groups": {}, "group_map": {}}
    out = lm_eval.evaluate(Told(), tasks, limit=limit, bootstrap_iters=0, verbosity="ERROR")
    (samples,) = out["samples"].values()
    return out["results"][task.config.task]["score,none"], [u["score"] for u in samples], prompts


def right_answer(doc):
    """What a model would say that knows everything, in the form that the score asks for."""
    if "answers" in doc:
        return doc["answers"][0]
    if doc["options"]:
        return f"{'ABCD'[doc['options'].index(doc['answer'][0])]}. {doc['answer'][0]}"
    return ", ".join(doc["answer"]) if len(doc["answer"]) > 5 else doc["answer"][0]


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_right_answers_score_one_and_wrong_ones_nothing(name):
    harness = importlib.import_module("harness")
    task = name.split("/")[1]
    loaded = harness.load_task(task, {"data": str(FIXTURES)})
    mean, scores, prompts = evaluate(loaded, right_answer)
    assert len(scores) == len(prompts) >= 2
    assert scores == pytest.approx([1.0] * len(scores), abs=1e-6) and mean == pytest.approx(1.0, abs=1e-6)
    assert all("{" not in prompt.replace(doc["context"], "") for prompt, doc in zip(prompts, docs(loaded), strict=True))
    assert all(doc["context"] in prompt for prompt, doc in zip(prompts, docs(loaded), strict=True))
    for wrong in ("", "Z. nobody", "没有人", "00000"):
        assert evaluate(loaded, lambda _, wrong=wrong: wrong)[1] == [0.0] * len(scores)
    half = iter([right_answer(docs(loaded)[0])])
    assert evaluate(loaded, lambda _: next(half, ""), limit=2)[0] == pytest.approx(0.5, abs=1e-6)


def docs(task):
    return list(task.test_docs())


def test_every_task_of_the_two_benchmarks_is_there():
    from protocols import PROTOCOLS

    ours = {name.split("/")[1] for name in PAPER_TASKS}
    listed = [PROTOCOLS[u].files for u in ("lv_eval", "infinite_bench", "infinite_bench_all")]
    assert ours == set().union(*listed) and [len(u) for u in listed] == [11, 2, 12]
    for folder, files in zip(("lv_eval", "infinite_bench", "infinite_bench"), listed, strict=True):
        assert all((FIXTURES / folder / f"{file}.jsonl").exists() for file in files.values())


# F1 = 2 shared / (words of the answer + words of the target); articles and punctuation are no words
@pytest.mark.parametrize("answer, target, keywords, score", [
    ("The clockmaker, in Autumn!", "the clockmaker repaired it in autumn", None, 2 * 3 / (3 + 5)),
    ("clockmaker", "clockmaker", "Ilse Varn", 0.0),  # no keyword
    ("Ilse lives here", "Ilse Varn repaired it", "Ilse Varn from the old tower", 2 * 1 / (3 + 4)),  # 1 of 5 is enough
    ("Ilse lives here", "Ilse Varn repaired it", "Ilse Varn from that old big tower", 0.0),  # 1 of 7 is not
    ("it is from", "it is from Ilse", "from it", 0.0),  # common words recall nothing
    ("from Ilse", "from Ilse Varn", "from it Ilse that", 2 * 2 / (2 + 3)),  # 1 of 4, though two are shared
])  # fmt: skip
def test_scores_of_lv_eval_in_english(answer, target, keywords, score, lv):
    doc = {"answers": [target, answer], "answer_keywords": keywords}  # only the first answer counts
    assert lv.english_keywords(doc, [answer])["score"] == pytest.approx(score)
    if keywords is None:
        assert lv.english(doc, [answer])["score"] == pytest.approx(score)


# jieba cuts 蓝色/玻璃, 四十/箱/蓝色/玻璃, 渡船/运/的/是/玻璃
@pytest.mark.parametrize("answer, target, keywords, score", [
    ("蓝色玻璃。", "四十箱蓝色玻璃", None, 2 * 2 / (2 + 4)),  # the target's own words: 2 of 4 recalled
    ("玻璃", "四十箱蓝色玻璃", None, 0.0),  # 1 of 4 is less than 0.4
    ("玻璃", "四十箱蓝色玻璃", "蓝色玻璃", 2 * 1 / (1 + 4)),  # 1 of 2
    ("是的", "渡船运的是玻璃", "是的", 0.0),  # common words
])  # fmt: skip
def test_scores_of_lv_eval_in_chinese(answer, target, keywords, score, lv):
    doc = {"answers": [target], "answer_keywords": keywords}
    assert lv.chinese_keywords(doc, [answer])["score"] == pytest.approx(score)


def test_rouge_of_lv_eval_leaves_common_words_out(lv):
    doc = {"answers": ["渡船运的是玻璃"]}  # 渡船 运 玻璃
    assert lv.chinese_rouge(doc, ["玻璃"])["score"] == pytest.approx(2 * (1 / 1) * (1 / 3) / (1 + 1 / 3), abs=1e-6)
    assert lv.chinese_rouge(doc, ["的是"])["score"] == lv.chinese_rouge(doc, [""])["score"] == 0.0


OPTIONS = {"answer": ["wind_clock"], "options": ["count_jars", "wind_clock", "light_lamp", "paint_slate"]}


@pytest.mark.parametrize("score, doc, answer, value", [
    ("first_number", {"answer": ["71432"]}, "The pass key is 71432, not 5.", 1),
    ("first_number", {"answer": ["71432"]}, "5 or 71432", 0),
    ("first_number", {"answer": ["08815"]}, "8815", 0),
    ("word", {"answer": ["c14c-8a"]}, 'The value is "c14c-8a".', 1),
    ("word", {"answer": ["c14c-8a"]}, "c14c-8a9", 0),
    ("name", {"answer": ["ILSE", "ILSE VARN"]}, "It is Ilse.", 1),
    ("name", {"answer": ["ILSE", "ILSE VARN"]}, "Ilsebill", 0),
    ("last_number", {"answer": ["-12"]}, "The value is: -12.", 1),
    ("last_number", {"answer": ["-12"]}, "-12 is the value", 0),
    ("found_number", {"answer": ["4.0"]}, "The median is 4", 1),
    ("found_number", {"answer": ["88"]}, "7, then 88", 0),
    ("leading_numbers", {"answer": ["1", "4", "8", "6"]}, "[1, 4, 9, 6]", 0.5),
    ("leading_numbers", {"answer": ["1", "-4"]}, "[1, -4]", 0.5),  # signs are not read
    ("choice", OPTIONS, "B", 1), ("choice", OPTIONS, "wind_clock", 1), ("choice", OPTIONS, "I think (B) B", 1),
    ("choice", OPTIONS, "The answer is B", 1), ("choice", OPTIONS, "C, or B", 0), ("choice", OPTIONS, "answer is", 0),
    ("faulty_function", OPTIONS, "B. wind_clock", 1), ("faulty_function", OPTIONS, "The answer is: wind_clock", 1),
    ("faulty_function", OPTIONS, "B", 0), ("faulty_function", OPTIONS, "The answer is: A. count_jars", 0),
    ("english_f1", {"answer": ["no", "blue glass"]}, "Forty crates of blue glass", 2 * 2 / (5 + 2)),
    ("chinese_f1", {"answer": ["蓝色玻璃"]}, "玻璃。", 2 * 2 / (2 + 4)),  # characters
    ("paper_rouge_english", {"answer": ["no", "blue glass"]}, "blue glass\n\nQuestion: what else?", 1),
    ("paper_rouge_english", {"answer": ["forty crates of blue glass"]}, "glass of forty", 2 / 15 / (8 / 15)),
    ("paper_rouge_chinese", {"answer": ["蓝色玻璃"]}, "玻璃", 2 * (1 / 1) * (1 / 2) / (3 / 2)),
    # ROUGE-Lsum by lines: "one two" and "three" are found, two of three words and one of two: P = 3/4, R = 3/5
    ("summary", {"answer": ["one two four\nthree five"]}, "one two\nthree six", 2 * 0.75 * 0.6 / 1.35),
])  # fmt: skip
def test_scores_of_infinite_bench(score, doc, answer, value, infinite):
    assert getattr(infinite, score)(doc, [answer])["score"] == pytest.approx(value, abs=1e-6)


def test_prompts_are_those_of_the_benchmarks(infinite):
    harness = importlib.import_module("harness")
    record = json.loads((FIXTURES / "lv_eval" / "cmrc_mixup_128k.jsonl").read_text(encoding="utf-8").split("\n")[0])
    task = harness.load_task("lv_eval_cmrc_mixup", {"data": str(FIXTURES)})
    rule = "，问题和答案只与其中一篇文章有关。\n\n"  # noqa: RUF001
    assert task.doc_to_text(docs(task)[0]) == (
        f"请根据下面给定的文章回答问题{rule}文章：{record['context']}\n\n"  # noqa: RUF001
        f"现在请基于上述文章回答下面的问题{rule}问题：{record['input']}\n回答："  # noqa: RUF001
    )
    task = harness.load_task("infinite_bench_paper_qa_eng", {"data": str(FIXTURES)})
    (doc, *_) = docs(task)
    asked = f"Read the book below and answer a question.\n\n{doc['context']}\n\nQuestion: {doc['input']}"
    assert task.doc_to_text(doc) == f"{asked}\n\nBe very concise."
    assert [task.config.generation_kwargs[u] for u in ("max_gen_toks", "do_sample", "until")] == [256, False, []]
    prompt = infinite.code_run_prompt({"input": "the value of func_9(-2).", "context": "..."})
    assert prompt.startswith("There is a function called func_9 in") and prompt.endswith("The value of func_9(-2) is")
    prompt = infinite.math_find_prompt({"input": "The second largest number of the list is:", "context": "[1, 2]"})
    assert prompt.startswith("What is the second largest number in the following list?\n\n[1, 2]")
    for make in (infinite.code_run_prompt, infinite.math_find_prompt):
        with pytest.raises(ValueError, match="expected a"):
            make({"input": "What?", "context": ""})


def test_records_come_from_a_folder_or_from_the_hub(lv, tmp_path, monkeypatch):
    import zipfile

    import huggingface_hub

    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with zipfile.ZipFile(tmp_path / "cmrc_mixup.zip", "w") as packed:
        for level in ("16k", "128k"):
            packed.writestr(
                f"cmrc_mixup/cmrc_mixup_{level}.jsonl", json.dumps({"input": level, "context": "", "answers": []})
            )
    assert lv.records("cmrc_mixup")["test"]["input"] == ["128k"]
    assert lv.records("cmrc_mixup", level="16k")["test"]["input"] == ["16k"]
    assert asked == [("infini-ai/LVEval", "cmrc_mixup.zip", "dataset")] * 2
    with pytest.raises(FileNotFoundError, match=r"has no cmrc_mixup_64k\.jsonl"):
        lv.records("cmrc_mixup", level="64k")
    with pytest.raises(FileNotFoundError, match="no such file"):
        lv.records("cmrc_mixup", data=str(tmp_path))


def test_prompts_are_cut_where_a_benchmark_cuts_them():
    from _chat import SMALL, random_model
    from harness import CutPrompts
    from protocols import Protocol
    from transformers import LlamaConfig

    model, tokenizer = random_model(LlamaConfig(**SMALL))  # one token for each byte
    text = "".join(chr(97 + i % 26) for i in range(60))

    def cut(how, longest):
        harness = CutPrompts(model, tokenizer, Protocol("", {}, longest, how), new_tokens=7, chat=True)
        prompt = harness.apply_chat_template([{"role": "user", "content": text}])
        assert harness.was_cut == (longest < 60)
        return re.fullmatch(r"<s>\[user\] (\w*)</s>\[assistant\] ", prompt)[1]

    assert cut("middle", 60) == cut("beginning", 60) == text
    assert cut("middle", 21) == text[:10] + text[-10:]
    assert cut("beginning", 21) == text[-14:]  # room for the answer


def test_the_command_runs_saves_and_goes_on(tmp_path, capsys):
    paper = importlib.import_module("paper")
    command = [*DRY, "--window", "112", "--sinks", "16", "--output", str(tmp_path / "out"), "--limit", "1"]
    tasks = ["infinite_bench_math_find", "infinite_bench_code_run"]
    results = paper.main([*command, "--tasks", *tasks])
    assert [list(results["scores"][task]) for task in tasks] == [["full", "window", "memory"]] * 2
    found = results["scores"]["infinite_bench_math_find"]["memory"]
    assert found["prompts"] == 1 and found["window"] == [112, 16] and not found["chat"] and found["longest"] > 128
    assert results["settings"]["sink_positions"] == "absolute" and "untrained" in results["memory"]
    answers = (tmp_path / "out" / "answers" / "infinite_bench_math_find-full.jsonl").read_text().splitlines()
    assert set(json.loads(answers[0])) == {"prompt", "answer", "wanted", "score"}
    written = (tmp_path / "out" / "results.md").read_text()
    assert re.search(r"\| infinite_bench_code_run( \| [\d.]+){3} \| 1 \| [\d,]+ \| 0 \|", written)
    assert "**mean of 2 tasks**" in written and json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert "[6/6] infinite_bench_code_run, memory" in capsys.readouterr().out
    again = paper.main([*command, "--tasks", *tasks])
    assert again == results and "[1/" not in capsys.readouterr().out  # nothing is left to do
    with pytest.raises(SystemExit) as ended:
        paper.main([*command, "--tasks", *tasks, "--window", "96"])
    assert ended.value.code == 2 and "results of other settings (window)" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    (["--tasks", "nothing"], "--tasks nothing: expected lv_eval, "),
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--data", "."], "none of the folders lv_eval, infinite_bench, longbench"),
    (["--data", ".", "--tasks", "lv_eval_cmrc_mixup"], "no file lv_eval/cmrc_mixup_128k.jsonl"),
    (["--output", __file__], "expected a folder, and this is a file"),
    (["--adapter", "nowhere"], "nowhere: no such file or folder"),
    (["--random-weights", "--tasks", "ruler"], "RULER needs a tokenizer"),
])  # fmt: skip
def test_what_is_wrong_is_said_before_a_model_loads(options, message, tmp_path, monkeypatch, capsys):
    paper = importlib.import_module("paper")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper, "load", lambda _: pytest.fail("a model is loaded"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: {}["no network"])
    with pytest.raises(SystemExit) as ended:
        paper.main(["--output", "out", *options])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(said) == 1 and message in said[0]


def test_longbench_and_ruler_are_those_of_the_harness(monkeypatch):
    from harness import load_task
    from protocols import PROTOCOLS

    protocol = PROTOCOLS["longbench"]
    assert (protocol.window_size, protocol.longest, protocol.plain) == (8064, 32_000, {"longbench_triviaqa"})
    for name in ("longbench_triviaqa", "longbench_dureader"):
        task = load_task(name, {"data": str(FIXTURES)}, protocol.spec(name, FIXTURES))
        mean, scores, _ = evaluate(task, right_answer)
        assert mean == pytest.approx(1.0, abs=1e-6) and len(scores) == 2
        assert evaluate(task, lambda _: "nobody")[0] == 0.0
    from harness import _manager

    known = _manager(True, json.dumps({"data": str(FIXTURES)})).all_subtasks
    assert set(PROTOCOLS["ruler"].files) | set(protocol.files) <= set(known)


def test_scores_are_per_cent_with_the_error_of_their_mean(monkeypatch):
    harness = importlib.import_module("harness")
    from _chat import SMALL, random_model
    from protocols import PROTOCOLS
    from transformers import LlamaConfig

    seen = []

    def answer(self, requests, disable_tqdm=False):
        seen.extend(request.args[0] for request in requests)
        return [right_answer(requests[0].doc), *[""] * (len(requests) - 1)]  # the first one is right

    monkeypatch.setattr(harness.HFLM, "generate_until", answer)
    model, tokenizer = random_model(LlamaConfig(**SMALL))
    task = harness.load_task("lv_eval_factrecall_en", {"data": str(FIXTURES)})
    score = harness.run_task(task, model, tokenizer, PROTOCOLS["lv_eval"], True, None)
    assert (score.mean, score.error, score.prompts, score.was_cut) == (50.0, 50.0, 2, 0)  # sqrt(5000 / 1 / 2)
    assert [u["score"] for u in score.answers] == [100.0, 0.0] and score.answers[0]["answer"] == "Dora Quill"
    assert all(prompt.startswith("<s>[user] Please answer") for prompt in seen)
