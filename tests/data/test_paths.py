import os
import pickle
import tracemalloc

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from mlpmatch_pl.data.files import PathTable

BYTES = os.fsdecode(b"images/\xff\xe4.png")  # a file name that is no UTF-8
PATHS = ["images/a.jpg", "", "Straße/図 像.png", BYTES, "", "𝄞.tif", " ", "a\nb", "images/a.jpg", ""]


@pytest.mark.parametrize("paths", [PATHS, PATHS[:1], ["", "", ""], []])
def test_a_table_is_the_list_it_was_made_of(paths):
    table = PathTable(paths)
    assert len(table) == len(paths)
    assert list(table) == paths
    assert [table[index] for index in range(len(paths))] == paths
    assert [table[index] for index in range(-len(paths), 0)] == paths


def test_a_table_can_be_made_of_any_iterable():
    assert list(PathTable(path for path in PATHS)) == PATHS
    assert list(PathTable(PathTable(PATHS))) == PATHS


@pytest.mark.parametrize("index", [3, -4, 10**6])
def test_an_index_outside_is_refused(index):
    with pytest.raises(IndexError, match=f"^index {index} of 3 paths$"):
        PathTable(["a", "b", "c"])[index]


def test_an_empty_table_has_no_index():
    for index in (0, -1):
        with pytest.raises(IndexError):
            PathTable([])[index]


def test_a_table_survives_pickling():
    assert list(pickle.loads(pickle.dumps(PathTable(PATHS)))) == PATHS


def tensors(table):
    return [value for value in vars(table).values() if isinstance(value, torch.Tensor)]


def test_many_paths_need_little_more_than_their_text():
    paths = [f"images/city_{index % 100:02d}/image_{index:06d}_leftImg8bit.png" for index in range(100_000)]
    text = sum(map(len, paths))
    tracemalloc.start()
    table = PathTable(paths)
    left = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    kept = sum(tensor.nbytes for tensor in tensors(table))
    assert text < kept <= text + 8 * (len(paths) + 1)  # the text, and where each path ends
    assert kept <= left < kept + 100_000  # and nothing beside the tensors


class Probe(Dataset):
    """Tells a worker's view of its table."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        shared = [tensor.is_shared() for tensor in tensors(self.table)]
        return {"path": self.table[index], "shared": shared, "private": private_bytes(tensors(self.table)[0])}


def private_bytes(tensor):
    """Return how much of a tensor's memory belongs to this process alone, and how much there is, as Linux counts it."""
    inside, private, total = False, 0, 0
    with open("/proc/self/smaps") as file:
        for line in file:
            name, _, value = line.partition(" ")
            if "-" in name and not name.endswith(":"):
                start, end = (int(part, 16) for part in name.split("-"))
                inside = start <= tensor.data_ptr() < end
            elif inside and name in ("Private_Clean:", "Private_Dirty:"):
                private += int(value.split()[0]) * 1024
            elif inside and name == "Rss:":
                total += int(value.split()[0]) * 1024
    return private, total


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux' account of memory")
def test_a_spawned_worker_shares_the_table_and_copies_nothing():
    paths = [f"{index:06d}/{'x' * 200}.png" for index in range(20_000)]
    table = PathTable(paths)
    loader = DataLoader(
        Probe(table), batch_size=None, sampler=range(0, 20_000, 500), num_workers=1, multiprocessing_context="spawn"
    )
    found = list(loader)
    assert [sample["path"] for sample in found] == paths[::500]
    assert all(all(sample["shared"]) for sample in found)
    private, resident = found[-1]["private"]
    assert resident > 1_000_000  # it was read all over
    assert private < 100_000
