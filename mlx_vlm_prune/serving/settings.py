"""What a server was started with, and the limits that nobody chooses."""

from dataclasses import dataclass

from ..checkpoints.errors import UserError
from ..inputs.budget import check_budget
from ..inputs.image import MAX_PIXELS, check_max_pixels
from ..pruners import AUTO

KEY_VARIABLE = "MLX_VLM_PRUNE_API_KEY"  # in place of an option that other users can list
DEFAULT_METHOD = AUTO  # where a request has a budget and nobody names a method
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_BODY_BYTES = 64_000_000  # of a request; pictures in base64 are a third larger than their files
MAX_OPEN_BYTES = 2_000_000_000  # bodies and opened pictures of all requests that are not answered
MAX_SIDE_RATIO = 200  # of a picture's sides; Qwen's processors refuse more, too


@dataclass(frozen=True)
class ServerSettings:
    """`mlx-vlm-prune serve`'s options. Raises UserError for what cannot be.

    `method` chooses tokens where a request names none; `is_pruning` says whether it does so for
    requests that say nothing of a budget. With `caution` what `auto` keeps depends on the question,
    too. `places_pictures` says whether the model reads pictures between the words of a question;
    mlx-vlm's chat templates have places of their own. `why_no_clips` says why it reads no video,
    if so.
    """

    model_name: str
    method: str = DEFAULT_METHOD
    is_pruning: bool = False
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    budget_ms: float | None = None
    caution: bool = True
    host: str = LOOPBACK[0]
    max_pixels: int = MAX_PIXELS
    max_images: int = 16
    allow_url: bool = False
    queue: int = 64
    batch: int = 16
    timeout: float = 600.0
    api_key: str | None = None
    cache_bytes: int = 1_000_000_000
    places_pictures: bool = True
    why_no_clips: str | None = None

    def __post_init__(self) -> None:
        check_budget(self.keep_ratio, self.keep_tokens)
        budgets = (self.keep_ratio, self.keep_tokens, self.budget_ms)
        if sum(budget is not None for budget in budgets) > 1:
            raise UserError("give keep_ratio, keep_tokens or budget_ms, not several")
        if self.budget_ms is not None and not 0 < self.budget_ms < float("inf"):
            raise UserError(f"budget_ms is {self.budget_ms}; it must be a number above 0")
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"timeout is {self.timeout}; it must be seconds, more than 0")
        check_max_pixels(self.max_pixels)
        if not all("!" <= character <= "~" for character in self.api_key or ""):
            raise UserError("api_key may have letters, digits and signs of ASCII, and no spaces")

    @property
    def most_requests(self) -> int:
        """How many requests may be open at once: those that wait, and those being answered."""
        return self.queue + self.batch
