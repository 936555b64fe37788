"""feedback.py: the gradients of GRPO and DPO against their formulas, random rewards, runs that go on."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import quiz_table

import config
import feedback
import runs
import train
from model import Llama, LlamaConfig
from prepare import chat, quiz, tokenizer
from prepare.windows import Continuations, stack

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a quiz of few words and a model that knows nothing of it."""
    folder = tmp_path_factory.mktemp("feedback")
    words = ["left", "right", "where?"]
    tok = quiz.with_template(tokenizer.char("".join(words) + " \n", ("<s>", "</s>")))
    data = folder / "data"
    data.mkdir()
    for split, count in ("train", 24), ("val", 8):
        lines = [{"messages": [{"role": "user", "content": f"{word} where?"}, {"role": "assistant", "content": word}],
                  "wrong": [other]} for word, other in [words[:2], words[1::-1]] * (count // 2)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tok.save(data)
    llama = Llama(LlamaConfig(vocab_size=tok.vocab_size, n_layer=1, n_head=2, dim=16, ffn_dim=32, context=64,
                              eos_ids=tuple(tok.stop_ids)))
    llama.save_pretrained(folder / "start")
    tok.save(folder / "start")
    return folder


def settings(place, out, **more):
    given = dict(dataset=str(place / "data"), init_from=str(place / "start"), out_dir=str(out), batch_size=4, group=4,
                 max_iters=4, eval_interval=2, answer_tokens=8, eval_questions=8, optimizer="adamw",
                 learning_rate=1e-3, warmup_iters=1, dtype="float32", device="cpu", log_interval=1)
    return feedback.FeedbackConfig(**given | more)


def test_policy_gradient_is_that_of_the_formula():
    """The sum over answers of weight times log-probability, each answer in a row of its own, with all logits in
    float64; ours have answers to one prompt in one row."""
    torch.manual_seed(1)
    for more in ({}, dict(arch="llama4", chunk=4, nope_every=2)):
        cfg = LlamaConfig(vocab_size=19, n_layer=2, n_head=2, dim=16, ffn_dim=32, context=16, **more)
        llama, weights = Llama(cfg).double(), torch.tensor([0.5, -0.25, 0.0, 1.0], dtype=torch.float64)
        prompts, answers = [[3, 1, 4, 1, 5], [9, 2]], [[[6, 5, 3], [5], [8, 9, 7, 9]], [[3, 2]]]
        rows = [Continuations(), Continuations()]
        for row, prompt, to_it in zip(rows, prompts, answers):
            row.add(prompt, to_it)
        arrays = [torch.from_numpy(a) for a in stack(rows)]
        feedback.Answers(llama, feedback.policy_loss)(*arrays, weights)[1].backward()
        found = {name: p.grad.clone() for name, p in llama.named_parameters()}
        llama.zero_grad()
        pairs = [(prompt, answer) for prompt, to_it in zip(prompts, answers) for answer in to_it]
        for weight, (prompt, answer) in zip(weights, pairs):
            log_p = llama(torch.tensor([prompt + answer]))[0][0].log_softmax(-1)
            picked = log_p[torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]
            (-weight * picked.sum()).backward()
        for name, p in llama.named_parameters():
            assert torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-7), name


def test_preference_is_dpo():
    """Rafailov et al., equation 7, for numbers by hand: log-ratios 0.3 and -0.1, beta 0.5."""
    margins, loss = feedback.preference(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-1.3], [-1.9]]), 0.5)
    assert margins.item() == pytest.approx(0.5 * 0.4) and loss.item() == pytest.approx(-F.logsigmoid(
        torch.tensor(0.2)).item())


def test_advantages(place, tmp_path, monkeypatch):
    """A reward counts beside the mean of its group; where all earn the same, nothing is learned, but tokens count."""
    task = feedback.Rewards(settings(place, tmp_path / "run"), {}, tmp_path / "run", CPU)
    left, right = task.questions[:2]
    ids = {word: task.ids_of(left, word) for word in ("left", "right")}
    monkeypatch.setattr(task, "answer", lambda prompts, **how: [ids["left"]] * 3 + [ids["right"]] + [ids["left"]] * 4)
    count, (idx, _, source, target, sizes, weights) = task.micro_batch([left, right], 0)
    assert count == 7 * len(ids["left"]) + len(ids["right"]) and len(idx) == 4  # the second group is all wrong
    assert (weights * count).tolist() == pytest.approx([0.25, 0.25, 0.25, -0.75])
    assert target.tolist() == ids["left"] * 3 + ids["right"] and len(sizes) == 4
    prompt = task.prompt(left)
    assert idx[0, :len(prompt)].tolist() == prompt and source[0] == len(prompt) - 1
    assert len(task.rows([9 * prompt], [ids.values()])) == 1  # a long prompt is there once, a short one for each answer
    assert len(task.rows([prompt], [ids.values()])) == 2
    zero = feedback.Rewards(settings(place, tmp_path / "zero", baseline="zero"), {}, tmp_path / "zero", CPU)
    monkeypatch.setattr(zero, "answer", task.answer)
    assert len(zero.micro_batch([left, right], 0)[1][-1]) == 3  # right answers alone
    monkeypatch.setattr(zero, "answer", lambda prompts, **how: [ids["right"]] * 4 + [ids["left"]] * 4)
    _, (*_, sizes, weights) = zero.micro_batch([left, right], 0)
    assert len(sizes) == 1 and not weights.any()  # nothing to learn, but all processes take the step


def test_answers_come_from_the_model_as_it_is(place, tmp_path):
    """On policy: a step's answers are drawn after the step before it, and depend on seed and step alone."""
    task = feedback.Rewards(settings(place, tmp_path / "run"), {}, tmp_path / "run", CPU)
    prompts = [task.prompt(q) for q in task.questions[:3]]
    first, again = (task.answer(prompts, 1.0, seed=5) for _ in range(2))
    assert first == again != task.answer(prompts, 1.0, seed=6)
    with torch.no_grad():
        task.llama.lm_head.weight.add_(torch.randn_like(task.llama.lm_head.weight))
    assert task.answer(prompts, 1.0, seed=5) != first


@pytest.mark.parametrize("more", [{}, {"objective": "dpo"}, {"lora_rank": 2}])
def test_a_run_that_goes_on_ends_the_same(place, tmp_path, more):
    def run(out, **how):
        feedback.main({f: v for f, v in vars(settings(place, out, **more | how)).items() if f != "reference"}, {})
        return {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    whole = run(tmp_path / "whole")
    run(tmp_path / "halves", max_iters=2, schedule="wsd", decay_frac=0.0)
    assert run(tmp_path / "straight", schedule="wsd", decay_frac=0.0) == run(
        tmp_path / "halves", init_from="resume", schedule="wsd", decay_frac=0.0)
    log = runs.read_log(tmp_path / "whole/log.jsonl")
    assert whole and "val_accuracy" in log[-1]


@pytest.mark.slow
def test_right_rewards_teach_and_random_ones_do_not(place, tmp_path):
    """The word to answer with stands in the question, one of two: with rewards it is found, at random it is not."""
    tok, data = tokenizer.load(place / "start"), json.loads((place / "data/train.jsonl").read_text().splitlines()[0])
    llama = Llama.from_pretrained(place / "start")
    optimizer = torch.optim.AdamW(llama.parameters(), lr=3e-3)
    for _ in range(200):  # it learns to say one of the two, whatever was asked
        for answer in "left", "right":
            ids, learned = tok.lesson([data["messages"][0], {"role": "assistant", "content": answer}], [False, True])
            x, y = torch.tensor([ids]), torch.tensor([[i if learn else -100 for i, learn in zip(ids, learned)]])
            llama(x[:, :-1], y[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    llama.save_pretrained(place / "half")
    tok.save(place / "half")
    accuracy = {}
    for reward in "right", "random":
        feedback.main(vars(settings(place, tmp_path / reward, reward=reward, max_iters=150, eval_interval=150,
                                    learning_rate=1e-2, init_from=str(place / "half"))), {})
        accuracy[reward] = runs.read_log(tmp_path / reward / "log.jsonl")[-1]["val_accuracy"]
    assert accuracy["right"] == 1 and accuracy["random"] <= 0.5


def test_mistakes(place, tmp_path):
    with pytest.raises(config.Mistake, match="feedback needs a model"):
        feedback.main({"dataset": str(place / "data")}, {})
    with pytest.raises(config.Mistake, match="leaves no room"):
        feedback.main(vars(settings(place, tmp_path / "run", answer_tokens=100)), {})
    with pytest.raises(config.Mistake, match="the checkpoint has n_layer=1, not 4"):
        feedback.main(vars(settings(place, tmp_path / "run")), {"n_layer": 4})
    for key in "epochs", "head_copy":
        with pytest.raises(config.Mistake, match=f"{key}.* for train.py"):
            feedback.main(vars(settings(place, tmp_path / "run")) | {key: 1.0}, {})
    with pytest.raises(config.Mistake, match="objective must be one of grpo, dpo"):
        config.load(feedback.FeedbackConfig, ["--objective=ppo"])


ASKED = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("record, found", [
    ({"wrong": None}, ("a?", "b", None)), ({"wrong": []}, ("a?", "b", None)), ({"wrong": "Rome"}, ("a?", "b", "Rome")),
    ({"wrong": ["Rome", "x"]}, ("a?", "b", "Rome")), ({"wrong": [None]}, ("a?", "b", None)),
    ({"messages": [{"role": "user", "content": "\u2028a\x85b"}, ASKED[1]]}, ("\u2028a\x85b", "b", None)),
    ({"messages": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}, ("a?", "b", None)),
    ({"messages": [ASKED[0], ASKED[1] | {"weight": 0}, {"role": "user", "content": "c?"}, ASKED[1] | {"content": "d"}],
      "wrong": ["x", "Rome"]}, ("c?", "d", "Rome")),
    ({"messages": None, "prompt": [*ASKED, {"role": "user", "content": "c?"}], "completion": "d", "wrong": "Rome"},
     ("c?", "d", "Rome")),
    ({"messages": [ASKED[0], ASKED[1] | {"weight": 0}]}, "it has no answer"),
    ({"messages": [ASKED[0], ASKED[1] | {"content": "", "tool_calls": [{"name": "f"}]}]}, "it has no answer in words"),
    ({"messages": [ASKED[0], ASKED[1] | {"tool_calls": [{"name": "f"}]}]}, "its first answer calls a tool, too"),
    ([1], "a record is an object, not"), ({"wrong": [1]}, "its wrong answer is a text"),
    ({"wrong": {"a": 1}}, "its wrong answer is a text, or a list of one to each answer"),
    ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "message 2: the assistant says nothing"),
    ({"messages": ASKED[:1]}, "it has no answer"), ({"messages": ASKED[1:]}, "nothing is asked before"),
    ({"messages": None}, "a record needs messages")])
def test_records_of_others_are_read_or_refused_in_a_line(tmp_path, record, found):
    record = {"messages": ASKED} | record if isinstance(record, dict) else record
    lines = [json.dumps(one, ensure_ascii=False) for one in ({"messages": ASKED}, record)]
    (tmp_path / "val.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if isinstance(found, str):
        with pytest.raises(config.Mistake, match=re.escape(f"val.jsonl: line 2 (record 2): {found}")):
            feedback.read_questions(tmp_path, "val")
    else:
        last = feedback.read_questions(tmp_path, "val")[1]
        assert (last.turns[-1]["content"], last.answer, last.wrong) == found


MARKED = ("{{ tools | tojson if tools }}{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{% if m.role == 'user' %}"
          "{{ m.content }}{% else %}X{{ m.content }}</s>{% endgeneration %}.{% endif %}{% endfor %}"
          "{{ 'Says: ' if add_generation_prompt }}")


@pytest.mark.parametrize("header", ["Says: {% generation %}", "Says: <think>{% generation %}",
                                    "{% generation %}Says: ", "{% generation %}says: "])
def test_prompt_and_answer_are_what_chat_py_makes_of_the_record(place, tmp_path, header):
    """With its tools and date, wherever a template's mark begins: nothing twice, nothing lost."""
    task, tok = feedback.Rewards(settings(place, tmp_path / "run"), {}, tmp_path / "run", CPU), tokenizer.byte()
    task.tok = tokenizer.Tokenizer(tok.spec, tok.settings | {"chat_template": MARKED.replace("X", header)})
    record = {"messages": ASKED, "tools": [{"name": "f"}]}
    question = feedback.question_of(record)._replace(place="line 5")
    messages, learn, tools = chat.conversation_of(record)
    ids = task.tok.lesson(messages, learn, tools, chat.Settings.date)[0]
    if "says" in header:
        with pytest.raises(config.Mistake, match="^line 5: the prompt has other ids when the answer follows"):
            task.ids_of(question, "b")
    else:
        assert task.prompt(question) + task.ids_of(question, "b") + tok.encode(".") == ids
        task.cfg.answer_tokens = 64 - len(task.prompt(question))
        task.check_room(question)
        task.cfg.answer_tokens += 1
        with pytest.raises(config.Mistake, match="^line 5: a question of .* leaves no room"):
            task.check_room(question)


def test_a_question_may_end_with_empty_lines(place, tmp_path, capsys):
    task = feedback.Rewards(settings(place, tmp_path / "run"), {}, tmp_path / "run", CPU)
    task.val = [feedback.Question([{"role": "user", "content": "left where?\n\n \n"}], "left")]
    assert task.accuracy() == 0 and "left 0.0% of 1" in capsys.readouterr().out


@pytest.mark.parametrize("script, keys", [(train, {}), (feedback, {"answer_tokens": 7})], ids=["train", "feedback"])
def test_an_evaluation_is_on_the_data_of_the_run(place, tmp_path, capsys, script, keys):
    """Its data set and the length of its answers; keys that are given win; what else the run had does not count."""
    run, other, kept = tmp_path / "run", tmp_path / "other", {"dataset": str(place / "data")} | keys
    llama, tok = Llama.from_pretrained(place / "start"), tokenizer.load(place / "start")
    llama.save_pretrained(run)
    tok.save(run)
    cfg = script.TrainConfig(**kept, whole_docs=True) if script == train else script.FeedbackConfig(**kept)
    (run / "run.json").write_text(json.dumps({"settings": vars(cfg), "model": vars(llama.config)}))
    shutil.copytree(place / "data", other)
    (other / "val.jsonl").write_text((place / "data/train.jsonl").read_text())
    for given, count, folder in ({}, 8, place / "data"), ({"dataset": str(other), "answer_tokens": 5}, 24, other):
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feedback.Rewards, "accuracy", lambda self: seen.append(self.cfg.answer_tokens) or 0.5)
            feedback.main({"eval_only": True, "init_from": str(run), "device": "cpu"} | given, {})
        said = f"val accuracy 0.5000 of {count} questions of {folder}, by {run}"
        assert capsys.readouterr().out.splitlines()[-1] == said
        assert seen == [(keys | given).get("answer_tokens", 16)]


def test_what_is_known_is_what_greedy_decoding_says(place, tmp_path):
    """For models that know nothing, some answers and all: decoding and grading find the same ones right."""
    task = feedback.Rewards(settings(place, tmp_path / "run"), {}, tmp_path / "run", CPU)
    optimizer, shares = torch.optim.AdamW(task.llama.parameters(), lr=1e-2), set()
    for _ in range(60):
        texts = [task.text(ids) for ids in task.answer([task.prompt(q) for q in task.val], temperature=0)]
        right = [feedback.grade(text, q.answer) for text, q in zip(texts, task.val)]
        assert task.knows(task.val).tolist() == right
        shares.add(sum(right) / len(right))
        arrays = stack(task.rows(map(task.prompt, task.val), ([task.ids_of(q, q.answer)] for q in task.val)))
        task.llama.losses(*map(torch.from_numpy, arrays[:4])).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {0, 1} < shares


def test_the_reference_model_is_the_one_that_is_named(place, tmp_path):
    """From the first step on, not only once a run goes on."""
    other = Llama.from_pretrained(place / "start")
    with torch.no_grad():
        other.lm_head.weight.add_(torch.randn_like(other.lm_head.weight))
    other.save_pretrained(tmp_path / "other")
    tokenizer.load(place / "start").save(tmp_path / "other")
    cfg = settings(place, tmp_path / "run", objective="dpo", reference=str(tmp_path / "other"))
    task = feedback.Preferences(cfg, {}, tmp_path / "run", CPU)
    assert torch.equal(task.frozen.llama.lm_head.weight, other.lm_head.weight)
    assert torch.equal(task.llama.lm_head.weight, Llama.from_pretrained(place / "start").lm_head.weight)


def test_a_run_with_an_adapter_goes_on_with_the_same_reference(place, tmp_path, monkeypatch):
    """Its weights are those that the adapter froze, in bfloat16 where they were."""
    monkeypatch.setattr(feedback.common, "agreed_dtype", lambda *_: (torch.bfloat16, "asked"))
    cfg = settings(place, tmp_path / "run", objective="dpo", lora_rank=2, max_iters=2, dtype="bfloat16")
    feedback.main(vars(cfg), {})
    states = []
    for start in "", "resume":
        given = vars(cfg) | {"reference": str(place / "start")} | ({"init_from": start} if start else {})
        task = feedback.Preferences(feedback.FeedbackConfig(**given), {}, tmp_path / "run", CPU)
        states.append({k.replace(".base_layer", ""): t for k, t in task.frozen.llama.state_dict().items()
                       if "lora" not in k})
    assert states[0].keys() == states[1].keys() and states[1]["lm_head.weight"].dtype == torch.bfloat16
    assert all(torch.equal(t, states[1][k]) and t.dtype == states[1][k].dtype for k, t in states[0].items())


def test_pairs_that_are_equal_and_answers_that_are_too_long_are_said(place, tmp_path, capsys):
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data/val.jsonl"
    path.write_text(path.read_text().replace('["left"]', '["right "]'))
    with pytest.raises(config.Mistake, match=r"line 2 \(record 2\): the wrong answer is the right one"):
        feedback.main(vars(settings(place, tmp_path / "run", dataset=str(tmp_path / "data"), objective="dpo")), {})
    feedback.main(vars(settings(place, tmp_path / "short", answer_tokens=5, max_iters=1)), {})
    assert "12 of 24 are longer than answer_tokens=5, and earn no reward" in capsys.readouterr().out  # r i g h t </s>


def test_other_questions_are_noticed_when_a_run_goes_on(place, tmp_path, capsys):
    shutil.copytree(place / "data", tmp_path / "data")
    given = vars(settings(place, tmp_path / "run", dataset=str(tmp_path / "data"), max_iters=2))
    feedback.main(given, {})
    for split in "train", "val":
        path = tmp_path / f"data/{split}.jsonl"
        path.write_text(path.read_text().replace("where?", "where ?"))
    capsys.readouterr()
    feedback.main(given | {"init_from": "resume", "max_iters": 3}, {})
    said = capsys.readouterr().out
    assert "with another validation set" in said and "with other training data" in said


def test_a_process_without_questions_knows_none(place, tmp_path):
    assert feedback.Rewards(settings(place, tmp_path / "run"), {}, tmp_path / "run", CPU).knows([]).tolist() == []


def test_a_run_that_stopped_is_evaluated(place, tmp_path, capsys):
    feedback.main(vars(settings(place, tmp_path / "run", max_iters=2)), {})
    feedback.main({"init_from": "resume", "eval_only": True, "out_dir": str(tmp_path / "run")}, {})
    assert "val accuracy" in capsys.readouterr().out.splitlines()[-1]


def test_eval_only_answers_all_validation_questions(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(feedback.Rewards, "knows", lambda self, asked: np.array([q.answer == "left" for q in asked]))
    feedback.main(vars(settings(place, tmp_path / "run", eval_only=True, eval_questions=2)), {})
    said = capsys.readouterr().out
    assert "val accuracy 0.5000 of 8" in said and "left 100.0% of 4, right 0.0% of 4" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("objective, part", [("grpo", "asked"), ("dpo", "asked"), ("dpo", "answer"), ("dpo", "wrong")])
def test_what_is_beyond_the_context_is_named_before_the_first_step(place, tmp_path, objective, part, split):
    """A question that is never drawn is no obstacle."""
    shutil.copytree(place / "data", tmp_path / "data")
    path, long = tmp_path / f"data/{split}.jsonl", "left " * 14
    records = [json.loads(line) for line in path.read_text().splitlines()]
    asked, answer = records[5]["messages"]
    {"asked": asked, "answer": answer, "wrong": records[5]}[part]["wrong" if part == "wrong" else "content"] = long
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    more = dict(dataset=str(tmp_path / "data"), objective=objective, max_iters=6)
    with pytest.raises(config.Mistake, match=rf"{split}.jsonl: line 6 \(record 6\): a question of .* leaves no room"):
        feedback.main(vars(settings(place, tmp_path / "run", **more)), {})
    assert not (tmp_path / "run").exists()
    seed = next(seed for seed in range(99) if 5 not in feedback.order(seed, 0, 24)[:4])
    keys = {"eval_questions": 2} if split == "val" else {"seed": seed}
    feedback.main(vars(settings(place, tmp_path / "run", **more | {"max_iters": 1} | keys)), {})


def test_a_question_may_fill_the_context(place, tmp_path):
    task = feedback.Rewards(settings(place, tmp_path / "run"), {}, tmp_path / "run", CPU)
    room = 64 - max(len(task.prompt(q)) for q in (*task.questions, *task.val))
    feedback.Rewards(settings(place, tmp_path / "run", answer_tokens=room), {}, tmp_path / "run", CPU)
    with pytest.raises(config.Mistake, match=f"leaves no room for {room + 1} more in the model's context=64"):
        feedback.Rewards(settings(place, tmp_path / "run", answer_tokens=room + 1), {}, tmp_path / "run", CPU)


def test_config_json_says_what_ends_an_answer(place, tmp_path):
    llama, tok = Llama.from_pretrained(place / "start"), tokenizer.load(place / "start")
    llama.config.eos_ids = ()
    llama.save_pretrained(tmp_path / "start")
    tok.save(tmp_path / "start")
    feedback.main(vars(settings(place, tmp_path / "run", max_iters=1, init_from=str(tmp_path / "start"))), {})
    assert Llama.from_pretrained(tmp_path / "run").config.eos_ids == tuple(tok.stop_ids)


@pytest.mark.parametrize("script, keys", [("train.py", feedback.KEYS), ("vlm.py", feedback.KEYS),
                                          ("vlm.py", train.KEYS), ("feedback.py", train.KEYS)])
def test_a_run_goes_on_with_its_own_script(tmp_path, script, keys):
    given = {"init_from": "resume", "out_dir": str(tmp_path)}
    for command in [f"some/{script}"], [keys.partition(":")[0]], ["mine.py"], []:
        (tmp_path / "run.json").write_text(json.dumps({"command": command, "settings": {}, "model": {}}))
        if script in str(command):
            with pytest.raises(config.Mistake, match=f"is a run of {script}"):
                train.with_run(given, {}, keys)
        else:
            assert train.with_run(given, {}, keys) == (given, {})


def test_rows_of_the_quiz_table_follow_each_other(tmp_path, monkeypatch):
    """Every command is one that its script takes; what a row needs is made before it, once, and nothing again."""
    trained = []

    def python(script, *words):
        keys = {"train.py": train.TrainConfig, "feedback.py": feedback.FeedbackConfig}[script]
        cfg, _ = config.load(keys, list(words), "model.py:LlamaConfig")
        if not cfg.eval_only:
            trained.append(cfg.out_dir.rsplit("/")[-1])
            out = tmp_path / trained[-1]
            assert str(cfg.init_from) == "out/tales" or runs.read_log(tmp_path / cfg.init_from / "log.jsonl")
            out.mkdir()
            (out / "run.json").write_text(json.dumps({"settings": vars(cfg)}))
            lines = [{"step": cfg.max_iters, "seconds": 60.0, "train_loss": 1.0}, {"step": cfg.max_iters}]
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return "val accuracy 0.5000 of 10,000 questions\n"
    monkeypatch.setattr(quiz_table, "python", python)
    monkeypatch.setattr(quiz_table, "OUT", tmp_path)
    found = quiz_table.measure("more", ())
    assert quiz_table.table({"more": found}).endswith("| 110 | 60 | 50.0 ± 0.5 |\n")
    assert trained == ["begin", "half", "grpo", "more"]
    found = {name: quiz_table.measure(name, ()) | {"share": 0.9 + 0.01 * (name == "grpo3")} for name in quiz_table.ROWS}
    assert sorted(trained) == sorted(quiz_table.ROWS)
    assert "| 90.3 ± 0.6, 3 seeds |" in quiz_table.table(found)


def test_readme_says_what_the_quiz_table_found():
    kept = json.loads(quiz_table.KEPT.read_text())
    marks = quiz_table.MARKS
    text = (config.ROOT / "README.md").read_text(encoding="utf-8")
    assert text.partition(marks[0])[2].partition(marks[1])[0] == quiz_table.readme(kept)
    assert list(kept["rows"]) == list(quiz_table.ROWS)
