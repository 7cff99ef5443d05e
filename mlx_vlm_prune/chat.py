"""Talk about images in several turns, with fewer visual tokens.

mlx-vlm-prune chat --model my-model --image photo.jpg --pruner cdpruner --keep-ratio 0.25
"""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from .checkpoints.command_line import in_one_sentence, suggestion
from .checkpoints.errors import UserError
from .checkpoints.reading.files import atomic_path, check_target
from .checkpoints.reading.paths import expand_home
from .generate import load_model
from .generation.arguments import build_chat_parser, decoding_options
from .generation.conversation import Conversation
from .generation.photographs import warn_of_photographs
from .generation.printing import print_figures, print_piece, read_whole
from .generation.request import GenerateOptions, Request, list_images, pixel_limit
from .generation.result import GenerationResponse, GenerationResult
from .hosts.auto import Why, is_auto, noting, with_method
from .hosts.conversation import HostConversation
from .inputs.budget import check_budget
from .inputs.image import open_image
from .inputs.image_sources import ImageSource, is_url
from .inputs.messages import Turn
from .inputs.video import Clip, VideoSource
from .models.vlm import VLM
from .pruners.own_methods import register_files
from .training.generate_options import apply_config

if TYPE_CHECKING:
    from typing import Unpack

__all__ = ["Chat", "main"]

OVERLAY = "kept.png"
HELP = f"""\
  /image FILE          the next question brings this image; without FILE, none
  /video FILE          before the first question: all questions are about this video
  /keep 0.25           keep this share of an image's visual tokens; above 1, this number
  /pruner NAME         choose them by another method; none keeps all
  /overlay [FILE.png]  draw what was kept (default: {OVERLAY})
  /stats               figures of the latest answer
  /clear               begin again, without images and video
  /help                this list
  /quit                end, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """Several turns about images or a video, each answered with fewer visual tokens.

    chat = Chat(model, processor, pruner="cdpruner", keep_ratio=0.25)
    print(chat.ask("What is this?", "photo.jpg").text)
    print(chat.ask("What colour is it?").text)

    The options are those of `generate`, but for `num_draft_tokens` and `video`; `configure` changes
    them between two turns. An image goes through the tower once; each turn selects tokens again,
    from all of them, where the method reads words. `rows_reused` is how many rows of the latest
    prompt were not read again because they are as before: the same ids, and the same tokens of the
    same images. A method that prunes between the language model's layers, `restore`, a language
    model without attention and mlx-vlm's models read all rows in every turn. `turns` has the
    questions and answers, `images` all images so far, `result` the latest whole answer.
    All turns are about `clip`, if there is one, as it was when it was opened.
    Raises UserError, after which the conversation is as it was.
    """

    def __init__(self, model: Any, processor: Any, **options: "Unpack[GenerateOptions]") -> None:
        is_ours = isinstance(model, VLM)
        self._conversation: Conversation | HostConversation = (
            Conversation(model, processor) if is_ours else HostConversation(model, processor)
        )
        self._model, self._processor, self.options = model, processor, GenerateOptions()
        self._why: Why | None = None  # the latest choice of `auto`
        self.clip: Clip | None = None
        self.configure(**options)
        self.clear()

    def configure(self, **options: "Unpack[GenerateOptions]") -> None:
        """Change options from the next turn on. Raises UserError for what cannot be."""
        changed: GenerateOptions = {**self.options, **options}
        ratio, tokens = changed.get("keep_ratio"), changed.get("keep_tokens")
        if changed.get("video") is not None:
            raise UserError("in a chat set_video opens a video, before the first question")
        if changed.get("num_draft_tokens") is not None:
            raise UserError("num_draft_tokens is not possible in a chat; leave it out")
        check_budget(ratio, tokens)
        is_budget = tokens is not None or ratio not in (None, 1)
        if is_budget and changed.get("pruner") == "none":
            raise UserError("a budget needs a pruner other than none, for example auto")
        options_now: Any = {**changed, "video": self.clip}
        self._check(Request("", [], **options_now))
        self.options = changed

    def _check(self, request: Request) -> None:
        if is_auto(self._model, request):  # chosen in each turn
            request = replace(request, pruner="none", keep_ratio=None, keep_tokens=None)
        self._conversation.check(request)

    def set_video(self, video: VideoSource | None) -> None:
        """The video that all questions will be about; None for none. Raises UserError after a
        question, and for a model or a method that reads no video."""
        self.clip = self._opened(video)

    def _opened(self, video: VideoSource | None) -> Clip | None:
        if self.turns:
            raise UserError("a video comes before the first question; begin again")
        options: Any = {**self.options, "video": video}
        self._check(request := Request("", [], **options))
        return request.open_video()

    def clear(self) -> None:
        """Begin again, without images, video and turns; the options stay."""
        self._conversation.clear()
        self.turns: list[Turn] = []
        self.images: list[Image.Image] = []
        self.clip = None
        self.result: GenerationResult | None = None

    @property
    def rows_reused(self) -> int:
        """Rows of the latest prompt that were not read again."""
        return self._conversation.rows_reused

    @property
    def _pixel_limit(self) -> int:
        """The most pixels that an image may have."""
        return pixel_limit(self.options.get("max_pixels"), self.options.get("host_options"))

    def ask(
        self,
        text: str,
        image: ImageSource | Sequence[ImageSource] | None = None,
        *,
        video: VideoSource | None = None,
        verbose: bool = False,
    ) -> GenerationResult:
        """The whole answer to a question, which may bring new images, or, as the first one, a
        video that all questions are about; as `generate` gives it.

        With `verbose` the text is printed as it comes.
        """
        return read_whole(self.stream(text, image, video=video), verbose)

    def stream(
        self, text: str, image: ImageSource | Sequence[ImageSource] | None = None, *,
        video: VideoSource | None = None,
    ) -> Generator[GenerationResponse, None, None]:  # fmt: skip
        """The answer one piece at a time. Of an answer that is not read to its end, the turn has
        what was read."""
        limit = self._pixel_limit
        sources = list_images(image, self.options.get("allow_url", False), limit)
        new = [open_image(source, limit) for source in sources]
        clip = self.clip if video is None else self._opened(video)
        options: Any = {**self.options, "video": clip, "history": tuple(self.turns)}
        request = Request(text, [*self.images, *new], **options)
        request, why = with_method(self._model, self._processor, request, self._why)
        self._why = why or self._why
        pieces: list[str] = []
        try:
            with closing(noting(self._conversation.stream(request), why)) as responses:
                for response in responses:
                    pieces.append(response.text)
                    self.result = response.result or self.result
                    yield response
        finally:
            if pieces:
                self.turns.append(Turn(text, len(new), "".join(pieces)))
                self.images += new
                self.clip = clip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake in it ends in one sentence and exit code 2."""
    parser = build_chat_parser()
    with in_one_sentence(parser):
        args = parser.parse_args(argv)
        apply_config(args)
        limit = pixel_limit(args.max_pixels, vars(args))
        sources = list_images(args.image, args.allow_url)
        args.image = [open_image(source, limit) for source in sources]
        options = decoding_options(args)
        video = Request("", args.image, **options).open_video()
        model, processor = load_model(args)
        chat = Chat(
            model, processor, pruner=args.pruner, keep_ratio=args.keep_ratio,
            keep_tokens=args.keep_tokens, caution=args.caution, allow_url=args.allow_url,
            **options | {"video": None},
        )  # fmt: skip
        lines = typed_lines() if sys.stdin.isatty() else piped_lines()
        chat.set_video(video)
        Session(chat, processor, args.image).run(lines)


def typed_lines() -> Iterator[str]:
    """Lines from a terminal, with a history where Python has readline; Ctrl-D ends them."""
    with suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it
    print("Ask about the images or the video; /help lists what else a line can be, /quit ends.")
    while True:
        try:
            yield input(">> ")
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends")
        except EOFError:
            print()
            return


def piped_lines() -> Iterator[str]:
    """Lines from a file or another program."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    yield from sys.stdin


class Session:
    """A chat by lines: questions, and commands that begin with a slash."""

    def __init__(self, chat: Chat, processor: Any, images: Sequence[Image.Image] = ()) -> None:
        self.chat, self.processor = chat, processor
        self.new_images = list(images)  # which the next question brings
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.add_image,
            "/video": self.set_video,
            "/keep": self.set_budget,
            "/pruner": self.set_pruner,
            "/overlay": self.write_overlay,
            "/stats": self.print_stats,
            "/clear": self.clear,
            "/help": self.print_help,
            "/quit": self.print_help,  # which `run` obeys
        }

    def run(self, lines: Iterable[str]) -> None:
        """Answer each line. A mistake in one is a sentence on stderr, and the chat goes on."""
        for line in map(str.strip, lines):
            if line == "/quit":
                return
            try:
                self.answer(line)
            except KeyboardInterrupt:
                print("\n(stopped)")
            except UserError as mistake:
                print(f"error: {mistake}", file=sys.stderr)
            except BrokenPipeError:
                raise
            except OSError as mistake:
                where = mistake.filename or "output"
                print(f"error: {where}: {mistake.strerror or mistake}", file=sys.stderr)

    def answer(self, line: str) -> None:
        """Do what a line says. Raises UserError."""
        name, _, argument = line.partition(" ")
        if line.startswith("/"):
            if name not in self.commands:
                raise UserError(f"there is no {name}; {suggestion(name, self.commands)}")
            self.commands[name](argument.strip().strip("'\""))
        elif line:
            with closing(self.chat.stream(line, self.new_images)) as responses:
                for response in responses:
                    self.new_images = []
                    print_piece(response.text)
            print()

    def add_image(self, file: str) -> None:
        """`/image`: open it now, so that a mistake is named now. Raises UserError."""
        if not file:
            self.new_images = []
            return
        if self.chat.clip:
            raise UserError("this chat is about a video; /clear begins again")
        place = file if is_url(file) else expand_home(file)
        [source] = list_images(place, self.chat.options.get("allow_url", False))
        image = open_image(source, self.chat._pixel_limit)
        warn_of_photographs(self.processor, [image])
        self.new_images.append(image)
        print(f"The next question is about {file}.")

    def set_video(self, file: str) -> None:
        """`/video`. Raises UserError."""
        if self.new_images:
            raise UserError("the next question has images; /image without a file drops them")
        self.chat.set_video(expand_home(file) if file else None)
        print(f"The questions are about {file or 'no video'}.")

    def set_budget(self, value: str) -> None:
        """`/keep`. Raises UserError."""
        try:
            number = float(value)
        except ValueError:
            raise UserError(f"{value!r} is no number; /keep 0.25 keeps a quarter") from None
        is_share = number <= 1 or not number.is_integer()
        self.chat.configure(
            keep_ratio=number if is_share else None, keep_tokens=None if is_share else int(number)
        )
        print(f"Kept of an image's visual tokens: {value}")

    def set_pruner(self, spec: str) -> None:
        """`/pruner`; none has no budget. Raises UserError."""
        if sys.stdin.isatty():  # lines from a pipe may be a stranger's, who runs no file here
            spec = register_files(spec)
        if not spec:
            raise UserError("give a method: /pruner divprune; `mlx-vlm-prune pruners` lists them")
        if spec == "none":
            self.chat.configure(pruner=spec, keep_ratio=None, keep_tokens=None)
        else:
            self.chat.configure(pruner=spec)
        print(f"Pruner: {spec}")

    def write_overlay(self, file: str) -> None:
        """`/overlay`. Raises UserError."""
        path = expand_home(file or OVERLAY)
        if path.suffix.lower() != ".png":
            raise UserError(f"{path} is drawn as PNG, so name it .png")
        picture = self.latest().overlay()
        check_target(path, replace=True)
        with atomic_path(path, replace=True) as beside:
            picture.save(beside, format="PNG")
        print(f"Overlay: {path}")

    def print_stats(self, argument: str) -> None:
        """`/stats`. Raises UserError."""
        print_figures(result := self.latest())
        print(f"Rows as in the turn before: {self.chat.rows_reused} of {result.prompt_tokens}")

    def latest(self) -> GenerationResult:
        """The latest whole answer. Raises UserError where there is none."""
        if self.chat.result is None:
            raise UserError("there is no answer yet; ask something first")
        return self.chat.result

    def clear(self, argument: str) -> None:
        self.chat.clear()
        self.new_images = []
        print("The chat begins again.")

    def print_help(self, argument: str) -> None:
        print(HELP)


if __name__ == "__main__":
    main()
