from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from msq.kernels.specs import Family, QuantizerSpec, TrellisCode
from msq.profiles.errors import ProfileError
from msq.profiles.files import read_yaml, sha256_file, write_atomic
from msq.profiles.schema import ProfileManifest
from msq.profiles.tables import load_profile, save_profile

Tables = dict[str, pd.DataFrame]


def edit_manifest(directory: Path, edit: Callable[[dict], object]) -> None:
    value = yaml.safe_load((directory / "profile.yaml").read_text())
    edit(value)
    (directory / "profile.yaml").write_text(yaml.safe_dump(value))


def edit_table(directory: Path, name: str, edit: Callable[[str], str]) -> None:
    """Changes a table and leaves no digests behind, as in a profile made by hand."""
    path = directory / name
    before = path.read_text()
    path.write_text(edit(before))
    assert path.read_text() != before
    edit_manifest(directory, lambda value: value.pop("files", None))


def test_what_is_saved_is_what_is_loaded(directory: Path, tables: Tables) -> None:
    profile = load_profile(directory)
    assert profile.manifest.latency is not None
    assert profile.manifest.latency.overhead_us == {1: 10.5, 8: 12.25}
    for name, frame in tables.items():
        loaded = getattr(profile, name)
        key = [c for c in frame.columns if frame[c].dtype != np.float64]
        for column in frame.columns:
            expected = frame.sort_values(key)[column].tolist()
            assert loaded.sort_values(key)[column].tolist() == expected, (name, column)  # floats to the last bit


def test_digests_are_of_the_files(directory: Path) -> None:
    profile = load_profile(directory)
    assert profile.manifest.files == {
        name: sha256_file(directory / name) for name in ("layers.csv", "quantizers.csv", "errors.csv", "latency.csv")
    }
    lines = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in sorted(directory.iterdir())]
    assert profile.digest == hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def test_digest_changes_with_content(directory: Path, manifest: ProfileManifest, tables: Tables) -> None:
    before = load_profile(directory).digest
    tables["layers"].loc[0, "sensitivity"] += 1e-15
    assert save_profile(directory, manifest, **tables).digest != before


def test_row_order_does_not_matter(directory: Path, tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> None:
    shuffled = {name: frame.sample(frac=1, random_state=1) for name, frame in tables.items()}
    assert shuffled["layers"]["layer"].tolist() != tables["layers"]["layer"].tolist()
    first, second = load_profile(directory), save_profile(tmp_path / "other", manifest, **shuffled)
    for name in tables:
        pd.testing.assert_frame_equal(getattr(first, name), getattr(second, name))
    assert first.layers["role"].tolist()[:7] == tables["layers"]["role"].tolist()[:7]


def test_pattern_roles_are_put_in_order(directory: Path) -> None:
    edit_table(directory, "latency.csv", lambda text: text.replace("q_proj+k_proj", "k_proj+q_proj"))
    latency = load_profile(directory).latency
    assert latency is not None
    assert set(latency["pattern"]) == {"q_proj", "q_proj+k_proj"}


def test_specs_come_from_fields(directory: Path) -> None:
    edit_table(directory, "quantizers.csv", lambda text: text.replace("nuq-4,nuq,4.0", "tcq-9,nuq,5.0"))
    edit_table(directory, "errors.csv", lambda text: text.replace("nuq-4", "tcq-9"))
    edit_table(directory, "latency.csv", lambda text: text.replace("nuq-4", "tcq-9"))
    profile = load_profile(directory)
    assert profile.spec("tcq-9") == QuantizerSpec(Family.NUQ, 5.0, 0)
    without_columns = QuantizerSpec(Family.TCQ, 3.0, 16, code=TrellisCode.HYB)  # what there was before them
    assert profile.spec("tcq-3") == without_columns
    with pytest.raises(ProfileError, match=r"no quantizer 'tcq-4'; near matches: .*tcq-3"):
        profile.spec("tcq-4")


def test_state_bits_are_read(directory: Path) -> None:
    lines = (directory / "quantizers.csv").read_text().splitlines()
    states = ["state_bits", "0", "0", "12"]
    text = "\n".join(f"{line},{state}" for line, state in zip(lines, states, strict=True))
    edit_table(directory, "quantizers.csv", lambda _: text)
    assert load_profile(directory).spec("tcq-3").state_bits == 12


def test_matrices_prefer_what_was_measured(directory: Path) -> None:
    profile = load_profile(directory)
    row, column = profile.layer_names.index("b0.q_proj"), profile.labels.index("nuq-4")
    assert profile.error_matrix[row, column] == 0.1 + 0.2
    assert profile.size_matrix[row, column] == 2345
    row = profile.layer_names.index("b1.k_proj")
    assert profile.error_matrix[row, column] == 0.0095
    assert profile.size_matrix[row, column] == 32 * 64 * 4 / 8 + 32


def test_minimal_profile(tmp_path: Path, manifest: ProfileManifest, tables: Tables) -> None:
    loss = manifest.loss.model_copy(update={"error": "gaussian"})
    bare = manifest.model_copy(update={"loss": loss, "latency": None})
    layers = tables["layers"].drop(columns="standard_error")
    save_profile(tmp_path / "p", bare, layers, tables["quantizers"])
    edit_manifest(tmp_path / "p", lambda value: value.pop("files"))
    profile = load_profile(tmp_path / "p")
    assert profile.latency is None
    assert profile.errors is None
    assert profile.batch_sizes == ()


def test_saving_removes_a_table_that_is_gone(directory: Path, manifest: ProfileManifest, tables: Tables) -> None:
    loss = manifest.loss.model_copy(update={"error": "gaussian"})
    bare = manifest.model_copy(update={"loss": loss, "latency": None})
    save_profile(directory, bare, tables["layers"], tables["quantizers"])
    assert sorted(path.name for path in directory.iterdir()) == ["layers.csv", "profile.yaml", "quantizers.csv"]


def test_nothing_is_written_when_a_table_is_wrong(directory: Path, manifest: ProfileManifest, tables: Tables) -> None:
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    tables["layers"].loc[3, "sensitivity"] = np.nan
    with pytest.raises(ProfileError, match="row 4: sensitivity should be a finite number"):
        save_profile(directory, manifest, **tables)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def replace(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new, 1)


def add(row: str) -> Callable[[str], str]:
    return lambda text: text + row


def without_row(start: str) -> Callable[[str], str]:
    return lambda text: "".join(line for line in text.splitlines(True) if not line.startswith(start))


def without_column(name: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        rows = [line.split(",") for line in text.splitlines()]
        place = rows[0].index(name)
        return "\n".join(",".join(row[:place] + row[place + 1 :]) for row in rows)

    return edit


def twice(start: str) -> Callable[[str], str]:
    return lambda text: text + next(line for line in text.splitlines(True) if line.startswith(start))


WRONG_TABLES = [
    ("layers.csv", replace("sensitivity", "sensitivty"), "unknown column 'sensitivty'; did you mean 'sensitivity'"),
    ("layers.csv", without_column("role"), "the column role is missing"),
    ("layers.csv", replace("role", "layer"), "names the column 'layer' twice"),
    ("layers.csv", lambda t: t.splitlines()[0] + "\n", "has no rows"),
    ("layers.csv", lambda _: "", "is empty"),
    ("layers.csv", lambda t: t[:-30], "row 14: expected 8 cells .* may be cut short"),
    ("layers.csv", without_row("b1.k_proj"), "expected one k_proj in block 1 of a LlamaForCausalLM, got 0"),
    ("layers.csv", twice("b1.k_proj"), "row 15: b1.k_proj is given twice"),
    ("layers.csv", replace("b1.k_proj,1", "b1.k_proj,2"), "b1.k_proj is in block 2, the manifest counts 2 blocks"),
    ("layers.csv", replace("q_proj,64,64", "q_proj,0,64"), "out_features should be .* of at least 1; got '0'"),
    ("layers.csv", replace("q_proj,64,64", "q_proj,64,64.5"), "in_features should be a whole number"),
    ("layers.csv", replace("q_proj,64,64", "q_proj,64,99999999999999999999"), "in_features should be"),
    ("layers.csv", replace("0.3333333333333333", "nan"), "row 1: sensitivity should be a finite number .* got 'nan'"),
    ("layers.csv", replace("0.3333333333333333", "inf"), "sensitivity should be a finite number"),
    ("layers.csv", replace("0.3333333333333333", "-1e-9"), "sensitivity should be .* at least 0; got '-1e-9'"),
    ("layers.csv", replace("0.3333333333333333", "low"), "sensitivity should be .* got 'low'"),
    ("layers.csv", replace("q_proj,64,64", "q_proj,64,32"), "fusion group b0.qkv differ in in_features"),
    ("layers.csv", replace("b1.qkv", "b0.qkv"), "fusion group b0.qkv are in different blocks"),
    ("layers.csv", replace("b0.q_proj", ""), "row 1: layer is blank"),
    ("quantizers.csv", replace("nuq,2.0", "nuk,2.0"), "nuq-2 is of an unknown family 'nuk'; known: int, nuq"),
    ("quantizers.csv", replace("nuq,2.0", "nuq,2.5"), "nuq-2: nuq comes in 2 to 8 bits"),
    ("quantizers.csv", replace("nuq,2.0", "nuq,4.0"), "nuq-4 has the fields of another quantizer"),
    ("quantizers.csv", replace("0.1175", "-0.1"), "gaussian_error should be"),
    ("errors.csv", replace("b0.q_proj", "b0.q_porj"), "layers.csv has no layer 'b0.q_porj'; near matches: b0.q_proj"),
    ("errors.csv", replace("nuq-4", "nuq-3"), "quantizers.csv has no quantizer 'nuq-3'; near matches: nuq-"),
    ("errors.csv", twice("b0.q_proj"), "b0.q_proj, nuq-4 is given twice"),
    ("latency.csv", replace("nuq-2", "nuq-3"), "quantizers.csv has no quantizer 'nuq-3'"),
    ("latency.csv", replace("0.3333333333333333", "-0.5"), "latency_us should be .* above 0; got '-0.5'"),
    ("latency.csv", replace("q_proj,64", "q_porj,64"), "'q_porj' can't run: no layer has the role"),
    ("latency.csv", lambda t: t.replace(",8,", ",4,"), r"covers batch sizes \[1, 4\], the manifest lists \[1, 8\]"),
    ("latency.csv", add("k_proj+q_proj,96,64,nuq-2,cuda_core,1,2.0\n"), "measured twice, its roles in another"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "edit", "message"), WRONG_TABLES)
def test_wrong_tables_are_refused(directory: Path, name: str, edit: Callable[[str], str], message: str) -> None:
    edit_table(directory, name, edit)
    with pytest.raises(ProfileError, match=message):
        load_profile(directory)


WRONG_MANIFESTS = [
    (lambda m: m.update(schema_version=2), "schema_version 2, this msq reads 1; upgrade msq"),
    (lambda m: m.pop("schema_version"), "'schema_version' is missing"),
    (lambda m: m.update(modle=1), "unknown field 'modle'; did you mean 'model'"),
    (lambda m: m["loss"].pop("tokens"), "the field 'loss.tokens' is missing"),
    (lambda m: m["loss"].update(noise=float("nan")), "the field 'loss.noise' is wrong: .*finite"),
    (lambda m: m["model"].update(blocks=3), "expected one q_proj in block 2 .* got 0"),
    (
        lambda m: m["latency"].update(calibrated={4: {"overhead_us": 1, "product_us": 0, "runs": 1, "context": 8}}),
        "calibrated should have batch sizes among",
    ),
    (lambda m: m["latency"]["overhead_us"].pop(8), "overhead_us should have one entry for each"),
    (lambda m: m.pop("latency"), "no latency part, yet latency.csv is there"),
    (lambda m: m.pop("loss"), "no loss part, yet there is errors.csv"),
    (lambda m: m["files"].pop("layers.csv"), "does not list layers.csv"),
    (lambda m: m["files"].update({"layers.csv": "0" * 64}), r"layers.csv was changed after .* expected 000000000000…"),
    (lambda m: m["files"].update({"../x": "0" * 64}), "lists '../x', which is not a table"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), WRONG_MANIFESTS)
def test_wrong_manifests_are_refused(directory: Path, edit: Callable[[dict], object], message: str) -> None:
    edit_manifest(directory, edit)
    with pytest.raises(ProfileError, match=message):
        load_profile(directory)


@pytest.mark.parametrize(("name", "message"), [
    ("profile.yaml", "can't read the profile manifest .* no such file"),
    ("layers.csv", "can't read the profile table .*layers.csv: there is no such file"),
    ("errors.csv", "lists errors.csv, which is missing"),
])  # fmt: skip
def test_missing_files_are_named(directory: Path, name: str, message: str) -> None:
    (directory / name).unlink()
    with pytest.raises(ProfileError, match=message):
        load_profile(directory)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"expected a profile directory at .*nowhere; there is none"):
        load_profile(tmp_path / "nowhere")


@pytest.mark.parametrize(("content", "message"), [
    (b"a: [1", "not valid YAML at line"),
    (b"a: 1\na: 2\n", "not valid YAML at line 2: the key 'a' is given twice"),
    (b"- 1\n", "should hold named fields .* got a list"),
    (b"", "got an empty file"),
    (b"\xff\xfe\x00", "not valid YAML"),
])  # fmt: skip
def test_corrupt_yaml_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ProfileError, match=message):
        read_yaml(tmp_path / "x.yaml", "test file")


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "before")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(ProfileError, match="No space left"):
        write_atomic(path, "after")
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_write_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="not a regular file"):
        write_atomic(tmp_path, "x")
    with pytest.raises(ProfileError, match=r"directory .* does not exist"):
        write_atomic(tmp_path / "a" / "b", "x")


def test_write_follows_links(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"
