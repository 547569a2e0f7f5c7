"""Two adapters in one model, switched by name while it runs: one's caption helps the other answer.

    python examples/named_adapters.py BASE INSTRUCT CAPTION CLIP IMAGE "What is he doing?"

BASE is a folder, INSTRUCT and CAPTION are adapter files that take images, CLIP is the encoder that
both were trained with. (LLaMA-Adapter, figure 1; LLaMA-Adapter V2, section 4.4.)
"""

import sys
from pathlib import Path

from llama_adapter.adapter_bank import AdapterBank
from llama_adapter.checkpoints import Base, load_base
from llama_adapter.checkpoints.adapter_file import load_adapter
from llama_adapter.data.template import prompt_text
from llama_adapter.engine import Engine
from llama_adapter.multimodal.experts import CAPTION_INSTRUCTION, context_of
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.sampling import SamplingConfig
from llama_adapter.vision import VisionOptions

ROWS = 8  # two adapters, and as many pictures as are looked at together


class Assistant:
    """Named adapters of one base behind one engine."""

    def __init__(self, base: Base, files: dict[str, Path], clip: Path) -> None:
        adapters = {name: load_adapter(path, base.model, base.name) for name, path in files.items()}
        seen = [one.projector.config for one in adapters.values() if one.projector is not None]
        self.pictures = Pictures.load(VisionOptions(vision_model=clip), visual=seen[0])
        for visual in seen:
            self.pictures.check(visual)
        self.bank = AdapterBank(
            base.model,
            capacity=ROWS,
            prompt_length=max(one.config.prompt_length for one in adapters.values()),
            visual_layers=max(visual.layers for visual in seen),
            visual_tokens=max(visual.tokens for visual in seen),
        )
        for name, adapter in adapters.items():
            self.bank.load(name, adapter)
        self.engine = Engine(base.model, base.tokenizer, bank=self.bank)

    def ask(self, *requests: tuple[str, str, Path | None], length: int = 64) -> list[str]:
        """Answers to (adapter, text, image) of all sorts, in one batch."""
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=length)
        features, present = self.pictures([image for _, _, image in requests])
        tickets = [
            self.engine.submit(text, sampling, adapter=name, image=row if there else None)
            for (name, text, _), row, there in zip(requests, features, present, strict=True)
        ]
        pieces = self.engine.run()
        done = {one.row: one.completion.text for one in pieces if one.completion is not None}
        return [done[ticket].strip() for ticket in tickets]

    def answer(self, instruction: str, image: Path, length: int = 64) -> tuple[str, str]:
        """The caption adapter's words on an image, and the instruct adapter's answer given them."""

        def caption(path: Path) -> str:
            return self.ask(("caption", prompt_text(CAPTION_INSTRUCTION), path), length=length)[0]

        said = context_of(image, {"caption": caption}).text
        text = prompt_text(instruction, said)
        return said, self.ask(("instruct", text, image), length=length)[0]


if __name__ == "__main__":
    if len(sys.argv) != 7:
        sys.exit(__doc__)
    folder, instruct, described, encoder, picture, question = sys.argv[1:]
    files = {"instruct": Path(instruct), "caption": Path(described)}
    assistant = Assistant(load_base(folder), files, Path(encoder))
    print("\n".join(assistant.answer(question, Path(picture))))
