"""What a data set gives, as pairs that can be compared."""


def examples(source):
    """(image bytes, label) of every evaluation example, in order."""
    return [
        (image.tobytes(), int(label))
        for batch in source.eval_batches(batch_size=7)
        for image, label in zip(batch["image"][batch["mask"]], batch["label"][batch["mask"]], strict=True)
    ]


def one_epoch(source, batch_size):
    batches = source.train_batches(seed=0, batch_size=batch_size, start_step=0)
    return [
        (image.tobytes(), int(label))
        for _, batch in zip(range(source.steps_per_epoch(batch_size)), batches, strict=False)
        for image, label in zip(batch["image"], batch["label"], strict=True)
    ]
