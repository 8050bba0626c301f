"""Packing, masks, the split, and batches as a pure function of the step."""

import json
import random
from itertools import chain, pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import UserError
from pipeline.rundir import sha256_of
from pipeline.training.data import (
    Document,
    StepBatches,
    pack,
    read_documents,
    read_manifest,
    split,
    usable,
    validation_batches,
)


def documents(count: int, seed: int = 0, longest: int = 30) -> list[Document]:
    rng = random.Random(seed)
    made = []
    for i in range(count):
        length = rng.randint(2, longest)
        made.append(Document(f"p-{i}", [rng.randrange(1, 100) for _ in range(length)], rng.randint(1, length - 1)))
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
    # The masked places are those whose next token is a response token, up to the last but one token.
    expected = [(d.tokens, list(range(d.prompt_length - 1, len(d.tokens) - 1))) for d in docs]
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
    docs = [Document("long", tokens, 5), Document("prompt too long", tokens, 35), Document("no answer", tokens[:2], 2)]
    (kept,) = usable(docs, 32)
    assert kept.id == "long" and kept.tokens == list(range(1, 33))
    with pytest.raises(UserError, match="sequence_length=4"):
        usable(docs[:2], 4)


def test_split_depends_on_the_id_alone_and_leaves_neither_side_empty():
    docs = documents(200)
    train, validation = split(docs, 0.1)
    assert 5 <= len(validation) <= 40 and len(train) + len(validation) == 200
    again = split(random.Random(1).sample(docs, 200)[:100], 0.1)[1]
    assert {d.id for d in again} <= {d.id for d in validation}
    assert [len(side) for side in split(docs[:2], 1e-9)] == [1, 1]
    assert [len(side) for side in split(docs[:2], 0.999999)] == [1, 1]
    with pytest.raises(UserError, match="at least 2"):
        split(docs[:1], 0.5)


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
    ranks = [validation_batches(count, 8, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [i for batches in ranks for batch in batches for i in batch if i >= 0]
    assert sorted(seen) == list(range(count))


def test_a_filler_sequence_counts_for_nothing():
    packed = pack(documents(10), 32)
    batch = packed[[0, -1]]
    assert batch["mask_BT"][0].any() and not batch["mask_BT"][1].any()
    assert batch["tokens"] == packed.lengths_S[0]


def write_responses(folder, rows, **manifest):
    pq.write_table(pa.Table.from_pylist(rows), folder / "shard-00000.parquet")
    shard = {"file": "shard-00000.parquet", "rows": len(rows), "sha256": sha256_of(folder / "shard-00000.parquet")}
    (folder / "manifest.json").write_text(json.dumps({"shards": [shard], "complete": True} | manifest))


def test_reading_responses(tmp_path):
    write_responses(tmp_path, [{"id": "a", "prompt_ids": [1, 2], "response_ids": [3]}])
    assert read_documents(tmp_path, read_manifest(tmp_path)) == [Document("a", [1, 2, 3], 2)]


def test_incomplete_changed_and_missing_responses_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path)
    row = {"id": "a", "prompt_ids": [1, 2], "response_ids": [3]}
    write_responses(tmp_path, [row], complete=False)
    with pytest.raises(UserError, match="not complete"):
        read_manifest(tmp_path)
    write_responses(tmp_path, [row])
    pq.write_table(pa.Table.from_pylist([row | {"id": "b"}]), tmp_path / "shard-00000.parquet")
    with pytest.raises(UserError, match="not what the manifest says"):
        read_documents(tmp_path, read_manifest(tmp_path))
    (tmp_path / "shard-00000.parquet").unlink()
    with pytest.raises(UserError, match="missing"):
        read_documents(tmp_path, read_manifest(tmp_path))
    (tmp_path / "manifest.json").write_text('{"shards": [], "complete": true}')
    with pytest.raises(UserError, match="no responses"):
        read_documents(tmp_path, read_manifest(tmp_path))
