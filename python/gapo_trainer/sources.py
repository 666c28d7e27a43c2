"""A run's model and preference pairs, from the names in its settings."""

import re
from pathlib import Path

from .config import nearest
from .settings import SHIPPED_DATASET, SHIPPED_MODEL, SettingsError

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_model(model_args):
    """(model, tokenizer) of TRL's ModelConfig; its model_name_or_path may be the offline SmolLM2-135M-Instruct.

    Raises SettingsError when there is no such model.
    """
    from accelerate import PartialState
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import get_quantization_config

    if model_args.model_name_or_path is None:
        raise SettingsError("model_name_or_path must name a causal language model, got none")
    quantization = get_quantization_config(model_args)
    options = {
        "revision": model_args.model_revision,
        "trust_remote_code": getattr(model_args, "trust_remote_code", False),
    }
    extra = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "float32",
        "device_map": {"": PartialState().local_process_index} if quantization is not None else None,
        "quantization_config": quantization,
    }
    try:
        name = _place(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(name, **options, **extra)
        return model, AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        near = nearest(model_args.model_name_or_path, [SHIPPED_MODEL])
        raise SettingsError(f"model_name_or_path = {model_args.model_name_or_path!r}{near}: {error}") from error


def _place(name):
    if name != SHIPPED_MODEL:
        return name
    from .smollm2 import ensure_smollm2

    return str(ensure_smollm2())


def load_datasets(data_args, seed):
    """(train, test) datasets.Dataset of raw pairs; test is None without a dataset_test_split.

    Raises SettingsError when they cannot be had.
    """
    train = _split(data_args, data_args.dataset_train_split)
    test = None if data_args.dataset_test_split is None else _split(data_args, data_args.dataset_test_split)
    if data_args.flip_labels:
        from datasets import Dataset

        from .preferences import flip_labels

        train = Dataset.from_list(flip_labels(list(train), data_args.flip_labels, seed))
    return train, test


def _split(data_args, split):
    import datasets

    name = data_args.dataset_name
    is_file, saved = Path(name).suffix in READERS, (Path(name) / "dataset_dict.json").exists()
    if data_args.dataset_config is not None and (is_file or saved or name == SHIPPED_DATASET):
        raise SettingsError(f"dataset_config expects a dataset with configurations, got {name!r}")
    if name == SHIPPED_DATASET:
        from .preferences import load_preferences

        try:
            return datasets.Dataset.from_list(load_preferences(split))
        except ValueError as error:
            raise SettingsError(f"{name}: {error}") from error
    try:
        if is_file:
            if data_args.dataset_train_split != "train":
                raise ValueError(f"a file has no splits, expected 'train', got {data_args.dataset_train_split!r}")
            # Of a file, the training split is the file itself, and the test split another file.
            file = name if split == data_args.dataset_train_split else split
            if Path(file).suffix not in READERS:
                kinds = ", ".join(READERS)
                raise ValueError(f"for a file, dataset_test_split is another file, {kinds}, got {split!r}")
            return datasets.load_dataset(READERS[Path(file).suffix], data_files=file, split="train")
        if saved:
            splits = datasets.load_from_disk(name)
            if split not in splits:
                raise ValueError(f"expected one of the splits {', '.join(splits)}, got {split!r}{nearest(split, splits)}")
            return splits[split]
        return datasets.load_dataset(name, data_args.dataset_config, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        near = nearest(name, [SHIPPED_DATASET])
        what, _, known = str(error).partition("[")  # datasets' own: "Unknown split ... ['train', 'test']", and of configurations
        plain = split.partition("[")[0]  # of "train[:100]"
        near = near or nearest(plain if plain in what else data_args.dataset_config, re.findall(r"'([^']+)'", known))
        raise SettingsError(f"dataset_name = {name!r}, split {split!r}{near}: {type(error).__name__}: {error}") from error
