"""Fine-tune one text task, with the statistics for later merges beside its checkpoints.

    python recipes/finetune.py fit --config recipes/finetune.yaml --data.task sms \
        --trainer.default_root_dir runs/finetune/sms

Every other setting of the trainer, the model and the data can be given in the same way; `--help`
after the subcommand lists them. Another data set: `--data.task null --data.hub '{dataset:
stanfordnlp/sst2, text_column: sentence, test_split: validation}'`; another model:
`--model.backbone <hub id>`.
"""

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from text_data import TextData
from text_model import TextClassifier
from typing_extensions import override


class FinetuneCLI(LightningCLI):
    """The data says how many classes there are, the model which tokenizer the data needs."""

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("model.backbone", "data.model")


def main(args: ArgsType = None) -> FinetuneCLI:
    return FinetuneCLI(
        TextClassifier,
        TextData,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    main()
