"""A mixture in words: what was asked and reached, and how often training sees each source."""

from megatron_mixcpt.data_prep.mix import Mix, Source

REPEATED = 1.05  # passes from which on a source counts as repeated


def explain_mixture(mix: Mix) -> list[str]:
    """One line a source, and what is unexpected about the weights."""
    lines = []
    for source in mix.sources:
        if source.share is None or source.train is None:
            held = f"{source.valid.tokens} tokens" if source.valid else "nothing"
            lines.append(f"{source.name} ({source.kind}): only held out, {held}")
            continue
        asked = ", ".join(f"{key} {value:g}" for key, value in source.share.requested.items())
        lines.append(
            f"{source.name} ({source.kind}): asked for {asked}, gets {source.weight:.1%} of the tokens; has "
            f"{source.train.tokens} tokens, {seen(source.share.epochs)} in {source.share.tokens} {source.share.of}"
        )
    requests = [source.share.requested for source in mix.sources if source.share is not None]
    total = sum(request.get("weight", 0.0) for request in requests)
    if all("weight" in request for request in requests) and abs(total - 1) > 1e-6:
        lines.append(f"the weights sum to {total:g}, not to 1: each is taken as its share of that")
    return lines


def seen(passes: float) -> str:
    """How much of a source so many passes over it show."""
    return f"of which {passes:.1%} are seen" if passes < 0.9995 else f"each seen {passes:.2f} times"


def explain_passes(mix: Mix, steps: int, global_batch_size: int) -> list[str]:
    """What `steps` steps see of each training source; repeats are warned about."""
    lines, repeated = [], []
    total = sum(source.weight for source in mix.train_sources)
    for source, share in zip(mix.train_sources, mix.sample_shares()):
        assert source.train is not None
        steps_a_pass = source.train.sequences / (share * global_batch_size)
        passes = steps / steps_a_pass
        takes = f"{steps_a_pass:.0f} steps" if steps_a_pass >= 1.0 else "less than one step"
        lines.append(
            f"{source.name} ({source.kind}): {_asked(source)}{source.weight / total:.1%}, {passes:.2f} x "
            f"{source.train.tokens} tokens; one pass takes {takes}"
        )
        if passes > REPEATED:
            repeated.append(f"{source.name} {passes:.1f} times")
    if repeated:
        lines.append(
            f"warning: {', '.join(repeated)}: repeated text teaches less each time; fewer train.steps, a smaller "
            "weight, or more data"
        )
    return lines


def _asked(source: Source) -> str:
    if source.share is None:
        return ""
    return "asked " + ", ".join(f"{key} {value:g}" for key, value in source.share.requested.items()) + ", "
