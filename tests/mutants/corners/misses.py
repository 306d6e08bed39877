"""What validation misses of the slips, and why; what requests draw decides which of the rare ones these are."""

MISSED: dict[str, tuple[str, ...]] = {
    "one value of the cache is lost, which attention as sharp as here hardly ever looks at": (
        "dense_prompts_of_17_to_62",
    ),
    "another id in one draw of some twenty, in the few requests with these values": (
        "top_k_of_many_keeps_one_less", "top_k_of_most_is_off", "temperature_below_0.2_is_0.5",
    ),
}  # fmt: skip
