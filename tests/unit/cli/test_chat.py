"""Talking to saved models."""

import pytest
import torch

from llm_trainer.cli import chat
from llm_trainer.cli.chat import Speaker
from llm_trainer.cli.main import main
from llm_trainer.data.encode.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory, request):
    """Folders of a tiny model: `talks` with a chat template, `writes` without."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 48}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=512, **shape, **heads))
    tokenizers = {
        "talks": train_tokenizer(["good day to you"], 300),
        "writes": load_tokenizer(request.config.rootpath / "tests" / "reference" / "tokenizer"),
    }
    for name, tokenizer in tokenizers.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main(["chat", *map(str, arguments)])
    return exit.value.code


def test_one_answer_is_reproducible_and_short(saved, capsys):
    answers = []
    for seed in (1, 1, 2):
        assert run(saved / "talks", "--prompt", "hello", "--max-new-tokens", 8, "--temperature", 1, "--seed", seed) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_the_answer_is_what_generate_writes(saved):
    from llm_trainer.generation.sampler import generate

    speaker = Speaker(saved / "talks", system="be brief", max_new_tokens=6, temperature=0)
    said = "".join(speaker.answer("hello"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    prompt = speaker.format.encode_prompt(messages)
    stops = speaker.format.stop_token_ids()
    ids = generate(speaker.model, [prompt], max_new_tokens=6, temperature=0, pad_token_id=0, stop_token_ids=stops).ids
    whole = speaker.format.tokenizer.decode(ids[0], skip_special_tokens=True)
    assert whole.startswith(said)  # but for bytes of an unfinished character
    assert whole.removeprefix(said).strip("\ufffd") == ""
    assert speaker.turns == [messages[1], {"role": "assistant", "content": said}]


def test_a_full_context_forgets_the_oldest_turns(saved):
    speaker = Speaker(saved / "talks", max_new_tokens=4, temperature=0)
    for number in range(4):
        list(speaker.answer(f"{number} good day"))
    assert [turn["content"] for turn in speaker.turns if turn["role"] == "user"][-1] == "3 good day"
    assert len(speaker.turns) < 8


def test_plain_text_where_there_is_no_chat_template(saved, capsys):
    assert Speaker(saved / "writes", max_new_tokens=1).raw
    assert not Speaker(saved / "talks", max_new_tokens=1).raw
    assert run(saved / "talks", "--prompt", "good", "--raw", "--max-new-tokens", 4) == 0
    assert run(saved / "writes", "--prompt", "good", "--system", "be brief") == 2
    assert "--system: plain text has no system message" in capsys.readouterr().err


def test_a_folder_without_a_model_is_one_message(saved, tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_a_conversation_survives_control_c_and_ends_with_control_d(saved, monkeypatch, capsys):
    typed = iter(["hello", '"""two', 'lines"""', "", KeyboardInterrupt, "again", EOFError])
    heard = []

    def answer(self, text):
        heard.append(text)
        yield "half an ans"
        if text == "hello":
            raise KeyboardInterrupt
        yield "wer"

    def read(prompt):
        line = next(typed)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(Speaker, "answer", answer)
    monkeypatch.setattr("builtins.input", read)
    assert run(saved / "talks") == 0
    assert heard == ["hello", "two\nlines", "again"]
    shown = capsys.readouterr().out
    assert shown.count("half an answer\n") == 2
    assert "half an ans ...\n" in shown


def test_an_answer_that_was_cut_short_is_remembered_as_far_as_it_came(saved, monkeypatch):
    speaker = Speaker(saved / "talks", max_new_tokens=20, temperature=0)
    pieces = speaker.answer("hello")
    first = next(pieces)
    pieces.close()
    assert speaker.turns[-1] == {"role": "assistant", "content": first}
    assert chat.QUOTES == '"""'


def test_what_a_terminal_would_obey_is_shown(saved, monkeypatch, capsys):
    monkeypatch.setattr(Speaker, "answer", lambda self, text: iter(["hi \x1b", "[2J\x07", " there\n"]))
    assert run(saved / "talks", "--prompt", "hello") == 0
    assert capsys.readouterr().out == "hi \\x1b[2J\\x07 there\n\n"


def test_adapters_talk_on_their_base(saved, tmp_path):
    """A run of adapters answers as their base with the adapters merged."""
    import warnings

    from transformers import Qwen3ForCausalLM

    from llm_trainer import SFTTrainer

    peft = pytest.importorskip("peft", reason="needs peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about transformers
        model = peft.get_peft_model(
            Qwen3ForCausalLM.from_pretrained(saved / "talks"),
            peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokenizer = load_tokenizer(saved / "talks")
    options = {"device": "cpu", "progress": False, "save_dir": str(tmp_path / "run"), "tokenizer": tokenizer}
    SFTTrainer(model, optimizer, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}], **options).save_checkpoint()
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    answers = {}
    for folder in (tmp_path / "run", tmp_path / "merged", saved / "talks"):
        speaker = Speaker(folder / "model" if folder.name == "run" else folder, max_new_tokens=6, temperature=0)
        answers[folder.name] = "".join(speaker.answer("hello"))
    assert answers["run"] == answers["merged"] != answers["talks"]
