"""Bottleneck adapters behind the feed-forward part of every layer."""

from torch import Tensor, nn

from llama_adapter.hosts.baselines.parts import Generator, Installed, Part, Undo, after, initialise


class Bottleneck(nn.Module):
    """y = x + up(gelu(down(x))) on the output x (B, T, C) of a feed-forward part; up is 0 at first.

    Source: Parameter-Efficient Transfer Learning for NLP, section 2.1, in the one place per layer
    that VPT's comparison has it.
    """

    def __init__(self, width: int, reduction: int, generator: Generator) -> None:
        super().__init__()
        if not 1 <= reduction <= width:
            raise ValueError(f"reduction must be 1 to the width {width}, got {reduction}")
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        initialise(self.down, generator)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        inner = nn.functional.gelu(self.down(x.to(self.down.weight.dtype)))
        return x + self.up(inner).to(x.dtype)


class Bottlenecks(Installed):
    """One `Bottleneck` per layer."""

    def __init__(self, part: Part, reduction: int, generator: Generator) -> None:
        super().__init__()
        made = [Bottleneck(part.width, reduction, generator) for _ in part.layers()]
        self.layers = nn.ModuleList(made)

    def install(self, part: Part) -> list[Undo]:
        """Put the adapters into an encoder."""
        name = part.sites.feed_forward
        pairs = zip(part.layers(), self.layers, strict=True)
        return [after(layer.get_submodule(name), adapter) for layer, adapter in pairs]
