import numpy as np
import pandas as pd
import pytest
import torch

from itwin import dataset
from itwin.errors import DataError


def test_a_pair_becomes_an_npz_of_the_workers_types(tmp_path):
    x, y = np.random.rand(10, 3), torch.arange(10, dtype=torch.int32)
    data, batch = dataset.document((x, y), tmp_path)
    with np.load(data["npz"]) as archive:
        assert archive["input"].dtype == np.float32 and archive["target"].dtype == np.int64
        np.testing.assert_allclose(archive["input"], x, rtol=1e-6)
    assert batch["input"].shape == (4, 3) and batch["target"].dtype == torch.int64


def test_named_arrays_and_datasets(tmp_path):
    x, y = torch.randn(6, 2), torch.randn(6)
    for data in ({"input": x, "target": y}, torch.utils.data.TensorDataset(x, y), list_dataset(x, y),
                 torch.utils.data.Subset(torch.utils.data.TensorDataset(x, y), range(6))):
        document, _ = dataset.document(data, tmp_path)
        with np.load(document["npz"]) as archive:
            np.testing.assert_array_equal(archive["input"], x)
            np.testing.assert_array_equal(archive["target"], y)


def list_dataset(x, y):
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            return x[index].numpy(), float(y[index])
    return Own()


def test_a_frame_becomes_csv(tmp_path):
    frame = pd.DataFrame({"a": [1.5, 2.5], "b": [True, False], "kind": [0, 1]})
    data, batch = dataset.document(frame, tmp_path, target="kind", classes=True)
    assert data["csv"]["inputs"] == ["a", "b"] and data["csv"]["targets"] == ["kind"] and data["csv"]["target_is_class"]
    assert pd.read_csv(data["csv"]["path"]).b.tolist() == [1, 0]
    assert batch["input"].shape == (2, 2) and batch["target"].tolist() == [0, 1]
    data, batch = dataset.document(frame, tmp_path, target=["kind"])
    assert not data["csv"]["target_is_class"] and batch["target"].shape == (2, 1)


def test_paths_and_spec_dicts(tmp_path):
    np.savez(tmp_path / "x.npz", input=np.zeros((3, 2)), target=np.zeros(3))
    data, batch = dataset.document(tmp_path / "x.npz", tmp_path)
    assert data == {"npz": str(tmp_path / "x.npz")} and batch["input"].shape == (3, 2)
    assert dataset.document("site:/data/winds.cdf", tmp_path) == ({"netcdf": "site:/data/winds.cdf"}, None)
    synthetic = {"synthetic": {"samples": 10}}
    assert dataset.document(synthetic, tmp_path) == (synthetic, None)


@pytest.mark.parametrize("data, target, message", [
    ((np.zeros((3, 2)), np.zeros(4)), None, "differ in their number of samples.*input 3, target 4"),
    ((np.zeros((0, 2)), np.zeros(0)), None, "no samples"),
    ((np.zeros(3), np.array(["a", "b", "c"])), None, "targets holds <U1, which is no number"),
    ((np.float32(3), np.zeros(3)), None, "inputs is a single number"),
    ((np.array([2**64 - 1], dtype=np.uint64), np.zeros(1)), None, "beyond 64-bit"),
    ({"x": np.zeros(3), "y": np.zeros(3)}, None, "named x, y; .*must be named 'input'"),
    ({"input": np.zeros(3), "k": 3}, None, r"data\['k'\] is no array"),
    ("a.csv", None, "which columns of a.csv"),
    ("a.txt", None, "says no known format"),
    (3, None, "data=int cannot be handed over"),
    ((np.zeros(3), np.zeros(3)), "y", "target= names the target columns"),
    (pd.DataFrame({"a": [1.0]}), None, "which column is the target.*columns: a"),
    (pd.DataFrame({"price": [1.0], "a": [2.0]}), "prce", "did you mean 'price'"),
    (pd.DataFrame({"y": [1.0], "a": ["x"]}), "y", "column 'a' holds object, not numbers"),
    (pd.DataFrame({"y": [1.0], "a": [float("nan")]}), "y", "column 'a' has empty cells"),
    (pd.DataFrame({"y": [1.0]}), "y", "no input columns"),
    (torch.utils.data.TensorDataset(torch.zeros(3)), None, "1 tensors per sample"),
])
def test_what_cannot_be_handed_over(tmp_path, data, target, message):
    with pytest.raises(DataError, match=message):
        dataset.document(data, tmp_path, target)


def test_samples_of_different_shapes(tmp_path):
    ragged = torch.utils.data.ConcatDataset([torch.utils.data.TensorDataset(torch.zeros(1, 2), torch.zeros(1)),
                                             torch.utils.data.TensorDataset(torch.zeros(1, 3), torch.zeros(1))])
    with pytest.raises(DataError, match="sample 1 of the Dataset has shape"):
        dataset.document(ragged, tmp_path)


def test_nan_is_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="inputs holds NaN"):
        dataset.document((np.array([float("nan")]), np.zeros(1)), tmp_path)


def test_split_spellings():
    assert dataset.split_document({"train": (0, 108), "test": range(108, 132), "validation": slice(None, 5)}) == {
        "train": "0..108", "test": "108..132", "validation": "0..5"}
    assert dataset.split_document({"test_fraction": 0.2}) == {"test_fraction": 0.2}
    for wrong in ({"train": slice(0, 9, 2)}, {"train": (1, 2, 3)}, {"train": slice(3, None)}, "0..5"):
        with pytest.raises(DataError):
            dataset.split_document(wrong)
