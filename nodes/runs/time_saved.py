"""What the sparse calls of one run saved, from the calls that the same run timed. Nothing is said where no dense call was timed."""


def seconds_saved(data):
    """Seconds by which the sparse calls of report_data() were shorter than dense ones, negative where they were longer.

    A layer's own dense calls are the measure, else the mean of all layers'. None where the run timed none of either kind.
    """
    rows = data["layers"]
    dense, timed = mean_milliseconds(rows, "dense"), [row for row in rows if "sparse" in row["milliseconds"]]
    if dense is None or not timed:
        return None
    saved = sum(
        row["sparse"] * (row["milliseconds"].get("dense", dense) - row["milliseconds"]["sparse"]) for row in timed
    )
    return saved / 1000


def saved_in_words(data):
    """ "saved 41 s of attention in this run", or None where it was not measured."""
    saved = seconds_saved(data)
    if saved is None:
        return None
    if saved < 0:
        return f"attention took {duration(-saved)} longer than dense in this run"
    return f"saved {duration(saved)} of attention in this run"


def faster_in_words(data):
    """ "8.2x faster per call" or how much slower; None where the run did not time calls of both kinds."""
    sparse, dense = (mean_milliseconds(data["layers"], kind) for kind in ("sparse", "dense"))
    if not sparse or not dense:
        return None
    return f"{dense / sparse:.1f}x faster per call" if dense >= sparse else f"{sparse / dense:.1f}x slower per call"


def duration(seconds):
    """0.42 -> "0.42 s", 41.3 -> "41 s", 380 -> "6 min 20 s"."""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60} s"


def mean_milliseconds(rows, kind):
    """Mean of the layers' milliseconds per call of a kind, or None."""
    times = [row["milliseconds"][kind] for row in rows if kind in row["milliseconds"]]
    return sum(times) / len(times) if times else None
