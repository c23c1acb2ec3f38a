"""What a forked child finds imported and built: all that a run needs, so that a trial takes half a second in place of ten.

What comes before, the imports, is met by the cold quarter of the signals (`kills`) alone.
"""

import gc
import importlib

import trl
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in ("DPOTrainer", "SFTTrainer", "DPOConfig", "SFTConfig"):
    getattr(trl, name)  # TRL imports on demand
for name in (
    "bitsandbytes", "peft", "wandb", "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral", "politune.inspection.inspect",
    "politune.doctor", "politune.training.run", "politune.training.session", "politune.models.merge",
):  # fmt: skip
    importlib.import_module(name)
get_checkpoint_conversion_mapping("llama")  # a thousand regular expressions
gc.freeze()  # a child looks for garbage among what is its own
