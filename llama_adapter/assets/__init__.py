"""Where are the bundled base model and the bundled instruction sets?

Paths only. `README.md` beside this file tells how each file was made; the scripts that made them
are in `examples/bundled_base/`.
"""

from pathlib import Path

ASSETS: Path = Path(__file__).resolve().parent
BASE: Path = ASSETS / "base"
"""Meta folder of the tiny LLaMA: consolidated.00.pth, params.json, tokenizer.model."""
INSTRUCTIONS: Path = ASSETS / "instructions"
"""Alpaca JSON files: {follow,json}_{train,heldout}.json."""
FOLLOW_TRAIN: Path = INSTRUCTIONS / "follow_train.json"
FOLLOW_HELDOUT: Path = INSTRUCTIONS / "follow_heldout.json"
JSON_TRAIN: Path = INSTRUCTIONS / "json_train.json"
JSON_HELDOUT: Path = INSTRUCTIONS / "json_heldout.json"
RECIPE: Path = ASSETS / "recipe.json"
"""Fine-tuning options under which the adapter learns on the bundled base, by option name."""
