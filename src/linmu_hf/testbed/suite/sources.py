"""What scenes are made of, split once into train and test: fonts, words, numbers, drawings of icons, chart styles."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ImageFont


SPLITS = ("train", "test")

# family -> package, regular file, bold file, licence. Files of pymupdf_fonts are modules that hold the font's bytes.
FONTS = {
    "FiraGO": ("pymupdf_fonts", "FiraGO_Regular", "FiraGO_Bold", "OFL-1.1"),
    "Fira Mono": ("pymupdf_fonts", "FiraMono_Regular", "FiraMono_Bold", "OFL-1.1"),
    "Space Mono": ("pymupdf_fonts", "SpaceMono_Regular", "SpaceMono_Bold", "OFL-1.1"),
    "Ubuntu": ("pymupdf_fonts", "Ubuntu_Regular", "Ubuntu_Bold", "Ubuntu-font-1.0"),
    "Roboto": ("font_roboto", "Roboto-Regular.ttf", "Roboto-Bold.ttf", "Apache-2.0"),
    "Source Sans": ("font_source_sans_pro", "SourceSansPro-Regular.ttf", "SourceSansPro-Bold.ttf", "OFL-1.1"),
    "Caladea": ("font_caladea", "Caladea-Regular.ttf", "Caladea-Bold.ttf", "Apache-2.0"),
    "Manrope": ("font_manrope", "Manrope-Regular.ttf", "Manrope-Bold.ttf", "OFL-1.1"),
    "Lato": ("font_lato", "Lato-Regular.ttf", "Lato-Bold.ttf", "OFL-1.1"),
    "Hanken Grotesk": ("font_hanken_grotesk", "HankenGrotesk-Regular.otf", "HankenGrotesk-Bold.otf", "OFL-1.1"),
    "Fredoka One": ("font_fredoka_one", "FredokaOne-Regular.ttf", "FredokaOne-Regular.ttf", "OFL-1.1"),
    "DejaVu Sans": ("matplotlib", "DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "Bitstream-Vera"),
    "DejaVu Serif": ("matplotlib", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "Bitstream-Vera"),
    "DejaVu Sans Mono": ("matplotlib", "DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf", "Bitstream-Vera"),
    "STIX": ("matplotlib", "STIXGeneral.ttf", "STIXGeneralBol.ttf", "OFL-1.1"),
    "Noto Sans": ("pymupdf_fonts", "NotoSans_Regular", "NotoSans_Bold", "OFL-1.1"),
    "Source Serif": ("font_source_serif_pro", "SourceSerifPro-Regular.ttf", "SourceSerifPro-Bold.ttf", "OFL-1.1"),
    "Cascadia Mono": ("pymupdf_fonts", "CascadiaMono_Regular", "CascadiaMono_Bold", "OFL-1.1"),
    "Open Sans": ("ttf_opensans", "OpenSans-Regular.ttf", "OpenSans-Bold.ttf", "Apache-2.0"),
}
TEST_FONTS = ("Noto Sans", "Source Serif", "Cascadia Mono", "Open Sans")
FOLDERS = {"matplotlib": "mpl-data/fonts/ttf", "ttf_opensans": "ttf"}  # elsewhere "files"

# name -> its glyph in Font Awesome 6, Material Design Icons 6, Phosphor and Remix Icon
ICONS = {
    **{
        name: (name,) * 4
        for name in (
            "heart star camera car key cloud flag gift phone book anchor fire umbrella rocket bug truck leaf "
            "lightbulb ghost lock"
        ).split()
    },
    "bell": ("bell", "bell", "bell", "notification-3"),  # Remix's bell-fill is a sleigh bell
    "scissors": ("scissors", "content-cut", "scissors", "scissors"),
    "crown": ("crown", "crown", "crown", "vip-crown"),
    "sun": ("sun", "white-balance-sunny", "sun", "sun"),
    "moon": ("moon", "moon-waning-crescent", "moon", "moon"),
    "house": ("house", "home", "house", "home"),
    "globe": ("globe", "earth", "globe", "earth"),
    "bed": ("bed", "bed", "bed", "hotel-bed"),
    "cup": ("mug-saucer", "coffee", "coffee", "cup"),
    "gear": ("gear", "cog", "gear", "settings-3"),
}
ICON_NAMES = tuple(sorted(ICONS))
# set -> its files in qtawesome, its place in ICONS, licence
ICON_SETS = {
    "fa": ("fontawesome6-solid-webfont", "6.7.2", 0, "OFL-1.1"),
    "mdi": ("materialdesignicons6-webfont", "6.9.96", 1, "Apache-2.0"),
    "ph": ("phosphor", "1.3.0", 2, "MIT"),
    "ri": ("remixicon", "2.5.0", 3, "Apache-2.0"),
}
# drawing -> set and what its glyphs' names end with
DRAWINGS = {
    "fa": ("fa", ""),
    "mdi": ("mdi", ""),
    "ph-fill": ("ph", "-fill"),
    "ph": ("ph", ""),
    "ri-line": ("ri", "-line"),
    "ph-bold": ("ph", "-bold"),
    "ri-fill": ("ri", "-fill"),
}
TEST_DRAWINGS = ("ph-bold", "ri-fill")

COLOURS = {
    "red": (235, 60, 60),
    "green": (50, 190, 80),
    "blue": (70, 120, 250),
    "yellow": (245, 215, 50),
    "pink": (245, 120, 200),
    "white": (245, 245, 245),
}
DARK = ((24, 26, 32), (44, 30, 30), (26, 44, 34), (34, 34, 54), (50, 46, 40))
# how a surface is painted
BACKGROUNDS = {"train": ("flat", "slope", "grain"), "test": ("diagonal", "stripes")}
ICON_SIZES = {"train": (18, 20, 21, 24, 26), "test": (19, 22, 25)}
WORD_SIZES = {"train": (13, 15, 16, 18), "test": (14, 17)}
# style sheets of matplotlib
CHART_STYLES = {
    "train": ("default", "classic", "ggplot", "dark_background", "bmh", "Solarize_Light2"),
    "test": ("seaborn-v0_8-whitegrid", "seaborn-v0_8-dark", "fivethirtyeight"),
}

_WORDS = """
ACE AIR ANT APE ARM ART ASH AXE BAG BAR BAT BAY BEE BOX BOY BUD BUN CAB CAN CAP COD COW CUB DAM DAY DEN DOT DUO EAR EEL
EGG ELF ELK ELM EMU EYE FAN FIG FIN FIR FOG FOX FUN FUR GAP GEM GUM HAT HAY HEN HIP HOP HUT ICE INK IVY JAM JAR JAW JET
JOY KID KIT LAB LAP LEG LID LIP LOG MAP MAT MOP MUD MUG NET NUT OAK OAR OIL OWL PAN PAW PEA PEN PET PIE PIG PIN POD POT
PUB RAM RAT RIB ROD RUG RYE SAP SAW SEA SKI SKY SON TAP TEA TIN TOE TOY TUB VAN VET WAX WEB WIG YAK ZIP ZOO
BAKE BALL BANK BARN BEAN BIRD BOAT BOLT BUSH CAFE CAKE CLUB COIN CORN CRAB DEER DESK DOCK DUCK EAST EXIT FARM FERN FISH
FOOD FROG GATE GOLD GOLF HALL HAWK HERB HOME IRIS JAZZ KITE KIWI LAKE LAMB LIME LION MAZE MILK MINT MOTH NEST OPEN OVEN
PARK PEAR PLUM POND POOL PORT QUIZ RAFT RICE ROAD ROCK ROSE RUBY SALT SAND SEAL SHIP SHOE SILK SNOW SOAP SODA SOUP STOP
SWAN TAXI TENT TILE TOFU TREE TUNA VASE VIEW WALK WEST WIND WOLF WOOD WOOL YARD YOGA ZEBRA ZONE
"""
_NUMBERS = range(10, 1000)
TEST_SHARE = 0.2


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train' or 'test'")


def _part(values: Sequence, split: str, seed: int) -> tuple:
    """A fixed random fifth of `values` is the test split."""
    _check(split)
    order = np.random.default_rng(seed).permutation(len(values))
    n = round(len(values) * TEST_SHARE)
    return tuple(values[i] for i in sorted(order[:n] if split == "test" else order[n:]))


@dataclass(frozen=True)
class Sources:
    """The sources of one split, or of an early level of training the first few of them."""

    split: str
    fonts: tuple[str, ...]
    words: tuple[str, ...]
    numbers: tuple[int, ...]
    drawings: tuple[str, ...]
    icons: tuple[str, ...]
    chart_styles: tuple[str, ...]

    def few(self, share: float) -> "Sources":
        """Returns the first `share` of each kind, at least three icons, words and numbers and one of all else."""

        def first(values: tuple, least: int) -> tuple:
            return values[: max(least, round(share * len(values)))]

        return Sources(
            self.split,
            first(self.fonts, 2),
            self.words,
            self.numbers,
            first(self.drawings, 1),
            first(self.icons, 6),
            first(self.chart_styles, 1),
        )


@cache
def sources(split: str) -> Sources:
    """Returns the sources of `"train"` or `"test"`; icon names and colours are in both, all else is in one."""
    _check(split)
    held_out = split == "test"
    return Sources(
        split,
        tuple(name for name in FONTS if (name in TEST_FONTS) == held_out),
        _part(_WORDS.split(), split, 0),
        _part(_NUMBERS, split, 1),
        tuple(name for name in DRAWINGS if (name in TEST_DRAWINGS) == held_out),
        ICON_NAMES,
        CHART_STYLES[split],
    )


def _folder(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f'the suite needs {package}: pip install "linmu-hf[suite]"')
    return Path(spec.submodule_search_locations[0])


@cache
def font_bytes(family: str, bold: bool = False) -> bytes:
    """Returns the file of a font."""
    package, regular, heavy, _ = FONTS[family]
    name = heavy if bold else regular
    if package == "pymupdf_fonts":
        return import_module(f"{package}.{name}").fontbuffer
    return (_folder(package) / FOLDERS.get(package, "files") / name).read_bytes()


@lru_cache(maxsize=512)
def load_font(family: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(BytesIO(font_bytes(family, bold)), size)


@lru_cache(maxsize=128)
def load_icons(drawing: str, size: int) -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    """Returns the font of a drawing, and the character of each icon name in it."""
    icon_set, ending = DRAWINGS[drawing]
    stem, version, place, _ = ICON_SETS[icon_set]
    folder = _folder("qtawesome") / "fonts"
    characters = json.loads((folder / f"{stem}-charmap-{version}.json").read_text())
    font = ImageFont.truetype(str(folder / f"{stem}-{version}.ttf"), size)
    return font, {name: chr(int(characters[ICONS[name][place] + ending], 16)) for name in ICON_NAMES}
