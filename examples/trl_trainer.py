"""GAPO the way one uses TRL: `GAPOTrainer` and `GAPOConfig` in the place of DPOTrainer and DPOConfig.

python examples/trl_trainer.py [--model NAME_OR_PATH]
"""

import tempfile

from datasets import Dataset

from common import arguments, preference_pairs
from gapo_trainer import GAPOConfig, GAPOTrainer
from decoder import load


def main(argv=None):
    args = arguments(argv)
    model, tokenizer = load(args.model)
    # TRL's preference format: prompt, chosen and rejected, here conversational (lists of messages).
    dataset = Dataset.from_list(preference_pairs())
    with tempfile.TemporaryDirectory() as folder:  # your output_dir
        config = GAPOConfig(
            output_dir=folder,
            beta=2.0,
            gamma_beta_ratio=0.25,
            rho=0.05,
            max_length=1024,
            max_steps=args.steps,
            learning_rate=args.lr,
            per_device_train_batch_size=8,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        )
        trainer = GAPOTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
    return trainer.model, trainer.state.log_history


if __name__ == "__main__":
    main()
