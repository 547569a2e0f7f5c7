"""What a run's options name of data: records that can be used, and the pictures they are about."""

from dataclasses import replace

from llama_adapter.checkpoints import Base
from llama_adapter.data.dataset import Dataset, load_dataset
from llama_adapter.multimodal.pictures import Pictures
from llama_adapter.recipe import FinetuneConfig


def load_run_data(
    config: FinetuneConfig, base: Base, progress: bool | None = False
) -> tuple[Dataset, Pictures | None]:
    """Check, split and tokenise the data of a run, and encode every picture of it.

    All pictures are encoded before the first step, or found in the cache: one that cannot be used
    is told then, as a record that cannot be used is, and not thousands of steps later.

    Args:
        config: of the run.
        base: whose tokenizer, context and device are used.
        progress: show bars on stderr where it takes seconds; None shows them on a terminal.

    Returns:
        The data, whose digests are those of the encoder and of the pictures too, and the pictures;
        None where the run takes no images.

    Raises:
        FileNotFoundError: a file or a folder does not exist.
        OSError: a cache cannot be written.
        ValueError: as `load_dataset`; or the encoder cannot be used, or no record has an image.
    """
    pictures = None
    if config.vision.vision_model is not None:
        pictures = Pictures.load(
            config.vision,
            config.scales.scales,
            device=base.model.output_weight.device,
            progress=progress,
        )
    dataset = load_dataset(
        config.data,
        base.tokenizer,
        min(config.max_length, base.model.config.max_seq_len),
        val_data=config.val_data,
        val_size=config.val_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
        strict=config.strict,
        token_cache=config.token_cache,
        unusable=None if pictures is None else pictures.unusable,
        progress=progress,
    )
    if pictures is None:
        return dataset, None
    if not dataset.with_image.any():
        lines = (str(one) for some in dataset.problems.values() for one in some)
        bad = next((line for line in lines if "image" in line), None)
        raise ValueError(
            f"{config.data}: none of the {len(dataset.train)} records to train on has an image"
            + (f" that can be used ({bad})" if bad else ": leave out --images and --vision-model")
        )
    # one folder may be both
    seen = {
        str(config.vision.vision_model): pictures.encoder.digest,
        f"the images in {config.vision.images}": pictures.content,
    }
    return replace(dataset, digests=dataset.digests | seen), pictures
