"""Instructions and their responses as token ids: chat templates, the end of a turn, cutting."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

from jinja2 import TemplateError

from fedpeft.data.schema import shown, text
from fedpeft.errors import BadInput
from fedpeft.tasks.choice import Chat

ASSISTANT: Final = "assistant"
"""The role whose last message is the response."""
PROBE: Final = "fedpeft"
"""A response by which it is found out what a chat template writes behind one."""


class Message(NamedTuple):
    """A message of a dialogue: who speaks (``system``, ``user``, ``assistant``), and what."""

    role: str
    content: str


def messages(value: Any) -> tuple[Message, ...]:
    """Return a list of ``{"role": ..., "content": ...}`` up to its last message of the assistant.

    That one is the response, and what comes behind it is left out. Anything else, and a dialogue
    without a message before the response, raises ValueError.

    >>> said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> messages([*said, {"role": "user", "content": "Bye"}])[-1]
    Message(role='assistant', content='Hello')
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of messages, not {shown(value)}")
    dialogue: list[Message] = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"has no role and content in message {number}: {shown(message)}")
        try:
            dialogue.append(Message(text(message["role"]), text(message["content"])))
        except ValueError as error:
            raise ValueError(f"is wrong in message {number}: role or content {error}") from error
    while dialogue and dialogue[-1].role != ASSISTANT:
        dialogue.pop()
    if not dialogue:
        raise ValueError(f"holds no message of role {ASSISTANT!r}, which would be the response")
    if len(dialogue) == 1:
        raise ValueError("holds no message before the response")
    return tuple(dialogue)


@final
@dataclass(frozen=True)
class Writer:
    """Writes prompts and responses as a tokenizer's model wants them.

    ``has_template``: whether the tokenizer's chat template is used. ``start``: the ids that begin
    a text without a template. ``mark``: the ids behind every response, which a model learns to end
    with. ``ends``: the ids with which a generated response ends.
    """

    tokenizer: Any
    has_template: bool
    start: tuple[int, ...]
    mark: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """Return the ids that end a response: of the mark the last one, and the end of text."""
        return tuple({self.mark[-1], int(self.tokenizer.eos_token_id)})

    def prompts(
        self, dialogues: Sequence[Sequence[Message]], records: Sequence[int]
    ) -> list[list[int]]:
        """Return the ids of each dialogue up to where its response would begin.

        A dialogue that the chat template refuses raises BadInput with its number in ``records``.
        """
        if self.has_template:
            numbered = zip(records, dialogues, strict=True)
            return self._ids(self._rendered(record, one) for record, one in numbered)
        ids = self._ids("\n".join([*(said for _, said in one), ""]) for one in dialogues)
        return [[*self.start, *prompt] for prompt in ids]

    def responses(self, contents: Sequence[str]) -> list[list[int]]:
        """Return the ids of each response, without the mark at its end."""
        return self._ids(contents)

    def text(self, ids: Sequence[int]) -> str:
        """Return a generated response as text, without its end."""
        decoded: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return decoded.strip()

    def _rendered(self, record: int, dialogue: Sequence[Message]) -> str:
        """Return a dialogue as the chat template writes it, ready for a response."""
        try:
            return _templated(self.tokenizer, dialogue, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(message.role for message in dialogue)
            raise BadInput(
                f"record {record}: the model's chat template refuses its messages, of {roles} "
                f"({error})"
            ) from error

    def _ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of texts, without marks of the tokenizer's own, and uncut."""
        tokens = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        ids: list[list[int]] = tokens["input_ids"]
        return ids


def writer(tokenizer: Any, chat: Chat) -> Writer:
    """Return what writes for the model of ``tokenizer``; ``chat``: whether by its template.

    Raises BadInput for a tokenizer without an end of text, and for ``always`` without a template.
    """
    has_template = bool(tokenizer.chat_template)
    if chat == "always" and not has_template:
        raise BadInput(
            "task.chat = 'always': the model's tokenizer has no chat template; "
            "choose 'auto' or 'never', or another model"
        )
    if tokenizer.eos_token_id is None:
        raise BadInput(
            "task.kind = 'causal_lm': the model's tokenizer names no token that ends a text; "
            'add "eos_token" to its tokenizer_config.json'
        )
    has_template = has_template and chat != "never"
    # Not with ``add_special_tokens``: tokenizers may also add an end of text, before the response.
    start: tuple[int, ...] = ()
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        start = (tokenizer.bos_token_id,)
    mark = _mark(tokenizer) if has_template else (tokenizer.eos_token_id,)
    return Writer(tokenizer, has_template, start, mark)


def _mark(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that the chat template writes behind a response, up to a special token.

    Where none follows, the end of text.
    """
    dialogue = [Message("user", PROBE), Message(ASSISTANT, PROBE)]
    behind = _templated(tokenizer, dialogue).rpartition(PROBE)[2]
    ids: list[int] = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for position, token in enumerate(ids, 1):
        if token in special:
            return tuple(ids[:position])
    return (tokenizer.eos_token_id,)


def _templated(tokenizer: Any, dialogue: Sequence[Message], **options: bool) -> str:
    """Return a dialogue as the chat template writes it."""
    said = [message._asdict() for message in dialogue]
    rendered: str = tokenizer.apply_chat_template(said, tokenize=False, **options)
    return rendered


def fitted(
    prompt: Sequence[int], response: Sequence[int], max_length: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Return prompt and response cut to ``max_length`` ids together.

    The prompt is cut from the left so that the response fits, but keeps a quarter of the length.
    Where that is not enough the response loses its end.

    >>> fitted([1, 2, 3, 4, 5], [6, 7], max_length=4)
    ([4, 5], [6, 7])
    >>> fitted([1, 2, 3], [4, 5, 6, 7, 8], max_length=4)
    ([3], [4, 5, 6])
    """
    least = min(len(prompt), max(1, max_length // 4))
    kept = max(least, min(len(prompt), max_length - len(response)))
    return prompt[len(prompt) - kept :], response[: max_length - kept]
