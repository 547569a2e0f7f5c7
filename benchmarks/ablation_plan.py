"""Which runs make up the ablations, and how large are they?

Settings are keys of an experiment's table: (layers,), (attention, sigma, learning rate), (epochs,)
and (method, learning rate). Cells of several experiments may ask for the same run, made once.
"""

from dataclasses import dataclass

from benchmarks.ablation_runs import Run
from benchmarks.run_table import Cell
from llama_adapter.recipe import FinetuneConfig


@dataclass(frozen=True)
class Plan:
    """How large the experiments are.

    Attributes:
        seeds: every run is made once per seed.
        records, epochs: training records, and passes over them, where nothing else is said.
        held_out: held-out records to score on; None takes all.
        layers: numbers of inserted layers; None takes 1 to all.
        sigmas: prompt scales, relative to the normed attention input.
        rates: learning rates tried for each kind of attention, relative to the recipe's; the best
            one is reported.
        small_records, small_epochs: of the experiment on longer training.
        lora_lrs, full_lrs: learning rates tried for each; the best one is reported.
        timed_steps: optimiser steps timed per method and seed.
    """

    seeds: tuple[int, ...]
    records: int
    epochs: int
    held_out: int | None
    layers: tuple[int, ...] | None
    sigmas: tuple[float, ...]
    rates: tuple[float, ...]
    small_records: int
    small_epochs: tuple[int, ...]
    lora_lrs: tuple[float, ...]
    full_lrs: tuple[float, ...]
    timed_steps: int


FULL = Plan(
    seeds=(0, 1, 2),
    records=768,
    epochs=4,
    held_out=None,
    layers=None,
    sigmas=(1.0, 2.0, 4.0, 8.0),
    rates=(1.0, 4.0),
    small_records=64,
    small_epochs=(30, 60, 120),
    lora_lrs=(3e-3, 1e-2, 3e-2),
    full_lrs=(3e-4, 1e-3, 3e-3),
    timed_steps=12,
)
QUICK = Plan(
    seeds=(0,),
    records=32,
    epochs=2,
    held_out=32,
    layers=None,
    sigmas=(4.0,),
    rates=(1.0,),
    small_records=32,
    small_epochs=(1, 3),
    lora_lrs=(3e-3,),
    full_lrs=(1e-3,),
    timed_steps=2,
)


def cells(plan: Plan, recipe: FinetuneConfig, n_layers: int, rms: float) -> list[Cell[Run]]:
    """All cells, seed by seed, so that an unfinished table has every setting early.

    Args:
        plan: the experiments' size.
        recipe: of the bundled model; its learning rate and prompt scale are the default.
        n_layers: layers of the base.
        rms: unit of the sigmas.

    Returns:
        The cells of all experiments.
    """
    adapted = len(recipe.adapter.layers_of(n_layers))
    std, lr = recipe.adapter.prompt_std, recipe.peak_lr
    counts = range(1, n_layers + 1) if plan.layers is None else plan.layers
    size = (plan.epochs, plan.records)
    kinds = ("zero_init", "gate_one", "joint")
    attentions = [(kind, factor * lr) for kind in kinds for factor in plan.rates]
    found = []
    for seed in plan.seeds:
        usual = Run("zero_init", adapted, std, lr, *size, seed)
        found += [
            Cell("layers", (count,), Run("zero_init", count, std, lr, *size, seed))
            for count in counts
        ]
        found += [
            Cell(
                "zero_init",
                (method, sigma, rate),
                Run(method, adapted, round(sigma * rms, 3), rate, *size, seed),
            )
            for sigma in plan.sigmas
            for method, rate in attentions
        ]
        small = plan.small_records
        found += [
            Cell("longer", (count,), Run("zero_init", adapted, std, lr, count, small, seed))
            for count in plan.small_epochs
        ]
        found.append(Cell("methods", ("zero_init", lr), usual))
        for method, rates in (("lora", plan.lora_lrs), ("full", plan.full_lrs)):
            found += [
                Cell("methods", (method, rate), Run(method, adapted, std, rate, *size, seed))
                for rate in rates
            ]
        timed = recipe.batch_size * (plan.timed_steps + 1)
        timing = Run("timing", adapted, std, lr, 1, timed, seed)
        found.append(Cell("methods", ("timing", 0.0), timing))
    return found
