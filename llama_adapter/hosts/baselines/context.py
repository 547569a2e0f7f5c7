"""CoOp's context: learnt vectors in place of the template's words in front of a class's name."""

from typing import Any

import torch
from torch import Tensor, nn

from llama_adapter.hosts.baselines.parts import (
    Generator,
    Installed,
    Part,
    Undo,
    after,
    before,
    normal,
)

# tokens of "a photo of a", which a context takes the place of where nothing else is said
TEMPLATE_LENGTH = 4


class Context(Installed):
    """[BOS] c_1 ... c_K class . [EOS] in place of [BOS] a photo of a class . [EOS].

    context is (K, C), one for all classes, normally distributed by 0.02, or the embeddings of
    `ids` at first.

    Source: CoOp, section 3.2: unified context, the class at the end.
    """

    def __init__(
        self, part: Part, length: int, template: int, ids: tuple[int, ...], generator: Generator
    ) -> None:
        super().__init__()
        self.template = template
        self.context = normal((length, part.width), 0.02, generator)
        if ids and len(ids) != length:
            raise ValueError(
                f"context_ids must be as many as prompt_length = {length}, got {len(ids)}"
            )
        if ids:
            table = part.embeddings.token_embedding.weight
            self.context = nn.Parameter(table.detach()[list(ids)].float())
        self.positions = part.embeddings.position_embedding.num_embeddings
        self.eos: int = part.config.eos_token_id

    def install(self, part: Part) -> list[Undo]:
        """Put the context into a text encoder."""
        return [
            before(part.body, self._make_room),
            after(part.embeddings.token_embedding, self._put),
        ]

    def _make_room(self, given: dict[str, Any]) -> dict[str, Any]:
        """Input ids with K places behind BOS for the template's words."""
        ids, mask = given["input_ids"], given.get("attention_mask")
        if given.get("position_ids") is not None:
            raise ValueError("position_ids must be left to the host with coop")
        ids = ids.view(-1, ids.shape[-1])
        if ids.shape[1] < self.template + 2:
            raise ValueError(
                f"input_ids must have a template of {self.template} tokens behind their first, "
                f"got {ids.shape[1]} tokens"
            )
        rows, length, behind = len(ids), len(self.context), 1 + self.template
        ids = torch.cat([ids[:, :1], ids[:, :1].expand(-1, length), ids[:, behind:]], 1)
        if ids.shape[1] > self.positions:
            # as the host finds the end, in old configurations too
            end = (ids if self.eos == 2 else (ids == self.eos).int()).argmax(-1)
            if int(end.max()) >= self.positions:
                raise ValueError(
                    f"texts must end within {self.positions} tokens with {length} of context, got "
                    f"{int(end.max()) + 1}"
                )
            ids = ids[:, : self.positions]
        if mask is not None:
            mask = torch.cat([mask[:, :1], mask.new_ones(rows, length), mask[:, behind:]], 1)
            mask = mask[:, : self.positions]
        return given | {"input_ids": ids, "attention_mask": mask}

    def _put(self, x: Tensor) -> Tensor:
        context = self.context.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x[:, :1], context, x[:, 1 + len(self.context) :]], 1)
