from __future__ import annotations

import csv
import io
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raygard.config import DomainConfig
from raygard.domain import (
    PARTS,
    STAGE_READS,
    USER_PARTS,
    Domain,
    HalvesError,
    domain_fingerprint,
    load_domain,
    part_sizes,
)
from raygard.errors import RaygardError
from raygard.near_duplicates import group_near_duplicates, thumbnail
from raygard.pictures import digest, read_picture, read_pixels

Maker = Callable[..., Path]


def config(folder: Path, **changes: object) -> DomainConfig:
    options = {"data": str(folder), "illegal": ("a",), "legal": ("b",), "resolution": 16, "min_part": 1}
    return DomainConfig.model_validate({**options, **changes})


def hashes(domain: Domain, cls: str, parts: tuple[str, ...] = PARTS) -> list[str]:
    return [picture.sha256 for part in parts for picture in domain.parts[cls][part]]


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_parts_are_disjoint_complete_and_of_the_exact_sizes(imagefolder: Maker) -> None:
    settings = config(imagefolder({"a": 41, "b": 24}))
    domain = load_domain(settings)
    for cls, total in (("a", 41), ("b", 24)):
        found = hashes(domain, cls)
        assert len(found) == len(set(found)) == total
        assert domain.counts()[cls] == part_sizes(total, settings)
    assert part_sizes(24, settings) == {
        "learn_lower": 4, "learn_upper": 2, "select_adapt": 3, "select_reference": 3,
        "adapt": 6, "reference": 6,
    }  # fmt: skip


def test_parts_do_not_depend_on_file_names_or_order(imagefolder: Maker, tmp_path: Path) -> None:
    folder = imagefolder({"a": 24, "b": 24})
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    rows = []
    for number, row in enumerate(reversed(rows_of(folder))):
        shutil.copy(folder / row["file_name"], renamed / f"{number * 7919 % 997}.png")
        rows.append({**row, "file_name": f"{number * 7919 % 997}.png"})
    write_rows(renamed, rows)
    first, second = load_domain(config(folder)), load_domain(config(renamed))
    assert domain_fingerprint(first) == domain_fingerprint(second)
    assert hashes(first, "a") == hashes(second, "a")


def test_csv_and_class_folders_give_the_same_pictures_as_jsonl(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 24, "b": 24})
    expected = load_domain(config(folder))
    rows = rows_of(folder)
    (folder / "metadata.jsonl").unlink()
    by_folder = load_domain(config(folder))
    with (folder / "metadata.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert domain_fingerprint(load_domain(config(folder))) == domain_fingerprint(expected)
    assert hashes(by_folder, "b") == hashes(expected, "b")
    assert {p.caption for p in by_folder.parts["a"]["adapt"]} == {"a"}


def test_each_stage_reads_its_own_parts_only(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 24, "b": 24, "c": 5})
    domain = load_domain(config(folder, general=("c",)))
    for stage, part in itertools.product(STAGE_READS, (*PARTS, "general")):
        cls = "c" if part == "general" else "a"
        if part in STAGE_READS[stage]:
            assert domain.view(stage).pictures(cls, part) == domain.parts[cls][part]
        else:
            with pytest.raises(HalvesError, match=part):
                domain.view(stage).pictures(cls, part)
    searching = set().union(*(reads for stage, reads in STAGE_READS.items() if stage != "evaluate"))
    assert not searching & set(USER_PARTS)
    with pytest.raises(RaygardError, match="no class 'z'"):
        domain.view("learn").pictures("z", "learn_lower")


def test_roles(imagefolder: Maker) -> None:
    domain = load_domain(config(imagefolder({"a": 12, "b": 12, "c": 1}), general=("c",)))
    assert [domain.role(cls) for cls in "abc"] == ["illegal", "legal", "general"]


def test_near_duplicates_never_straddle_a_cut(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 20, "b": 24}, side=64)
    rows = rows_of(folder)
    families = {}
    for number in range(6):
        original = Image.open(folder / f"a/{number:03d}.png")
        smaller, squeezed = f"a/{number}-small.png", f"a/{number}-jpeg.jpg"
        original.resize((48, 48), Image.Resampling.BICUBIC).save(folder / smaller)
        original.save(folder / squeezed, quality=90)
        names = (f"a/{number:03d}.png", smaller, squeezed)
        families[number] = {digest(read_picture(folder / name)) for name in names}
        rows += [{"file_name": name, "text": "copy", "class": "a"} for name in names[1:]]
    write_rows(folder, rows)
    domain = load_domain(config(folder))
    for family in families.values():
        homes = {part for part in PARTS for p in domain.parts["a"][part] if p.sha256 in family}
        assert len(homes) == 1
    assert sum(domain.counts()["a"].values()) == 32


def test_a_small_change_in_one_place_is_another_picture() -> None:
    face = np.full((64, 64, 3), 200, dtype=np.uint8)
    other = face.copy()
    other[40:48, 24:40] = 60
    pictures = [Image.fromarray(face), Image.fromarray(other), Image.fromarray(face)]
    groups = group_near_duplicates([digest(p) for p in pictures], [thumbnail(p) for p in pictures])
    assert sorted(map(sorted, groups)) == [[0, 2], [1]]


def test_max_per_class_limits_before_cutting(imagefolder: Maker) -> None:
    domain = load_domain(config(imagefolder({"a": 40, "b": 40}), max_per_class=24))
    assert sum(domain.counts()["a"].values()) == 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"caption_column": "txt"},
            "no column 'txt'.*did you mean 'text'.*columns found: file_name, text, class",
        ),
        ({"class_column": "label"}, "no column 'label'"),
        ({"illegal": ("z",)}, "no pictures of class 'z'.*classes found: a, b"),
        ({"min_part": 4}, "class 'a' has 12 pictures.*learn_upper 1"),
        ({"data": "/no/such/folder"}, "no data folder at /no/such/folder"),
        ({"data": "zoo:emoji-stiles"}, "no bundled domain 'zoo:emoji-stiles'"),
    ],
)
def test_bad_settings_are_named(imagefolder: Maker, change: dict[str, object], message: str) -> None:
    with pytest.raises(RaygardError, match=message) as caught:
        load_domain(config(imagefolder({"a": 12, "b": 12}), **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [("/etc/passwd", "inside"), ("../x.png", "inside"), ("a/none.png", "does not exist"), ("a", "not a file"),
     ("link.png", "leaves the folder"), ("", "empty")],
)  # fmt: skip
def test_paths_that_leave_the_folder_or_lead_nowhere(
    imagefolder: Maker, tmp_path: Path, name: str, message: str
) -> None:
    folder = imagefolder({"a": 12, "b": 12})
    outside = tmp_path / "outside.png"
    shutil.copy(folder / "a/000.png", outside)
    (folder / "link.png").symlink_to(outside)
    write_rows(folder, [*rows_of(folder), {"file_name": name, "text": "x", "class": "a"}])
    with pytest.raises(RaygardError, match=f"line 25.*{message}"):
        load_domain(config(folder))


def test_empty_caption_and_broken_json_name_the_line(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 12, "b": 12})
    rows = rows_of(folder)
    write_rows(folder, [*rows[:3], {**rows[3], "text": " "}, *rows[4:]])
    with pytest.raises(RaygardError, match="line 4: 'text' is empty"):
        load_domain(config(folder))
    with (folder / "metadata.jsonl").open("a") as stream:
        stream.write("{broken\n")
    with pytest.raises(RaygardError, match="line 25 is not valid JSON"):
        load_domain(config(folder))


def test_unreadable_truncated_and_huge_pictures_are_named(imagefolder: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = imagefolder({"a": 12, "b": 12})
    victim = folder / "a/003.png"
    whole = victim.read_bytes()
    for data in (whole[: len(whole) // 2], b"not a picture", b""):
        victim.write_bytes(data)
        with pytest.raises(RaygardError, match=r"a/003\.png"):
            load_domain(config(folder))
    victim.write_bytes(whole)
    load_domain(config(folder))
    monkeypatch.setattr("raygard.pictures.MAX_PIXELS", 200)
    with pytest.raises(RaygardError, match=r"a/.*\.png"):
        load_domain(config(folder))


def test_only_the_classes_named_are_read(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 12, "b": 12, "c": 3})
    (folder / "c/001.png").write_bytes(b"broken")
    assert set(load_domain(config(folder)).parts) == {"a", "b"}


def test_one_picture_in_two_roles_is_refused(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 12, "b": 12})
    shutil.copy(folder / "a/000.png", folder / "b/000.png")
    with pytest.raises(RaygardError, match=r"a/000\.png and .*b/000\.png are the same picture, in illegal"):
        load_domain(config(folder))


def test_one_picture_in_both_halves_of_two_classes_is_refused(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 40, "b": 12})
    of_user = load_domain(config(folder)).parts["a"]["reference"]
    names = [picture.path.relative_to(folder).as_posix() for picture in of_user]
    rows = rows_of(folder)
    write_rows(folder, rows + [{"file_name": name, "text": "again", "class": "c"} for name in names])
    with pytest.raises(RaygardError, match="are the same picture, in the user half of class 'a' and the publisher"):
        load_domain(config(folder, illegal=("a", "c")))


def test_transparency_is_laid_on_white_and_rotation_is_undone(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_picture(tmp_path / "clear.png")).min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.new("RGB", (8, 4)).save(data, "PNG", exif=exif)
    (tmp_path / "turned.png").write_bytes(data.getvalue())
    assert read_picture(tmp_path / "turned.png").size == (4, 8)


def test_read_pixels_resizes_the_short_side_and_crops(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 3), dtype=np.uint8)
    wide[:, 16:48] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    middle = read_pixels(tmp_path / "wide.png", 16)
    assert middle.shape == (16, 16, 3) and middle[:, 2:-2].min() == 255
    drawn = read_pixels(tmp_path / "wide.png", 16, center_crop=False)
    assert np.array_equal(drawn, read_pixels(tmp_path / "wide.png", 16, center_crop=False))


def test_users_get_of_an_unseen_class_what_they_get_of_others_and_learning_gets_nothing(imagefolder: Maker) -> None:
    settings = config(imagefolder({"a": 24, "b": 24, "c": 24}), unseen=("c",))
    domain = load_domain(settings)
    other = load_domain(settings.model_copy(update={"legal": ("b", "c"), "unseen": ()}))
    assert domain.role("c") == "unseen" and settings.adapted == (("a", "illegal"), ("b", "legal"), ("c", "legal"))
    assert {cls for cls, _ in domain.learn_parts} == {"a", "b"}
    learned = ("learn_lower", "learn_upper")
    kept = {part: pictures for part, pictures in other.parts["c"].items() if part not in learned}
    assert domain.parts["c"] == kept and all(kept.values())
    for stage in ("learn", "values", "traces"):
        with pytest.raises(HalvesError, match="class 'c' is unseen"):
            domain.view(stage).pictures("c", "learn_lower")
    assert domain_fingerprint(domain) != domain_fingerprint(other)


def test_a_picture_of_a_class_that_is_learned_from_is_not_unseen(imagefolder: Maker) -> None:
    folder = imagefolder({"a": 12, "b": 12, "c": 12})
    rows = rows_of(folder)
    first, second = (next(row for row in rows if row["class"] == cls) for cls in ("b", "c"))
    shutil.copyfile(folder / first["file_name"], folder / second["file_name"])
    with pytest.raises(RaygardError, match="in legal class 'b' and unseen class 'c'; remove one"):
        load_domain(config(folder, unseen=("c",)))
