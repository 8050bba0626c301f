"""In which passes prompts are read: each once, what was read before is copied, and nothing waits for little."""

import random

from pipeline.inference.prefills import MOST, WORTH, Prefill, common, passes_of


def test_common_beginnings() -> None:
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 4]) == common([1, 2, 4], [1, 2]) == 2
    assert common([], [1]) == common([1], []) == common([1], [2]) == 0
    assert common(list(range(1000)), [*range(999), 0]) == 999


def test_one_reads_the_common_beginning_and_the_others_follow() -> None:
    begin = list(range(WORTH))
    prompts = [[*begin, 1, 2], [*begin, 3], [9] * 5]
    first, second = passes_of(prompts, known=[])
    assert first == [Prefill(0, 0, 0), Prefill(2, 0, 0)] and second == [Prefill(1, WORTH, 0)]
    (only,) = passes_of(prompts, known=[[9] * 5, [*begin, 7]])
    assert only == [Prefill(0, WORTH, 1), Prefill(1, WORTH, 1), Prefill(2, 0, 0)], "a text that is there has it"


def test_little_in_common_is_computed_again() -> None:
    begin = list(range(WORTH - 1))
    (only,) = passes_of([[*begin, 100], [*begin, 200]], known=[[*begin, 300]])
    assert [one.shared for one in only] == [0, 0]


def test_equal_prompts_compute_their_last_token() -> None:
    prompt = list(range(WORTH + 1))
    assert passes_of([prompt, prompt], []) == [[Prefill(0, 0, 0)], [Prefill(1, WORTH, 0)]]


def test_random_prompts_are_read_once_in_passes_that_are_not_too_wide() -> None:
    dice = random.Random(0)
    for _ in range(200):
        begins = [[dice.randrange(9) for _ in range(dice.randint(0, 400))] for _ in range(3)]
        texts = [
            dice.choice(begins)[: dice.randint(0, 400)] + [dice.randrange(9) for _ in range(dice.randint(1, 300))]
            for _ in range(dice.randint(1, 12))
        ]
        known = dice.randint(0, len(texts) - 1)
        prompts, read = texts[known:], set(range(known))
        for some in passes_of(prompts, texts[:known]):
            assert some and (len(some) == 1 or sum(len(prompts[one.number]) - one.shared for one in some) <= MOST)
            for number, shared, source in some:
                assert shared == 0 or (source in read and shared >= WORTH)
                assert shared < len(prompts[number]) and prompts[number][:shared] == texts[source][:shared]
                # nobody could have given it WORTH tokens more
                assert all(common(prompts[number][:-1], texts[at]) < shared + WORTH for at in read)
            read |= {known + one.number for one in some}
        assert read == set(range(len(texts)))
