import pytest
from msq.profiles.errors import ProfileError
from msq.profiles.journal import JOURNAL_FILE, Journal, make_directory
from msq.profiles.schema import MANIFEST_FILE

JOB = {"model": "abc", "seed": 0}


def test_rows_survive_and_are_found_again(tmp_path):
    path = tmp_path / "rows"
    with Journal(path, JOB) as journal:
        journal.add(("error", "layer", 3), [0.5, 7])
        assert ("error", "layer", 3) in journal
    with Journal(path, JOB) as journal:
        assert journal["error", "layer", 3] == [0.5, 7]
        assert journal.count("error") == 1 and journal.count("latency") == 0


def test_a_row_cut_short_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "rows"
    with Journal(path, JOB) as journal:
        for index in range(3):
            journal.add(("row", index), index / 3)
    content = path.read_bytes()
    head = content.index(b"\n") + 1
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        with Journal(path, JOB) as journal:
            whole = content[head:cut].count(b"\n")
            assert journal.count("row") == (whole if cut >= head else 0)
            journal.add(("row", "new"), 1.0)
        with Journal(path, JOB) as journal:
            assert ("row", "new") in journal


def test_a_job_that_fails_before_its_first_row_leaves_nothing(tmp_path):
    (tmp_path / "p").mkdir()
    with pytest.raises(ZeroDivisionError), Journal(tmp_path / "p" / "rows", JOB):
        1 / 0  # noqa: B018
    assert not (tmp_path / "p").exists()
    (tmp_path / "p").mkdir()
    with pytest.raises(ZeroDivisionError), Journal(tmp_path / "p" / "rows", JOB) as journal:
        journal.add(("row", 0), 1.0)
        1 / 0  # noqa: B018
    with Journal(tmp_path / "p" / "rows", JOB) as journal:
        assert ("row", 0) in journal


def test_another_job_is_refused_by_name_of_what_differs(tmp_path):
    path = tmp_path / "rows"
    with Journal(path, JOB) as journal:
        journal.add(("row", 0), 1.0)
    with pytest.raises(ProfileError, match=r"other settings \(seed\)"):
        Journal(path, {**JOB, "seed": 1})
    path.write_text("something else\nand more\n")
    with pytest.raises(ProfileError, match="not a profiling journal"):
        Journal(path, JOB)


def test_two_processes_do_not_share_a_journal(tmp_path):
    with Journal(tmp_path / "rows", JOB), pytest.raises(ProfileError, match="another msq profile"):
        Journal(tmp_path / "rows", JOB)


@pytest.mark.parametrize("restart", [False, True])
def test_a_directory_of_others_is_left_alone(tmp_path, restart):
    (tmp_path / "hessians").mkdir()
    (tmp_path / "layers.csv").write_text("mine")
    with pytest.raises(ProfileError, match=r"holds hessians and no profile; choose a new or empty directory"):
        make_directory(tmp_path, restart=restart)
    assert (tmp_path / "layers.csv").read_text() == "mine"
    (tmp_path / JOURNAL_FILE).touch()
    make_directory(tmp_path, restart=restart)


def test_a_directory_with_only_a_table_of_others_is_left_alone(tmp_path):
    (tmp_path / "layers.csv").write_text("mine")
    with pytest.raises(ProfileError, match=r"holds layers.csv and no profile"):
        make_directory(tmp_path, restart=True)


def test_a_profile_is_replaced_beside_notes_and_after_a_restart_that_failed(tmp_path):
    for name in (MANIFEST_FILE, "layers.csv", "plan.yaml"):
        (tmp_path / name).touch()
    make_directory(tmp_path, restart=True)
    assert {path.name for path in tmp_path.iterdir()} == {JOURNAL_FILE, "layers.csv", "plan.yaml"}
    for restart in (True, False):  # killed before its first row
        make_directory(tmp_path, restart=restart)
    with Journal(tmp_path / JOURNAL_FILE, JOB) as journal:
        assert journal.count("row") == 0
    (tmp_path / JOURNAL_FILE).unlink()
    (tmp_path / "plan.yaml").unlink()
    (tmp_path / "layers.csv").rename(tmp_path / ".layers.csv.0123456789abcdef")
    make_directory(tmp_path, restart=False)


def test_restart_drops_the_rows(tmp_path):
    with Journal(tmp_path / "rows", JOB) as journal:
        journal.add(("row", 0), 1.0)
    with Journal(tmp_path / "rows", {**JOB, "seed": 5}, restart=True) as journal:
        assert journal.count("row") == 0
