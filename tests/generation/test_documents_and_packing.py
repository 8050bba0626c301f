"""Reading, filters, packing, the split, and batches as a pure function of the step. Masks by text: test_masks.py."""

import json
import random
from itertools import chain, pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import load
from pipeline.errors import UserError
from pipeline.generation.documents import Document, read_documents, read_manifest, split, usable
from pipeline.generation.repetition import repeated_share
from pipeline.runs.files import sha256_of
from pipeline.training.dataloader import StepBatches, validation_batches
from pipeline.training.packing import pack


def documents(count: int, seed: int = 0, longest: int = 30) -> list[Document]:
    """Random ones of one to three answers, each behind at least one token that is not learned from."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        length = rng.randint(2, longest)
        borders = sorted(rng.sample(range(1, length), min(2 * rng.randint(1, 3) - 1, (length - 2) // 2 * 2 + 1)))
        spans = list(zip(borders[::2], [*borders[1::2], length], strict=True))
        made.append(Document(f"p-{i}", [rng.randrange(1, 100) for _ in range(length)], spans))
    return made


def test_every_document_is_packed_whole_once_with_its_own_positions():
    docs = documents(50)
    packed = pack(docs, 32)
    found = []
    for s in range(len(packed)):
        starts = [t for t in range(32) if packed.positions_ST[s, t] == 0]
        for start, end in pairwise([*starts, 32]):
            assert packed.positions_ST[s, start:end].tolist() == list(range(end - start))
            if start < packed.lengths_S[s]:
                learned = [t - start for t in range(start, end) if packed.mask_ST[s, t]]
                found.append((packed.ids_ST[s, start:end].tolist(), learned))
            else:
                assert not packed.mask_ST[s, start:].any()
    # The masked places are those whose next token is of an answer, and each answer has places of its own.
    expected = [(d.tokens, [t - 1 for start, end in d.spans for t in range(start, end)]) for d in docs]
    assert {len(d.spans) for d in docs} == {1, 2, 3}
    assert sorted(found) == sorted(expected)
    assert packed.lengths_S.sum() == sum(len(d.tokens) for d in docs)


def test_prompts_can_teach_too():
    """Every position but a document's last is learned then, and nothing of the padding."""
    docs = documents(20)
    packed = pack(docs, 32, prompts_too=True)
    assert int(packed.mask_ST.sum()) == sum(len(d.tokens) - 1 for d in docs)
    followed = packed.positions_ST.roll(-1, 1) == packed.positions_ST + 1  # the next place is of the same document
    followed[:, -1] = False
    inside = torch.arange(32) < packed.lengths_S[:, None] - 1
    assert torch.equal(packed.mask_ST, followed & inside)


def test_packing_wastes_little():
    docs = documents(300, longest=60)
    tokens = sum(len(d.tokens) for d in docs)
    assert len(pack(docs, 128)) <= tokens / 128 * 1.03 + 1


def test_documents_longer_than_a_sequence_are_cut_and_empty_ones_left_out():
    tokens = list(range(1, 41))
    docs = [
        Document("long", tokens, [(5, 40)]),
        Document("prompt too long", tokens, [(35, 40)]),
        Document("no answer", tokens[:2], [(2, 2)]),
        Document("cut in the second answer", tokens, [(5, 10), (20, 36), (38, 40)]),
        Document("cut behind the first answer", tokens, [(5, 10), (35, 40)]),
        Document("short", tokens[:9], [(3, 6)]),
        Document("no prompt", tokens[:3], [(0, 3)]),
    ]
    assert [(d.id, len(d.tokens), d.spans) for d in usable(docs, 32)] == [
        ("long", 32, [(5, 32)]),
        ("cut in the second answer", 32, [(5, 10), (20, 32)]),
        ("cut behind the first answer", 10, [(5, 10)]),
        ("short", 6, [(3, 6)]),
        ("no prompt", 3, [(1, 3)]),
    ]
    assert all(d.tokens == tokens[: len(d.tokens)] for d in usable(docs, 32))
    with pytest.raises(UserError, match=r"sequence_length=4.* 5 tokens"):
        usable(docs[:2], 4)


def test_split_depends_on_the_id_alone_and_leaves_neither_side_empty():
    docs = documents(200)
    train, validation = split(docs, 0.1)
    assert 5 <= len(validation) <= 40 and len(train) + len(validation) == 200
    again = split(random.Random(1).sample(docs, 200)[:100], 0.1)[1]
    assert {d.id for d in again} <= {d.id for d in validation}
    assert [len(side) for side in split(docs[:2], 1e-9)] == [1, 1]
    assert [len(side) for side in split(docs[:2], 0.999999)] == [1, 1]
    with pytest.raises(UserError, match=r"at least 2.*raise generate\.num_prompts"):
        split(docs[:1], 0.5)


def test_no_conversation_lies_on_both_sides():
    turns = [Document(d.id + turn, d.tokens, d.spans) for d in documents(50) for turn in ("", ".2", ".3")]
    sides = split(turns, 0.3)
    train, validation = ({d.conversation for d in side} for side in sides)
    assert not train & validation and len(sides[0]) == 3 * len(train) and len(sides[1]) == 3 * len(validation)
    assert validation == {d.id for d in split(documents(50), 0.3)[1]}, "as if each were one document"
    with pytest.raises(UserError, match="1 usable conversation"):
        split(turns[:3], 0.5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_takes_the_same_sequences_whatever_the_world_size(world_size):
    alone = list(StepBatches(11, 8, 6, seed=3))
    ranks = [list(StepBatches(11, 8, 6, 3, rank, world_size)) for rank in range(world_size)]
    for step in range(6):
        assert list(chain(*(batches[step] for batches in ranks))) == alone[step]


def test_a_step_does_not_depend_on_where_the_run_was_resumed():
    whole = list(StepBatches(11, 4, 10, seed=0))
    assert list(StepBatches(11, 4, 10, seed=0, start_step=7)) == whole[7:]
    assert list(StepBatches(11, 4, 10, seed=1)) != whole


def test_an_epoch_sees_every_sequence_once_and_the_next_in_another_order():
    places = list(chain(*StepBatches(12, 4, 6, seed=0)))
    assert sorted(places[:12]) == sorted(places[12:]) == list(range(12))
    assert places[:12] != places[12:]


def test_sequences_that_do_not_divide_over_the_processes_are_refused():
    with pytest.raises(UserError, match="sequences_per_step=6"):
        StepBatches(10, 6, 1, 0, world_size=4)


@pytest.mark.parametrize(("count", "world_size"), [(1, 1), (7, 2), (16, 4), (3, 4)])
def test_validation_sees_every_sequence_once_in_as_many_batches_on_each_rank(count, world_size):
    ranks = [validation_batches(count, 8 // world_size, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [i for batches in ranks for batch in batches for i in batch if i >= 0]
    assert sorted(seen) == list(range(count))


def test_a_filler_sequence_counts_for_nothing():
    packed = pack(documents(10), 32)
    batch = packed[[0, -1]]
    assert batch["mask_BT"][0].any() and not batch["mask_BT"][1].any()


def write_responses(folder, rows, **manifest):
    pq.write_table(pa.Table.from_pylist(rows), folder / "shard-00000.parquet")
    shard = {"file": "shard-00000.parquet", "rows": len(rows), "sha256": sha256_of(folder / "shard-00000.parquet")}
    (folder / "manifest.json").write_text(json.dumps({"shards": [shard], "complete": True} | manifest))


def row(id_, prompt, response, finish_reason="stop"):
    return {"id": id_, "prompt_ids": list(prompt), "response_ids": list(response), "finish_reason": finish_reason}


def read(folder, truncated="drop", most_repeated=0.5):
    return read_documents(folder, read_manifest(folder), truncated, most_repeated)


def counted(answers, **counts):
    return {"answers": answers, "truncated": 0, "repeating": 0, "joined": 0, "alone": 0} | counts


def test_reading_responses(tmp_path):
    write_responses(tmp_path, [row("a", [1, 2], [3])])
    assert read(tmp_path) == ([Document("a", [1, 2, 3], [(2, 3)])], counted(1))


def test_turns_are_joined_while_each_prompt_begins_with_all_there_was(tmp_path):
    rows = [
        row("a", [1, 2], [3, 9]),
        row("a.2", [1, 2, 3, 9, 4], [5, 9]),
        row("a.3", [1, 2, 3, 9, 4, 5, 9, 6], [7, 9]),
        row("b", [1, 2], [3, 9]),
        row("b.2", [1, 2, 9, 4], [5, 9]),  # the answer came back changed: a document of its own ...
        row("b.3", [1, 2, 9, 4, 5, 9, 6], [7, 9]),  # ... which the next turn may go on with
        row("c", [1, 2], [3, 9]),
        row("d", [1, 2, 3, 9, 4], [5, 9]),  # another conversation, though it begins with the same tokens
        row("d.2", [1, 2, 3, 9, 4, 5], [6, 9]),  # without the end token: shorter than what was there
    ]
    write_responses(tmp_path, rows)
    assert read(tmp_path) == (
        [
            Document("a", [1, 2, 3, 9, 4, 5, 9, 6, 7, 9], [(2, 4), (5, 7), (8, 10)]),
            Document("b", [1, 2, 3, 9], [(2, 4)]),
            Document("b.2", [1, 2, 9, 4, 5, 9, 6, 7, 9], [(4, 6), (7, 9)]),
            Document("c", [1, 2, 3, 9], [(2, 4)]),
            Document("d", [1, 2, 3, 9, 4, 5, 9], [(5, 7)]),
            Document("d.2", [1, 2, 3, 9, 4, 5, 6, 9], [(6, 8)]),
        ],
        counted(9, joined=3, alone=2),
    )


def test_a_conversation_may_lie_in_two_shards(tmp_path):
    shards = []
    for number, one in enumerate([row("a", [1], [2]), row("a.2", [1, 2, 3], [4])]):
        file = tmp_path / f"shard-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist([one]), file)
        shards.append({"file": file.name, "sha256": sha256_of(file)})
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards, "complete": True}))
    assert read(tmp_path) == ([Document("a", [1, 2, 3, 4], [(1, 2), (3, 4)])], counted(2, joined=1))


LOOP = [1, 2, 3] * 10


def test_truncated_and_repeating_answers_are_context_only(tmp_path):
    rows = [
        row("a", [1], [2, 3], "length"),
        row("a.2", [1, 2, 3, 4], [5, 9]),  # what was cut off stays as the context of this
        row("b", [1], [2, 3], "length"),
        row("c", [1], LOOP),
        row("c.2", [1, *LOOP, 4], LOOP, "length"),  # for two reasons: counted under the first
        row("d", [1], [2, 9]),
        row("d.2", [1, 2, 9, 4], [5, 9], "length"),
    ]
    write_responses(tmp_path, rows)
    without, counts = read(tmp_path)
    assert without == [Document("a", [1, 2, 3, 4, 5, 9], [(4, 6)]), Document("d", [1, 2, 9, 4, 5, 9], [(1, 3)])]
    assert counts == counted(7, truncated=4, repeating=1, joined=3)
    assert [len(d.tokens) for d in usable(without, 32)] == [6, 3], "nothing after the last that is learned from"
    spans = [[(1, 3), (4, 6)], [(1, 3)], [(1, 31), (32, 62)], [(1, 3), (4, 6)]]
    everything, counts = read(tmp_path, "keep", 1.0)
    assert [d.spans for d in everything] == spans and counts == counted(7, joined=3)
    assert [d.spans for d in read(tmp_path, "keep")[0]] == [spans[0], spans[1], spans[3]]
    assert [d.id for d in read(tmp_path, "drop", 1.0)[0]] == ["a", "c", "d"]


def test_share_of_8_grams_that_occurred_before(tmp_path):
    share = repeated_share(LOOP)
    assert share == pytest.approx(20 / 23), "of 23 8-grams, three are new"
    assert repeated_share([*range(10), 99, *range(8)]) == pytest.approx(1 / 12)
    assert repeated_share(list(range(30))) == repeated_share([1] * 8) == repeated_share([]) == 0
    write_responses(tmp_path, [row("a", [1], LOOP), row("b", [1], [2])])
    assert [d.id for d in read(tmp_path, "drop", share)[0]] == ["a", "b"], "more than the share, not as much"
    assert [d.id for d in read(tmp_path, "drop", share - 1e-9)[0]] == ["b"]


def test_if_nothing_is_left_both_keys_and_the_way_out_are_named(tmp_path):
    write_responses(tmp_path, [row("a", [1], [2], "length"), row("b", [1], [2], "length"), row("c", [1], LOOP)])
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    for part in ("truncated=drop", "repeated_share=0.5", "3 responses 2 are truncated and 1 repeat", "truncated=keep"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [("truncated=some", "drop or keep"), ("repeated_share=-0.1", "0 to 1"), ("repeated_share=1.1", "0 to 1")],
)
def test_a_wrong_filter_is_named_with_its_remedy(word, remedy):
    with pytest.raises(UserError, match=f"distill.{word}: .*{remedy}"):
        load(None, [f"distill.{word}"])


def test_incomplete_changed_and_missing_responses_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path)
    write_responses(tmp_path, [row("a", [1, 2], [3])], complete=False)
    with pytest.raises(UserError, match="not complete"):
        read_manifest(tmp_path)
    write_responses(tmp_path, [row("a", [1, 2], [3])])
    pq.write_table(pa.Table.from_pylist([row("b", [1, 2], [3])]), tmp_path / "shard-00000.parquet")
    with pytest.raises(UserError, match="not what the manifest says"):
        read(tmp_path)
    (tmp_path / "shard-00000.parquet").unlink()
    with pytest.raises(UserError, match="missing"):
        read(tmp_path)
    (tmp_path / "manifest.json").write_text('{"shards": [], "complete": true}')
    with pytest.raises(UserError, match="no responses"):
        read(tmp_path)
