"""How many parameters each method trains on a host, from shapes alone."""

from typing import Any

from llama_adapter.hosts.baselines.own import head_of, own_names
from llama_adapter.hosts.baselines.parts import Part
from llama_adapter.hosts.method_options import MethodOptions
from llama_adapter.hosts.methods import chosen_parts


def count_parameters(model: Any, name: str, options: MethodOptions | None = None) -> dict[str, int]:
    """Parameters that `attach` would train, without making one; the model may be on meta.

    With K the prompt length, C the width, L the layers that get something, N all layers, H heads,
    R = C // reduction, r the rank, and D layers of a side network, per encoder:

        zero_init       L K C + L H; with prompt_kind "kv" L 2 K C + L H
        vpt_shallow     K C
        vpt_deep        N K C
        prompt_tuning   K C
        p_tuning_v2     L 2 K C
        adapter         N (2 C R + C + R)
        side            2 C R + C + R + D (12 R^2 + 13 R) + 1
        coop            K C
        lora            N 2 r 2 C
        flamingo        L (4 C^2 + 2 C + K C + 1)
        bias            all bias terms
        full            all parameters

    Returns:
        Counts of the groups "method" and "head", as `Attached.groups` has them.

    Raises:
        ValueError: the method is not for this host.
    """
    options = MethodOptions() if options is None else options
    parts = chosen_parts(model, name, options)
    found = head_of(model)
    sizes = {key: x.numel() for key, x in model.named_parameters()}
    of_head = [x for key, x in sizes.items() if found and key.startswith(f"{found[0]}.")]
    head = 0 if name == "frozen" else sum(of_head)
    if name in ("full", "bias"):
        names = own_names(model, parts.values(), biases=name == "bias")
        return {"method": sum(sizes[key] for key in names), "head": head}
    return {"method": sum(_count(name, part, options) for part in parts.values()), "head": head}


def _count(name: str, part: Part, options: MethodOptions) -> int:
    width, total = part.width, len(part.layers())
    some, rows = len(part.topmost(options.layers)), options.prompt_length * width
    inner, heads = width // options.reduction, part.config.num_attention_heads
    both = 2 * width * inner + width + inner
    counts = {
        "zero_init": some * (rows * (2 if options.prompt_kind == "kv" else 1) + heads),
        "frozen": 0,
        "linear": 0,
        "adapter": total * both,
        "vpt_shallow": rows,
        "vpt_deep": total * rows,
        "prompt_tuning": rows,
        "p_tuning_v2": some * 2 * rows,
        "side": both + options.side_layers * (12 * inner**2 + 13 * inner) + 1,
        "coop": rows,
        "lora": total * 2 * options.rank * 2 * width,
        "flamingo": some * (4 * width**2 + 2 * width + rows + 1),
    }
    return counts[name]
