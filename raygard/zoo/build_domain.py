"""Build the bundled domain `emoji_styles`: the same concepts drawn in ten styles.

    python raygard/zoo/build_domain.py --out raygard/zoo/emoji_styles

Needs `npm`, Pillow and resvg-py. Every package is pinned and fetched with `npm pack`; the licence each one
declares is compared with the licence recorded here, and a difference stops the build. `concepts.csv` lists
the concepts, and the name FxEmoji files one under where it does not follow Unicode. The result does not
depend on the machine.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import resvg_py
from PIL import Image, ImageDraw, ImageFont

from raygard.pictures import decode_picture

SIDE = 64
FILL = 60


@dataclass(frozen=True)
class Style:
    """One design team: where its drawings come from and what its licence is called."""

    slug: str
    name: str
    package: str
    licence: str
    layout: str
    licence_file: str = "package/package.json"


STYLES = (
    Style("emojione", "EmojiOne", "@iconify-json/emojione@1.2.3", "CC-BY-4.0", "iconify"),
    Style(
        "emojione_monotone",
        "EmojiOne Monotone",
        "@iconify-json/emojione-monotone@1.2.1",
        "CC-BY-4.0",
        "iconify",
    ),
    Style("fluent_3d", "Fluent 3D", "@lobehub/fluent-emoji-3d@1.1.0", "MIT", "package/assets/{lower}.webp"),
    Style(
        "fluent_high_contrast",
        "Fluent High Contrast",
        "@iconify-json/fluent-emoji-high-contrast@1.2.6",
        "MIT",
        "iconify",
    ),
    Style("fluent_flat", "Fluent Flat", "@iconify-json/fluent-emoji-flat@1.2.6", "MIT", "iconify"),
    Style("fxemoji", "FxEmoji", "@iconify-json/fxemoji@1.2.2", "Apache-2.0", "iconify"),
    Style(
        "noto",
        "Noto",
        "emoji-datasource-google@16.0.0",
        "Apache-2.0",
        "package/img/google/64/{lower}.png",
        "package/README.md",
    ),
    Style(
        "noto_line",
        "Noto Line",
        "@expo-google-fonts/noto-emoji@0.4.7",
        "OFL-1.1",
        "package/400Regular/NotoEmoji_400Regular.ttf",
        "package/LICENSE_FONT",
    ),
    Style("openmoji", "OpenMoji", "openmoji@17.0.0", "CC-BY-SA-4.0", "package/color/svg/{upper}.svg"),
    Style(
        "twemoji",
        "Twemoji",
        "emoji-datasource-twitter@16.0.0",
        "CC-BY-4.0",
        "package/img/twitter/64/{lower}.png",
        "package/README.md",
    ),
)

# What a README that is not machine-readable has to say for the licence to hold.
LICENCE_SENTENCES = {
    "noto": "Android/Google/Noto images, are available under the [Apache License 2.0]",
    "noto_line": "SIL OPEN FONT LICENSE Version 1.1",
    "twemoji": "Twitter images are available under the [Creative Commons Attribution 4.0 license]",
}


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def fetch(package: str, into: Path) -> tarfile.TarFile:
    done = subprocess.run(
        ["npm", "pack", package, "--silent", "--pack-destination", str(into)],
        check=True,
        capture_output=True,
        text=True,
    )
    return tarfile.open(into / done.stdout.strip().splitlines()[-1])


def read(archive: tarfile.TarFile, path: str) -> bytes:
    member = archive.extractfile(path)
    if member is None:
        raise FileNotFoundError(path)
    return member.read()


def check_licence(style: Style, archive: tarfile.TarFile) -> None:
    text = read(archive, style.licence_file).decode()
    if style.slug in LICENCE_SENTENCES:
        holds = LICENCE_SENTENCES[style.slug] in text
    elif style.layout == "iconify":
        holds = json.loads(read(archive, "package/info.json"))["license"]["spdx"] == style.licence
    else:
        holds = json.loads(text)["license"] == style.licence
    if not holds:
        raise SystemExit(f"{style.package} no longer declares {style.licence}")


def rasterise(data: bytes, name: str) -> Image.Image:
    """The drawing in a file of a package; name: its path there."""
    if name.endswith(".svg"):
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=256, height=256, skip_system_fonts=True))
        name = f"{name}.png"
    return decode_picture(data, name).convert("RGBA")


def square(picture: Image.Image) -> Image.Image:
    """Crop to the drawing, scale its longer side to FILL and centre it on white."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox()
    if box is None:
        raise ValueError("empty picture")
    drawing = picture.crop(box)
    scale = FILL / max(drawing.size)
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    drawing = drawing.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SIDE, SIDE), "white")
    canvas.alpha_composite(drawing, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return canvas.convert("RGB")


@dataclass(frozen=True)
class Concept:
    """A row of concepts.csv, with every name the packages may file it under, the preferred one first."""

    code: str
    concept: str
    group: str
    names: tuple[str, ...]
    overrides: dict[str, str]


Lookup = Callable[[Concept], Image.Image | None]


def iconify_lookup(style: Style, archive: tarfile.TarFile) -> Lookup:
    icons = json.loads(read(archive, "package/icons.json"))
    bodies = {plain(name): icon for name, icon in icons["icons"].items()}
    for name, alias in icons.get("aliases", {}).items():
        bodies.setdefault(plain(name), icons["icons"].get(alias["parent"]))

    def lookup(concept: Concept) -> Image.Image | None:
        override = concept.overrides.get(style.slug)
        wanted = [override] if override else [plain(name) for name in concept.names]
        icon = next((bodies[name] for name in wanted if bodies.get(name)), None)
        if icon is None:
            return None
        width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        return rasterise(svg.encode(), f"{concept.code}.svg")

    return lookup


def file_lookup(style: Style, archive: tarfile.TarFile) -> Lookup:
    members = set(archive.getnames())

    def lookup(concept: Concept) -> Image.Image | None:
        code = concept.code
        for form in (code, f"{code}-FE0F", code.replace("-FE0F", "")):
            path = style.layout.format(lower=form.lower(), upper=form)
            if path in members:
                return rasterise(read(archive, path), path)
        return None

    return lookup


def font_lookup(style: Style, archive: tarfile.TarFile) -> Lookup:
    font = ImageFont.truetype(io.BytesIO(read(archive, style.layout)), 256)

    def lookup(concept: Concept) -> Image.Image | None:
        text = "".join(chr(int(part, 16)) for part in concept.code.split("-") if part != "FE0F")
        if len(text) > 1:
            raise SystemExit(f"{concept.concept!r} is a sequence, which needs a text shaper")
        picture = Image.new("RGBA", (512, 512))
        ImageDraw.Draw(picture).text((256, 256), text, font=font, fill="black", anchor="mm")
        return picture

    return lookup


def make_lookup(style: Style, archive: tarfile.TarFile) -> Lookup:
    if style.layout == "iconify":
        return iconify_lookup(style, archive)
    return (font_lookup if style.layout.endswith(".ttf") else file_lookup)(style, archive)


def read_concepts(table: Path, openmoji: tarfile.TarFile, datasource: tarfile.TarFile) -> list[Concept]:
    annotations = {e["hexcode"]: e["annotation"] for e in json.loads(read(openmoji, "package/data/openmoji.json"))}
    unicode_names = {
        entry["unified"].replace("-FE0F", ""): [entry["name"] or "", *entry["short_names"]]
        for entry in json.loads(read(datasource, "package/emoji.json"))
    }
    found = []
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            names = [annotations[row["code"]], *unicode_names.get(row["code"].replace("-FE0F", ""), [])]
            overrides = {"fxemoji": row["fxemoji"]} if row["fxemoji"] else {}
            found.append(Concept(row["code"], row["concept"], row["group"], tuple(names), overrides))
    return sorted(found, key=lambda c: c.code)


def all_names(archive: tarfile.TarFile) -> list[str]:
    entries = json.loads(read(archive, "package/data/openmoji.json"))
    return sorted({html.unescape(e["annotation"]).replace("\u2019", "'").lower() for e in entries if not e["skintone"]})


def build(out: Path, table: Path, packages: Path) -> None:
    archives = {style.slug: fetch(style.package, packages) for style in STYLES}
    lookups = {}
    for style in STYLES:
        check_licence(style, archives[style.slug])
        lookups[style.slug] = make_lookup(style, archives[style.slug])
    rows = []
    for concept in read_concepts(table, archives["openmoji"], archives["noto"]):
        for style in STYLES:
            drawing = lookups[style.slug](concept)
            if drawing is None:
                raise SystemExit(f"{style.package} has no drawing of {concept.concept!r}")
            file_name = f"{style.slug}/{concept.code.lower()}.png"
            (out / style.slug).mkdir(parents=True, exist_ok=True)
            square(drawing).save(out / file_name, optimize=True)
            rows.append(
                {
                    "file_name": file_name,
                    "text": f"{concept.concept} in the style of {style.name}",
                    "class": style.name,
                    "concept": concept.concept,
                    "group": concept.group,
                    "source": style.package,
                    "licence": style.licence,
                }
            )
    rows.sort(key=lambda row: row["file_name"])
    (out / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (out / "concept_names.txt").write_text("\n".join(all_names(archives["openmoji"])) + "\n")
    print(f"{len(rows)} pictures, {len(rows) // len(STYLES)} concepts, {len(STYLES)} styles")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "emoji_styles")
    parser.add_argument("--concepts", type=Path, default=Path(__file__).parent / "concepts.csv")
    parser.add_argument("--packages", type=Path, help="keep the fetched packages here (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = args.packages or Path(scratch)
        packages.mkdir(parents=True, exist_ok=True)
        build(args.out, args.concepts, packages)


if __name__ == "__main__":
    main()
