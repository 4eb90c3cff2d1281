"""The CPU loader: threads that read, decode once, render every view with numba and tokenize; exact to resume.

Python holds the interpreter's lock, but reading, decoding and rendering release it, so threads are enough and share the
trainer's memory: there is nothing to fork, to pickle or to copy.
"""

from __future__ import annotations

import functools
import io
import json
import warnings
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from rocket_fast.batch import Batch, PackedText
from rocket_fast.errors import Failed, InvalidArgument, optional_import, require
from rocket_fast.image_augment import ImageAugmentConfig, ViewConfig, ViewParams, centre_view, draw_unplaced
from rocket_fast.loaders.base import TEXT_STREAM, BadSampleError, DataConfig, EvalBatch, sample_generator
from rocket_fast.loaders.shards import Cursor, ShardSet
from rocket_fast.loaders.sources import CaptionMember, RawSample
from rocket_fast.text_augment import TextAugmentConfig, augment_strong, augment_weak
from rocket_fast.tokenizer import Tokenizer

_CHUNK = 32  # samples a thread makes at a time: small enough to share a batch, large enough not to count
_DRAFTS = 8  # of these are read and drawn before they are decoded: Python runs faster while it stays in the cache
_NEIGHBOURS, _SUBSTITUTES = 32, 64  # tried in the place of a bad sample: so many near it, so many in all
_INKS = ("CMYK", "YCCK")  # libjpeg leaves their meaning to the caller
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
_SCALES = (1, 2, 3, 4)  # eighths of the size; libjpeg is slower at five to seven than at eight


class _Codecs(NamedTuple):
    cv2: ModuleType
    simplejpeg: ModuleType
    pillow: ModuleType
    augment: ModuleType


@functools.cache
def _codecs() -> _Codecs:
    return _Codecs(
        cv2=optional_import("cv2", "train"),
        simplejpeg=optional_import("simplejpeg", "train"),
        pillow=optional_import("PIL.Image", "train"),
        augment=optional_import("rocket_fast.kernels.augment", "train"),
    )


def decode_image(data: bytes, pixel_limit: int) -> np.ndarray:
    """uint8 (H, W, 3) RGB of a JPEG, PNG, WebP or whatever else Pillow reads, its first frame, transparency over white.

    EXIF orientation is not applied (as in open_clip). Raises BadSampleError for a damaged picture and for one of more
    than ``pixel_limit`` pixels, whose pixels are then not decoded.
    """
    with _corrupt_if_it_raises:
        if data.startswith(_PNG):
            return _decode_png(data, pixel_limit)
        if data.startswith(_JPEG):
            return _decode_jpeg(data, pixel_limit)
        return _decode_other(data, pixel_limit)


def decode_for_views(
    data: bytes,
    pixel_limit: int,
    views: Sequence[ViewConfig],
    draw_views: Callable[[int, int], list[ViewParams]],
) -> tuple[np.ndarray, list[ViewParams]]:
    """A picture (as ``decode_image``'s) no larger than ``views`` need it, and what to render of it.

    A JPEG is decoded at 1/8 to 4/8 of its size where no crop then is smaller than its view, and otherwise whole, with
    libjpeg's fast DCT and upsampling. ``draw_views`` decides the views from the picture's own height and width; their
    windows are then scaled. Raises BadSampleError as ``decode_image`` does.

    On photographs of 2048 x 1536 pixels, against Pillow's resize of the whole picture to 224: 0.4 grey levels off on
    average, at hard edges 44. Decoding whole with the fast arithmetic is off by 0.8 and 4. Even half the size of a
    crop six times as large as its view is 14 levels off at edges, so "exact" decodes nothing but whole pictures.
    """
    if not data.startswith(_JPEG):
        pixels = decode_image(data, pixel_limit)
        return pixels, draw_views(*pixels.shape[:2])
    with _corrupt_if_it_raises:
        height, width, space = _jpeg_header(data, pixel_limit)
        if space in _INKS:
            return (pixels := _decode_other(data, pixel_limit)), draw_views(*pixels.shape[:2])
        drawn = draw_views(height, width)
        eighths = next((n for n in _SCALES if _suffices(n, views, drawn)), 8)
        least = {"min_height": -(-height * eighths // 8), "min_width": -(-width * eighths // 8)}
        options = {**least, "min_factor": 1} if eighths < 8 else {"fastdct": True, "fastupsample": True}
        pixels = _codecs().simplejpeg.decode_jpeg(data, "RGB", **options)
        return pixels, drawn if eighths == 8 else [_scaled(params, eighths / 8) for params in drawn]


def _suffices(eighths: int, views: Sequence[ViewConfig], drawn: Sequence[ViewParams]) -> bool:
    return all(eighths * min(p.window[2:]) >= 8 * view.size for view, p in zip(views, drawn, strict=True))


def _scaled(params: ViewParams, scale: float) -> ViewParams:
    top, left, height, width = params.window
    return replace(params, window=(top * scale, left * scale, height * scale, width * scale))


def check_jpeg(data: bytes, pixel_limit: int) -> tuple[int, int] | None:
    """Height and width of a JPEG that any decoder may be given; None for every other picture, and for rarer JPEGs.

    Raises BadSampleError where ``decode_image`` would: all of the data is read, at an eighth of the size and without
    colours, in 0.6 of the time. Other decoders make something up for damaged data.
    """
    if not data.startswith(_JPEG):
        return None
    with _corrupt_if_it_raises:
        height, width, space = _jpeg_header(data, pixel_limit)
        if space not in ("YCbCr", "Gray"):
            return None
        _codecs().simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=1)
        return height, width


class _CorruptIfItRaises:
    """Decoders raise nearly anything on hostile bytes."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, BadSampleError):
            raise BadSampleError("corrupt image") from error


_corrupt_if_it_raises = _CorruptIfItRaises()


def _check_pixels(height: int, width: int, limit: int) -> None:
    if height * width > limit:
        raise BadSampleError("image over the pixel limit")


def _jpeg_header(data: bytes, pixel_limit: int) -> tuple[int, int, str]:
    """Height, width and colour space."""
    height, width, space, _ = _codecs().simplejpeg.decode_jpeg_header(data)
    _check_pixels(height, width, pixel_limit)
    return height, width, space


def _decode_jpeg(data: bytes, pixel_limit: int) -> np.ndarray:
    if _jpeg_header(data, pixel_limit)[2] in _INKS:
        return _decode_other(data, pixel_limit)
    return _codecs().simplejpeg.decode_jpeg(data, "RGB")


def _decode_png(data: bytes, pixel_limit: int) -> np.ndarray:
    _check_pixels(int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big"), pixel_limit)
    cv2 = _codecs().cv2
    if data.rfind(b"IEND") < 0:  # some versions of cv2 fill up a truncated picture
        raise BadSampleError("corrupt image")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise BadSampleError("corrupt image")
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        return _codecs().augment.over_white(pixels)
    return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)


def _decode_other(data: bytes, pixel_limit: int) -> np.ndarray:
    pillow = _codecs().pillow
    with pillow.open(io.BytesIO(data)) as picture:
        _check_pixels(picture.height, picture.width, pixel_limit)
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            white = pillow.new("RGBA", picture.size, "white")
            picture = pillow.alpha_composite(white, picture)
        return np.array(picture.convert("RGB"))


def read_caption(text: bytes | None) -> str:
    """The caption in a .txt member; BadSampleError if it is empty or not UTF-8."""
    try:
        caption = (text or b"").decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSampleError("caption not UTF-8") from error
    if not caption:
        raise BadSampleError("empty caption")
    return caption


def read_captions(data: bytes | None) -> list[str]:
    """The non-empty texts of the list ``captions`` in a .json member; BadSampleError if there is none."""
    try:
        value = json.loads(data or b"")
    except (ValueError, RecursionError) as error:
        raise BadSampleError("json cannot be read") from error
    listed = value.get("captions") if isinstance(value, dict) else None
    if not isinstance(listed, list):
        raise BadSampleError('no list "captions" in json')
    captions = [text.strip() for text in listed if isinstance(text, str) and text.strip()]
    if not captions:
        raise BadSampleError("empty caption")
    return captions


Picture = TypeVar("Picture")
Made = tuple[Batch, Counter[str]]
"""A batch, and what was skipped in it, by reason."""


class Making(Protocol):
    """A batch being made."""

    def result(self) -> Made:
        """The batch, once it is made."""

    def cancel(self) -> object:
        """Nobody wants it any more."""


class Draft(NamedTuple):
    """A sample before its picture is decoded: a caption for each view; the views, as a function of height and width."""

    sample: RawSample
    captions: list[str]
    views: Callable[[int, int], list[ViewParams]]


@dataclass(frozen=True)
class Chunk:
    """What a thread made besides the pixels: per view the captions of its samples, their keys, ``Batch.valid``."""

    texts: list[PackedText]
    keys: list[str]
    valid: list[bool]
    skipped: Counter[str]


@dataclass(frozen=True)
class _Pending:
    """A batch being made: images to be filled by the threads, and their promises."""

    images: tuple[Tensor, ...]
    chunks: list[Future[Chunk]]

    def result(self) -> Made:
        return assemble(self.images, [chunk.result() for chunk in self.chunks])

    def cancel(self) -> None:
        for chunk in self.chunks:
            chunk.cancel()


def assemble(images: tuple[Tensor, ...], chunks: Sequence[Chunk]) -> Made:
    """The batch whose chunks these are, in order."""
    batch = Batch(
        images=images,
        texts=tuple(PackedText.cat(parts) for parts in zip(*(chunk.texts for chunk in chunks), strict=True)),
        keys=tuple(key for chunk in chunks for key in chunk.keys),
        valid=torch.tensor([valid for chunk in chunks for valid in chunk.valid]),
    )
    return batch, sum((chunk.skipped for chunk in chunks), Counter())


class _Recycled:
    """Memory for images that is given again once nobody holds it: new memory costs as much as a tenth of a sample."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """uint8 of this shape, whatever it holds; free again when it and all of its views are gone."""
        free = self._free[shape]
        memory = free.pop() if free else np.empty(shape, np.uint8)
        lent = memory.view()  # the tensor holds this
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)


class CPULoader:
    """Image-text batches made by ``data.workers`` threads; implements ``loaders.base.Loader``.

    Images are uint8 (normalise them on the device), of ``image.weak`` and each of ``image.strong``. Texts: view 0
    through ``augment_weak``, the others through ``augment_strong``, or the plain caption in all if ``text`` is None.
    ``tokenizer`` None: pictures alone, whose captions nobody looks for; batches have no texts.

    A batch depends on seed, epoch, data and the global batch size, not on workers, prefetching or earlier batches. A
    sample that cannot be used (see ``skipped`` for the reasons) has its place taken by one from the following global
    batch, which ``valid`` marks False: a real pair, so a loss that ignores ``valid`` merely sees that pair twice in an
    epoch. The places after the last sample (``drop_last=False``) are filled the same way from the epoch's beginning.
    A shard that cannot be read any more is tried for a second, then named in a warning and its samples are skipped.
    ``pin_memory`` puts images where CUDA copies them from without waiting (``Batch.to``); they come from torch's cache.

    Raises ValueError, on iteration, if 64 samples, near and far, cannot be used either. With ``data.strict`` raises
    ``Failed``, here or on iteration, for the first sample that cannot be used.
    """

    def __init__(
        self,
        data: DataConfig,
        image: ImageAugmentConfig,
        text: TextAugmentConfig | None,
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        _codecs()  # say now what is not installed
        require(0 <= seed < 2**64, "seed", seed, "0 <= seed < 2**64")
        self.data, self.image, self.text, self.tokenizer, self.seed = data, image, text, tokenizer, seed
        member: CaptionMember = "txt" if data.captions == "txt" else "json"
        self._field = "data.train" if tokenizer is not None else "data.unpaired"  # which errors name
        caption: CaptionMember = "none" if tokenizer is None else member
        self._shards = ShardSet(data.train, caption=caption, weights=data.weights, field=self._field)
        if data.strict and (skipped := self._shards.first_skipped()):
            raise _refused(*skipped)
        self.samples = self._shards.epoch_samples
        if tokenizer is None:
            expected = f"at least {data.batch_size}, a step's"
            require(self.samples >= data.batch_size, self._field, f"{self.samples} pictures", expected)
        self.skipped = Counter(self._shards.skipped)
        self._cursor = Cursor(self.samples, data.batch_size, rank=rank, world_size=world_size, drop_last=data.drop_last)
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="rocket-fast-loader")
        self._pin_memory, self._recycled, self._closed = pin_memory, _Recycled(), False

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._cursor.batches

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the current epoch."""
        require(not self._closed, "loader", "closed", "one that has not been closed")
        cursor, epoch = self._cursor, self._cursor.epoch
        order = self._shards.epoch_order(self.seed, epoch, shuffle=self.data.shuffle)
        pending: deque[Making] = deque()
        submitted = cursor.delivered
        try:
            for number in range(cursor.delivered, cursor.batches):
                while submitted < cursor.batches and len(pending) <= self.data.prefetch:
                    pending.append(self._submit(order, epoch, submitted))
                    submitted += 1
                batch, skipped = pending.popleft().result()
                if (cursor.epoch, cursor.delivered) != (epoch, number):
                    raise RuntimeError("the loader was moved or read elsewhere while being iterated over")
                self.skipped += skipped
                cursor.delivered += 1
                yield batch
        finally:
            for unfinished in pending:
                unfinished.cancel()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of ``epoch``, or stay where a resumed epoch stands."""
        self._cursor.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last delivered batch, the same on every process."""
        return {**self._cursor.state_dict(), "seed": self.seed, "data": self._shards.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, with any split of the same global batch."""
        require(state["seed"] == self.seed, "seed", self.seed, f"the saved run's {state['seed']}")
        same = state["data"] == self._shards.fingerprint
        require(same, self._field, self.data.train, "the shards and samples of the saved run; they have changed")
        self._cursor.load_state_dict(state)

    def close(self) -> None:
        """Stop and join the threads."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, order: np.ndarray, epoch: int, number: int) -> Making:
        images = self._new_images()
        outs = [image.numpy() for image in images]

        def render(slot: int, picture: tuple[np.ndarray, list[ViewParams]]) -> None:
            pixels, views = picture
            for out, params in zip(outs, views, strict=True):
                _codecs().augment.render_view(pixels, params, out[slot])

        return _Pending(images, self._make_chunks(order, epoch, number, self._decode, render))

    def _new_images(self) -> tuple[Tensor, ...]:
        """uint8 (B, 3, S, S) for each view, to be filled."""
        shapes = [(self._cursor.batch_size, 3, view.size, view.size) for view in self.image.views]
        if self._pin_memory:  # torch keeps such memory for the next
            return tuple(torch.empty(shape, dtype=torch.uint8, pin_memory=True) for shape in shapes)
        return tuple(self._recycled.take(shape) for shape in shapes)

    def _decode(self, draft: Draft) -> tuple[np.ndarray, list[ViewParams]]:
        """A sample's pixels, and what to render of them."""
        data = draft.sample.image
        if self.data.quality == "fast" and not self.data.trim_margins:  # margins are seen in the whole picture only
            return decode_for_views(data, self.data.pixel_limit, self.image.views, draft.views)
        pixels = decode_image(data, self.data.pixel_limit)
        if self.data.trim_margins:
            pixels = _codecs().augment.trim_margins(pixels)
        return pixels, draft.views(*pixels.shape[:2])

    def _make_chunks(
        self,
        order: np.ndarray,
        epoch: int,
        number: int,
        decode: Callable[[Draft], Picture],
        use: Callable[[int, Picture], None],
    ) -> list[Future[Chunk]]:
        """Have the threads make batch ``number``, whose pictures go to ``use(slot, picture)``."""
        places, own = self._cursor.places(number)
        return [
            self._pool.submit(
                self._make, order, epoch, places[at : at + _CHUNK], own[at : at + _CHUNK], at, decode, use
            )
            for at in range(0, self._cursor.batch_size, _CHUNK)
        ]

    def _make(
        self,
        order: np.ndarray,
        epoch: int,
        places: np.ndarray,
        own: np.ndarray,
        at: int,
        decode: Callable[[Draft], Picture],
        use: Callable[[int, Picture], None],
    ) -> Chunk:
        """Fill the slots ``at`` ... from the given places of the epoch's order."""
        keys, captions, valid, skipped = list[str](), list[list[str]](), list[bool](), Counter[str]()
        for start in range(0, len(places), _DRAFTS):
            some = places[start : start + _DRAFTS].tolist()
            drafts = [self._try_draft(int(order[place % self.samples]), epoch) for place in some]
            for place, is_own, drafted in zip(some, own[start : start + _DRAFTS].tolist(), drafts, strict=True):
                draft, picture, reason = self._usable(order, epoch, place, drafted, decode)
                if reason is not None and is_own:
                    skipped[reason] += 1
                use(at + len(keys), picture)
                keys.append(draft.sample.key)
                captions.append(draft.captions)
                valid.append(is_own and reason is None)
        packed = [] if self.tokenizer is None else [self.tokenizer.pack(texts) for texts in zip(*captions, strict=True)]
        return Chunk(packed, keys, valid, skipped)

    def _usable(
        self,
        order: np.ndarray,
        epoch: int,
        place: int,
        draft: Draft | BadSampleError,
        decode: Callable[[Draft], Picture],
    ) -> tuple[Draft, Picture, str | None]:
        """The sample at ``place``, whose draft is given; if it is bad, a substitute and the reason."""
        reason: str | None = None
        step = self._cursor.global_batch - 1
        for tried in range(_SUBSTITUTES + 1):
            away = step + tried if tried else 0
            if tried > _NEIGHBOURS:  # a whole shard may be lost: look all over the epoch
                away += (tried - _NEIGHBOURS) * self.samples // (_SUBSTITUTES - _NEIGHBOURS + 1)
            index = int(order[(place + away) % self.samples])
            try:
                if tried:
                    draft = self._draft(index, epoch)
                elif isinstance(draft, BadSampleError):
                    raise draft
                return draft, decode(draft), reason
            except BadSampleError as error:
                if self.data.strict:
                    raise _refused(*self._shards.locate(index), error.reason) from error
                reason = reason or error.reason
        raise InvalidArgument(
            f"{self._field}: {_SUBSTITUTES + 1} samples in a row, near and far, cannot be used, the first for: {reason}"
        )

    def _captions(self, sample: RawSample) -> list[str]:
        """The captions to choose from; none for pictures alone."""
        if self.tokenizer is None:
            return []
        return [read_caption(sample.text)] if self.data.captions == "txt" else read_captions(sample.json)

    def _try_draft(self, index: int, epoch: int) -> Draft | BadSampleError:
        try:
            return self._draft(index, epoch)
        except BadSampleError as error:
            return error

    def _draft(self, index: int, epoch: int) -> Draft:
        """Read a sample and decide all about it but what needs the picture's size; BadSampleError if it cannot be."""
        sample = self._shards.read(index)
        listed = self._captions(sample)
        unplaced = [
            draw_unplaced(view, sample_generator(self.seed, epoch, sample.key, number))
            for number, view in enumerate(self.image.views)
        ]
        views = 0 if self.tokenizer is None else len(unplaced)
        captions = [self._caption(sample.key, epoch, listed, view) for view in range(views)]
        return Draft(sample, captions, lambda height, width: [place(height, width) for place in unplaced])

    def _caption(self, key: str, epoch: int, captions: list[str], view: int) -> str:
        if self.text is None and len(captions) == 1:
            return captions[0]
        rng = sample_generator(self.seed, epoch, key, view, TEXT_STREAM)
        caption = captions[int(rng.random() * len(captions))]
        if self.text is None:
            return caption
        return augment_strong(caption, self.text, rng) if view else augment_weak(caption, self.text, rng)


def _refused(path: Path, key: str, reason: str) -> Failed:
    return Failed(f"data.strict: sample {key} of {path} cannot be used: {reason}; without data.strict it is skipped")


def iter_eval(
    patterns: Sequence[str],
    size: int,
    batch_size: int,
    *,
    captions: Literal["txt", "several"] = "txt",
    workers: int = 2,
    trim_margins: bool = False,
    pixel_limit: int = 100_000_000,
) -> Iterator[EvalBatch]:
    """All pictures of the shards once, in order: shorter side resized to ``size`` (bicubic, antialiased), centre crop.

    ``captions`` is where they are read, as in ``DataConfig``: the .txt members, or the first of each list of several;
    ``trim_margins`` as there.
    Samples that cannot be used are left out, and a warning at the end says how many and why. Raises ValueError for
    shards that cannot be read. Closing the iterator ends its threads.
    """
    _codecs()
    shards = ShardSet(patterns, caption="txt" if captions == "txt" else "json")
    skipped = Counter(shards.skipped)
    read = functools.partial(_eval_sample, shards, size=size, trim_margins=trim_margins, pixel_limit=pixel_limit)
    with ThreadPoolExecutor(workers, thread_name_prefix="rocket-fast-eval") as pool:
        pending: deque[list[Future[_EvalSample | str]]] = deque()
        starts = iter(range(0, len(shards), batch_size))
        try:
            while True:
                while len(pending) < 2 and (start := next(starts, None)) is not None:
                    indices = range(start, min(start + batch_size, len(shards)))
                    pending.append([pool.submit(read, i) for i in indices])
                if not pending:
                    break
                results = [future.result() for future in pending.popleft()]
                skipped.update(reason for reason in results if isinstance(reason, str))
                made = [sample for sample in results if not isinstance(sample, str)]
                if made:
                    yield _eval_batch(made)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if skipped:
        warnings.warn(f"{sum(skipped.values())} evaluation samples left out: {dict(skipped)}", stacklevel=2)


class _EvalSample(NamedTuple):
    image: np.ndarray
    caption: str
    key: str


def _eval_sample(shards: ShardSet, index: int, *, size: int, trim_margins: bool, pixel_limit: int) -> _EvalSample | str:
    """One evaluation sample, or the reason why it cannot be used."""
    try:
        raw = shards.read(index)
        pixels = decode_image(raw.image, pixel_limit)
        if trim_margins:
            pixels = _codecs().augment.trim_margins(pixels)
        image = np.empty((3, size, size), np.uint8)
        params = centre_view(pixels.shape[0], pixels.shape[1], size)
        _codecs().augment.render_view(pixels, params, image)
        caption = read_caption(raw.text) if raw.json is None else read_captions(raw.json)[0]
        return _EvalSample(image, caption, raw.key)
    except BadSampleError as error:
        return error.reason


def _eval_batch(samples: list[_EvalSample]) -> EvalBatch:
    images, captions, keys = zip(*samples, strict=True)
    return EvalBatch(images=torch.from_numpy(np.stack(images)), captions=captions, keys=keys)
