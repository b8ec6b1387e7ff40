"""`starflow2 encode`."""

import contextlib
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starflow2_jax.commands.arguments import Commands, InputFile, InputFolder, Whole, Words, add_share, require_writable
from starflow2_jax.errors import require_one_of, storage_errors

if TYPE_CHECKING:
    from starflow2_jax.sampling.batch_files import Share

A_SHARD = 10_000  # documents of a shard, unless --shards says otherwise


def add(commands: Commands) -> None:
    """Add `starflow2 encode` to the command line."""
    p = commands.add_parser("encode", help="write documents of any format as shards that training reads fast")
    p.add_argument(
        "--source",
        type=Words(),
        required=True,
        metavar="KIND:PATH",
        help="parquet, tar, tsv (rows that name files in tars), json (also JSONL and LLaVA's form), hf or tfds, and "
        "where it is; several files as a pattern",
    )
    p.add_argument(
        "--out",
        type=Words(written=True),
        required=True,
        metavar="DIR",
        help="folder for the shards, on disk or in a bucket",
    )
    p.add_argument(
        "--shards",
        type=Whole(1),
        metavar="N",
        help=f"number of files (default: one per {A_SHARD} documents, or one per tar file)",
    )
    p.add_argument(
        "--codec",
        type=InputFolder("checkpoint directory"),
        metavar="DIR",
        help="checkpoint directory whose codec encodes the images that are not shown through the vision tower",
    )
    p.add_argument(
        "--size",
        type=Whole(0),
        default=0,
        metavar="PIXELS",
        help="scale pictures down to this short side and save them as JPEG; 0: keep their files (default: 0)",
    )
    p.add_argument("--quality", type=Whole(1, 100), default=95, metavar="Q", help="of those JPEG files (default: 95)")
    p.add_argument(
        "--via",
        choices=("flow", "vit"),
        help="how the model sees images that are not generated (default: as the documents say)",
    )
    _add_columns(p)
    add_share(p, "shards, on one host or several")
    p.set_defaults(run=_encode, kept="finished shards are kept in --out; start the same command again")


def _add_columns(p: ArgumentParser) -> None:
    """Add the options that tell where a format has pictures and captions."""
    p.add_argument(
        "--image", type=Words(), default="image", metavar="COLUMN", help="column of the picture (default: image)"
    )
    p.add_argument(
        "--captions",
        type=Words(),
        metavar="COLUMN,...",
        help="columns of its captions or class (default: caption,captions,text, those that there are)",
    )
    p.add_argument(
        "--template",
        type=Words(),
        default="{}",
        metavar="TEXT",
        help="caption that a class becomes, with {} for its name (default: {})",
    )
    p.add_argument(
        "--classes",
        type=InputFile(),
        metavar="FILE",
        help="tar: names of the classes in .cls files, one a line, from class 0 on",
    )
    p.add_argument("--images", type=InputFolder(), metavar="DIR", help="json: folder where the pictures' paths begin")
    p.add_argument(
        "--split", type=Words(), default="train", metavar="NAME", help="hf, tfds: the split (default: train)"
    )
    p.add_argument("--data-dir", type=InputFolder(), metavar="DIR", help="tfds: folder of the prepared data sets")


def _encode(args: Namespace, _: list[str]) -> None:
    from etils import epath
    from tqdm import tqdm

    from starflow2_jax.checkpoints.directory import CheckpointDirectory
    from starflow2_jax.data import encoding
    from starflow2_jax.data.images import locate
    from starflow2_jax.sampling.batch_files import Share

    share = Share(args.process, args.processes)
    out = locate(args.out, epath.Path(), "folder")
    if local := "://" not in str(out):  # a bucket shows whole files only, so two writers of a shard do no harm there
        require_writable("--out", str(out))
    codec = CheckpointDirectory(args.codec).codec() if args.codec else None
    reader, per_shard = _reader(args)
    how = encoding.Encoding(
        source=args.source,
        shards=args.shards or -(-reader.units // per_shard),
        size=args.size,
        quality=args.quality,
        via=args.via or "",
        codec=codec,
    )
    units = encoding.to_go(out, how, reader.units, args.process, args.processes)
    documents = 0
    with tqdm(total=units, unit=" documents" if per_shard > 1 else " files", smoothing=0.05) as bar:

        def progress(units: int, more: int) -> None:
            nonlocal documents
            documents += more
            bar.set_postfix(documents=documents, refresh=False)
            bar.update(units)

        with storage_errors(args.out), _held(Path(out), share) if local else contextlib.nullcontext():
            index = encoding.encode(reader, out, how, args.process, args.processes, progress)
    if index is None:
        print(f"the shards of this process are in {args.out}; the last process to finish writes index.json")
        return
    skipped = sum(index["skipped"].values())
    print(
        f"written: {args.out}: {index['documents']} documents; {index['duplicates']} duplicates are passed over, "
        f"{skipped} could not be read (skipped.txt)"
    )


@contextlib.contextmanager
def _held(out: Path, share: "Share") -> Iterator[None]:
    """Keep other processes from the shards of this share. Raises LockedError also for shares of another number."""
    from starflow2_jax.checkpoints.lock import Lock

    for path in out.glob("lock*.json"):
        if not path.name.endswith(f"-of-{share.processes}.json"):
            Lock(out, path.name).require_free()
    with Lock(out, share.lock).held():
        yield


def _reader(args: Namespace) -> tuple[Any, int]:
    """The reader of --source, and how many of its units make a shard."""
    from starflow2_jax.data.huggingface import HuggingFaceDocuments, HuggingFaceOptions
    from starflow2_jax.data.jsonl import JsonlDocuments, JsonlOptions
    from starflow2_jax.data.readers import ParquetReader, SourceReader, TarReader
    from starflow2_jax.data.rows import RowOptions
    from starflow2_jax.data.tar_index import TarIndexReader
    from starflow2_jax.data.tfds import SCHEME, TfdsDocuments, TfdsOptions
    from starflow2_jax.text_files import read_lines

    kind, _, path = args.source.partition(":")
    classes = read_lines(args.classes) if args.classes else []
    columns = {"image": args.image, "template": args.template}
    if args.captions:
        columns["captions"] = tuple(args.captions.split(","))
    readers = {
        "parquet": lambda: ParquetReader(path, RowOptions(**columns)),
        "tar": lambda: TarReader(path, RowOptions(**columns), classes),
        "tsv": lambda: TarIndexReader(path, RowOptions(**columns)),
        "json": lambda: SourceReader(JsonlDocuments(path, JsonlOptions(images=args.images or ""))),
        "hf": lambda: SourceReader(HuggingFaceDocuments(path, HuggingFaceOptions(split=args.split, **columns))),
        "tfds": lambda: SourceReader(
            TfdsDocuments(SCHEME + path, TfdsOptions(split=args.split, data_dir=args.data_dir or "", **columns))
        ),
    }
    require_one_of("the kind in --source KIND:PATH", kind, readers)
    return readers[kind](), 1 if kind in ("tar", "tsv") else A_SHARD
