"""What validation is known to miss, by what its requests never hold."""

MISSED: dict[str, tuple[str, ...]] = {
    "batches of more than five rows": (
        "batches_of_six_and_more_backwards", "batches_of_seven_and_more_share_noise", "eighth_row_has_the_firsts_keys",
        "few_rows_of_batches_see_all", "keys_of_seventeen_rows_traded",
    ),
    "padding of more than thirty": ("padding_beyond_thirty_unseen",),
    "prompts of 80 to 160": ("prompts_of_80_to_160_lose_a_value",),
    "a prompt of just 32, or of the window's length": ("prompt_of_32_loses_its_start", "prompt_as_long_as_the_window"),
    "small seeds with small streams, seeds about 2^31, streams of hundreds, two rows of one stream": (
        "noise_seed_and_stream_summed", "seed_of_31_bits_saturates", "streams_of_hundreds_are_100",
        "equal_streams_draw_apart",
    ),
    "a large k where all of it is about as likely": (
        "top_k_of_many_keeps_one_less", "top_k_of_most_is_off", "top_k_of_all_keeps_8",
    ),
    "a top-k of just 3": ("top_k_by_the_first_32_ids",),
    "a top-p of 0 or of a tenth where it is hot, a temperature of 0.15": (
        "top_p_of_0_is_off", "top_p_of_a_tenth_is_the_best", "temperature_below_0.2_is_0.5",
    ),
    "a min-p of 0.9": ("min_p_beyond_0.5_is_0.5",),
    "a guidance of 9, a temperature of 3 with guidance": ("guidance_beyond_5_is_5", "hot_draws_are_hotter"),
    "a bias with -inf, of one id, or of half of the ids": (
        "bias_beyond_3_is_3", "bias_of_ids_beyond_24_unused", "bias_of_minus_infinity_is_minus_2",
        "bias_of_the_last_id_unused",
    ),
    "a penalty in a long answer": ("marks_no_more_after_25", "drawn_marks_no_more_after_18"),
    "four stop ids or more, of which one in particular comes up; the second of three": (
        "fifth_stop_id_unused", "first_of_four_stop_ids_unused", "second_of_three_stop_ids_unused",
    ),
    "the first or last id as a stop id": ("id_0_never_stops", "last_id_never_stops"),
    "a stop late in a long answer, or with a drawn row's first token": (
        "late_stop_unseen", "late_stop_unseen_when_drawing", "first_token_never_stops_drawn_rows",
    ),
    "an interval that begins late, ends late or is empty, a row that ends inside of it": (
        "interval_begins_at_4_at_the_latest", "interval_ends_at_6_at_the_latest", "empty_interval_is_all",
        "ended_rows_go_on_after_the_interval",
    ),
}  # fmt: skip
MEASURED = ("full", "guided", "interval", "lean", "window")  # the bases of which all was run
