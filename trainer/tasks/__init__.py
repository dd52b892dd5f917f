"""What a trained model is good for: fine-tuning and evaluation on downstream tasks.

A task is a module of this package that defines `SPEC` (`trainer.tasks.base`) and has a
line in `trainer.tasks.names`. `trainer.finetune` and `trainer.evaluate` are the
commands.
"""
