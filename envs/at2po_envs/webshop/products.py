"""The products of a shop: the original's files, and the folder into which they are converted once.

| file | content |
|---|---|
| `items_shuffle*.json` | array of products as they were scraped; their order is part of the benchmark |
| `items_ins_v2*.json` | object: product id -> attributes, and the synthetic instruction with its attributes |
| `items_human_ins.json` | object: product id -> instructions that people wrote; may be missing |

The full set has 1.18 million products in 5 GB. `convert` streams the files, joins them and writes
`products.jsonl`, one line for each product. Every line is also a corpus row (`id`, `contents`) with the text
that the original indexes, so that any retriever of the project searches the file, and products are read from
it by row. Memory grows only by the ids: about 250 bytes for each product.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from at2po_env.data.convert import read_array, read_object
from at2po_env.errors import DataError

MISSING_PRICE = 100.0
"""What the original charges for a product without a price."""

_BLANK = re.compile(r"\s+")


class Instruction(NamedTuple):
    """What a customer asks for in words, with the attributes and options that count.

    An option is a value, or a pair (name of the option, value).
    """

    text: str
    attributes: tuple[str, ...]
    options: tuple[str | tuple[str, str], ...] = ()


class Product(NamedTuple):
    """One product, as its pages and the reward need it.

    Attributes:
        asin: Its id.
        title: Its name.
        description: One paragraph.
        bullets: Its features.
        price_tag: The price as pages show it, for example "$10.0 to $12.5".
        prices: One price in dollars, or the lowest and the highest.
        options: (name, values) of each option, in lower case.
        category: One of five words, such as "garden".
        query: The search with which the product was found, in lower case.
        product_category: Its place in the shop's tree, from the root on, with "›" between.
        attributes: Properties that were mined from its text.
        human: The instructions that people wrote for it.
        synthetic: Its synthetic instruction; the options of its goals are combinations of the product's.
    """

    asin: str
    title: str
    description: str
    bullets: tuple[str, ...]
    price_tag: str
    prices: tuple[float, ...]
    options: tuple[tuple[str, tuple[str, ...]], ...]
    category: str
    query: str
    product_category: str
    attributes: tuple[str, ...]
    human: tuple[Instruction, ...] = ()
    synthetic: Instruction | None = None


class _Value(BaseModel):
    """One value of an option."""

    value: str


class _Item(BaseModel):
    """One product of `items_shuffle*.json`; fields that the shop does not show are left out."""

    model_config = ConfigDict(extra="ignore", coerce_numbers_to_str=True)

    asin: str
    name: str
    full_description: str | None = ""
    small_description: list[str | None] | str | None = None
    pricing: str | None = None
    customization_options: dict[str, list[_Value] | None] | str | None = None
    category: str
    query: str
    product_category: str


class _Mined(BaseModel):
    """One entry of `items_ins_v2*.json`."""

    attributes: list[str] = []
    instruction: str | None = None
    instruction_attributes: list[str] | None = None


class _Written(BaseModel):
    """One instruction of an entry of `items_human_ins.json`."""

    instruction: str
    instruction_attributes: list[str] = []
    instruction_options: dict[str, str] | list[str] = []


_HumanEntry = TypeAdapter(list[_Written])


class Sources(NamedTuple):
    """The original's files; `human` may be missing."""

    items: Path
    mined: Path
    human: Path | None

    @property
    def stamp(self) -> dict[str, list[int]]:
        """Size and modification time of each file."""
        stats = {path.name: path.stat() for path in self if path is not None}
        return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def find_sources(dataset: str | Path) -> Sources:
    """Find the original's files.

    Args:
        dataset: A folder with `items_shuffle*.json`, `items_ins_v2*.json` and perhaps `items_human_ins.json`;
            or the path of one `items_shuffle*.json` where a folder has several.

    Raises:
        DataError: A file is missing, or it is not clear which one is meant.
    """
    path = Path(dataset)
    if path.is_dir():
        # Downloads leave records beside the files, "items_shuffle.json.json".
        found = [file for file in sorted(path.glob("items_shuffle*.json")) if file.name.count(".") == 1]
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise DataError(
                f"{path}: expected one items_shuffle*.json, got {names}. Fix: give dataset= the folder of "
                "the original's data, or the path of one items_shuffle*.json."
            )
        path = found[0]
    elif not path.is_file():
        raise DataError(
            f"{path}: there is no such folder or file. Fix: give dataset= a folder with items_shuffle*.json, "
            "items_ins_v2*.json and items_human_ins.json."
        )
    folder, suffix = path.parent, path.name.removeprefix("items_shuffle")
    mined = folder / f"items_ins_v2{suffix}"
    if not mined.is_file():
        others = [file for file in sorted(folder.glob("items_ins_v2*.json")) if file.name.count(".") == 1]
        if len(others) != 1:
            raise DataError(
                f"{folder}: there is no {mined.name} to go with {path.name}. Fix: put it there; it has the "
                "attributes."
            )
        mined = others[0]
    human = folder / "items_human_ins.json"
    return Sources(path, mined, human if human.is_file() else None)


def convert(sources: Sources, target: Path, noted: Counter[str]) -> Iterator[Product]:
    """Write one line for each product.

    Like the original, it leaves out products whose id is "nan", longer than ten characters or was seen
    before, and instructions without attributes.

    Args:
        sources: The original's files.
        target: The file to write; it is whole once the last product was yielded.
        noted: Counts the items that were left out or mended, by reason.

    Yields:
        Each product, once its line is written.

    Raises:
        DataError: An item that is damaged or has not the original's form; names the file and the item.
    """
    seen: set[str] = set()
    with (
        tempfile.TemporaryFile(dir=target.parent) as spool,
        target.open("w", encoding="utf-8") as out,
    ):
        mined = _Entries(spool, sources.mined)
        human = _Entries(spool, sources.human) if sources.human is not None else None
        for where, raw in read_array(sources.items):
            try:
                item = _Item.model_validate(raw)
            except ValidationError as error:
                raise _damaged(sources.items, where, error) from error
            if item.asin == "nan" or len(item.asin) > 10 or item.asin in seen:
                noted["duplicate" if item.asin in seen else "no product id"] += 1
                continue
            seen.add(item.asin)
            product = _product(item, noted)
            product = _with_goals(product, mined, human, noted)
            out.write(json.dumps({**_corpus_row(product), "product": product}) + "\n")
            yield product
        for entries, name in ((mined, "attributes"), (human, "human instructions")):
            if entries is not None and (lost := len(entries.keys - seen)):
                noted[f"{name} of a missing product"] = lost
    if not seen:
        raise DataError(f"{sources.items}: there is no product in it. Fix: get the original file again.")


class _Entries:
    """The entries of a large JSON object, kept on disk: only ids and places are in memory."""

    def __init__(self, spool: IO[bytes], source: Path) -> None:
        self.source = source
        self._spool = spool
        self._places: dict[str, tuple[int, int]] = {}
        end = spool.seek(0, os.SEEK_END)
        for key, value in read_object(source):
            line = json.dumps(value).encode()
            self._places[key] = (end, len(line))
            end += spool.write(line)

    @property
    def keys(self) -> set[str]:
        """The products that have an entry."""
        return set(self._places)

    def find(self, asin: str) -> Any:
        """Return the entry of a product, None where there is none."""
        if asin not in self._places:
            return None
        start, length = self._places[asin]
        self._spool.seek(start)
        return json.loads(self._spool.read(length))


def _product(item: _Item, noted: Counter[str]) -> Product:
    """Clean an item as the original does; its instructions come later."""
    prices = _prices(item.pricing or "")
    if not prices:
        noted["no price"] += 1
        prices = (MISSING_PRICE,)
    options: dict[str, tuple[str, ...]] = {}
    if isinstance(item.customization_options, dict):
        for name, values in item.customization_options.items():
            if values is None:
                noted["option without values"] += 1
                continue
            options[name.lower()] = tuple(_option_value(value.value) for value in values)
    bullets = item.small_description
    bullets = [bullets] if isinstance(bullets, str) else bullets or []
    return Product(
        asin=item.asin,
        title=item.name,
        description=item.full_description or "",
        bullets=tuple(bullet or "" for bullet in bullets),
        price_tag=" to ".join(f"${price}" for price in prices),
        prices=prices,
        options=tuple(options.items()),
        category=item.category,
        query=item.query.lower().strip(),
        product_category=item.product_category,
        attributes=(),
    )


def _prices(text: str) -> tuple[float, ...]:
    """Read "$9.38$30.32", of which the first two numbers count; empty where one of them is no number."""
    digits = [re.sub(r"[^\d.]", "", part) for part in text.split("$")[1:]][:2]
    try:
        return tuple(float(part) for part in digits)
    except ValueError:
        return ()


def _option_value(value: str) -> str:
    return value.strip().replace("/", " | ").lower()


def _with_goals(product: Product, mined: _Entries, human: _Entries | None, noted: Counter[str]) -> Product:
    """Add the attributes and the instructions of a product."""
    try:
        source, found = mined.source, mined.find(product.asin)
        entry = _Mined.model_validate({} if found is None else found)
        synthetic = None
        if entry.instruction is not None:
            attributes = tuple(entry.instruction_attributes or ())
            if attributes:
                synthetic = Instruction(entry.instruction, attributes)
            else:
                noted["synthetic instruction without attributes"] += 1
        written = []
        if human is not None:
            source = human.source
            for one in _HumanEntry.validate_python(human.find(product.asin) or []):
                options = one.instruction_options
                if not one.instruction_attributes:
                    noted["human instruction without attributes"] += 1
                    continue
                pairs: tuple[str | tuple[str, str], ...] = (
                    tuple(options.items()) if isinstance(options, dict) else tuple(options)
                )
                written.append(Instruction(one.instruction, tuple(one.instruction_attributes), pairs))
    except ValidationError as error:
        raise _damaged(source, f"item {product.asin!r}", error) from error
    # The original gives products that were not mined this placeholder.
    attributes = ("DUMMY_ATTR",) if found is None else tuple(entry.attributes)
    return product._replace(attributes=attributes, human=tuple(written), synthetic=synthetic)


def _damaged(path: Path, where: str, error: ValidationError) -> DataError:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "the item"
    return DataError(
        f"{path}, {where}: {field}: {first['msg']} (got {first['input']!r:.80}). Fix: get the original file "
        "again."
    )


def _corpus_row(product: Product) -> dict[str, str]:
    """Return the corpus row of a product: the fields that the original indexes, in its order."""
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options)
    first = product.bullets[0] if product.bullets else ""
    title = _BLANK.sub(" ", product.title).strip()
    return {
        "id": product.asin,
        "contents": f'"{title}"\n{" ".join([product.description, first, options])}'.lower(),
    }


def read_product(line: bytes) -> Product:
    """Read a product from its line of `products.jsonl`."""
    read = Product._make(json.loads(line)["product"])  # with lists where a product has tuples
    return read._replace(
        bullets=tuple(read.bullets),
        prices=tuple(read.prices),
        options=tuple((name, tuple(values)) for name, values in read.options),
        attributes=tuple(read.attributes),
        human=tuple(_instruction(*one) for one in read.human),
        synthetic=None if read.synthetic is None else _instruction(*read.synthetic),
    )


def _instruction(text: str, attributes: Sequence[str], options: Sequence[Any]) -> Instruction:
    pairs = (tuple(option) if isinstance(option, list) else option for option in options)
    return Instruction(text, tuple(attributes), tuple(pairs))
