"""What a forked child finds imported: all that a run needs, so that a trial takes a second in place of ten."""

import importlib

import trl

for name in ("DPOTrainer", "SFTTrainer", "DPOConfig", "SFTConfig"):
    getattr(trl, name)  # TRL imports on demand
for name in ("bitsandbytes", "peft", "wandb", "politune.inspection.inspect", "politune.doctor"):
    importlib.import_module(name)
