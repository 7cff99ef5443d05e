"""Chat templates: a stranger's code, run in jinja's sandbox with a bound on steps and on output.

jinja keeps a template from Python, and not from `'x' * 10**9`, a loop in a loop in a loop, or a
macro that calls itself twice. Here every loop, macro, block, filter, call, operator, comparison and
output first pays for the time and memory that it takes (template_costs.py). A template's result is
that of transformers.
"""

import functools
import json
import logging
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from ..checkpoints.errors import UserError
from . import template_costs as costs
from .template_costs import CALL, METER, Meter, TemplateLimitError, held, spend, weight, weights

logger = logging.getLogger("mlx_vlm_prune")
LONGEST = 1 << 17  # characters of a template; the longest published have 30,000
STEPS = 4_000_000  # of a rendering, whatever it reads
STEPS_BY_INPUT = 200  # and for each step that reading the messages takes
MOST_WRITTEN = 1 << 20  # characters that it may write, whatever it reads
WRITTEN_BY_INPUT = 64

# Filters that take time or memory which their arguments do not tell.
LEFT_OUT = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
IMMEDIATE = {"attr", "count", "d", "default", "first", "last", "length", "random"}
BY_COUNT = {
    "batch", "items", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr",
    "slice",
}  # fmt: skip
ITERATING = {"groupby", "in", "join", "max", "min", "sort", "sum", "unique", "urlencode"}
COMPARING = {
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le",
    "lessthan", "lower", "lt", "ne", "upper",
}  # fmt: skip
WRITING = {"center", "float", "format", "indent", "int", "replace", "trim"}  # of their value's text
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        """
        capitalize casefold center count endswith find format format_map index isalnum isalpha
        isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper
        join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex rjust
        rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill
        """.split()
    ),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    **dict.fromkeys((bytes, int, float, range), frozenset()),
}
# Names that no template can write.
EACH, WEIGH, SLICED, JOINED, SPEND = "for each", "weigh it", "slice it", "join them", "spend them"


class ChatTemplate:
    """A template that was compiled once. Raises whatever jinja raises, and TemplateLimitError."""

    def __init__(self, text: str):
        if len(text) > LONGEST:
            raise TemplateLimitError(f"it has {len(text)} characters; at most {LONGEST} are read")
        sandbox = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_output,
            extensions=[loopcontrols, _Generation],
        )  # fmt: skip
        tree = sandbox.parse(text)
        if tree.find(nodes.EvalContextModifier):
            raise jinja2.TemplateError("it switches escaping on, which no prompt needs")
        with warnings.catch_warnings():  # Python's, of what a stranger's expressions look like
            warnings.simplefilter("ignore")
            self.template = sandbox.from_string(_Metering().visit(tree))

    def render(self, values: Mapping[str, Any]) -> str:
        """The text that it writes of the values. Raises TemplateLimitError for too many steps, or
        too long a text."""
        read = weight(values, STEPS * 100)
        before = METER.set(Meter(STEPS + STEPS_BY_INPUT * read))
        pieces, length = [], 0
        try:
            for piece in self.template.generate(values):
                length += len(piece)
                if length > MOST_WRITTEN + WRITTEN_BY_INPUT * read:
                    raise TemplateLimitError(f"it writes more than {MOST_WRITTEN} characters")
                pieces.append(piece)
        finally:
            METER.reset(before)
        return "".join(pieces)


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> ChatTemplate:
    return ChatTemplate(text)


def check_template(text: str, values: Mapping[str, Any], name: str) -> None:
    """Before another library renders a template without bounds: UserError where it takes too much.

    Whatever else goes wrong that library will say.
    """
    try:
        _compiled(text).render(values)
    except (TemplateLimitError, RecursionError, MemoryError) as problem:
        raise UserError(f"the chat template of {name} is refused: {problem}") from None
    except Exception as problem:
        logger.debug("the chat template of %s: %s", name, problem)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The same settings and extras that transformers gives to templates, and the costs."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.filters["tojson"] = write_json
        for name in LEFT_OUT:
            del self.filters[name]
        self.filters = {name: _metered(name, f) for name, f in self.filters.items()}
        self.filters |= {EACH: costs.each, WEIGH: _weighed, SLICED: _sliced}
        self.filters |= {JOINED: _joined, SPEND: spend}
        compared = {name: _metered(name, self.tests[name]) for name in COMPARING}
        self.tests = {**self.tests, **compared}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        if allowed is not None and attr not in allowed:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        spend(costs.operator_cost(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            spend(weight(argument))
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # str.format comes wrapped
        owner = getattr(method, "__self__", None)
        if isinstance(__obj, Macro | BlockReference | LoopContext):  # its body pays for itself
            spend(CALL)
        else:
            args = tuple(map(held, args))
            named = {k: v for k, v in kwargs.items() if not k.startswith("_")}
            if isinstance(owner, str):
                spend(costs.method_cost(owner, method.__name__, args, named))
            else:
                read = owner if isinstance(owner, list | tuple) else None
                spend(CALL + weights(read, *args, *named.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        return costs.each(result) if costs.is_lazy(result) else result


class _Metering(NodeTransformer):
    """Puts the costs into a template's tree, where the sandbox itself calls nothing."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call_filter(EACH, node.iter, nodes.Const(_static_cost(node)))
        return self._paying(node) if node.recursive else node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._paying(self.generic_visit(node))

    visit_CallBlock = visit_Block = visit_Macro

    def _paying(self, node: Any) -> nodes.Node:
        cost = nodes.Const(_static_cost(node))
        node.body.insert(0, nodes.ExprStmt(_call_filter(SPEND, cost)))
        paying: nodes.Node = node
        return paying

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _weigh_node(node.expr)
        for operand in node.ops:
            iterates = nodes.Const(operand.op in ("in", "notin"))
            operand.expr = _weigh_node(operand.expr, iterates)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call_filter(JOINED, nodes.Tuple(node.nodes, "load"))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call_filter(SLICED, node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _weigh_node(node.key)
        return node


def _weigh_node(node: nodes.Expr, *iterates: nodes.Const) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _call_filter(WEIGH, node, *iterates)


def _call_filter(name: str, node: Any, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None)


def _static_cost(node: nodes.Node) -> int:
    """Steps of running the statements of a body once, without what the values add."""
    data = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
    return 1 + sum(1 for _ in node.find_all(nodes.Node)) + costs.written(data)


def _weighed(value: Any, iterates: bool = False) -> Any:
    """The value, once it is paid that all of it is read."""
    value = held(value) if iterates else value
    spend(CALL + weight(value))
    return value


def _sliced(value: Any) -> Any:
    spend(CALL + (len(value) if hasattr(value, "__len__") else 0))
    return value


def _joined(values: tuple[Any, ...]) -> str:
    spend(CALL + 2 * weights(*values))
    return "".join(map(str, values))


@jinja2.pass_context  # so that nothing is computed while it is compiled
def _output(context: Any, value: Any) -> Any:
    spend(CALL + weight(value))
    return value


def _metered(name: str, function: Any) -> Callable[..., Any]:
    """A filter or test that pays before it runs."""
    before = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def metered(*args: Any, **kwargs: Any) -> Any:
        context, values = args[:before], list(args[before:])
        if name in IMMEDIATE:
            spend(CALL)
        elif name in BY_COUNT:
            size = len(values[0]) if values and hasattr(values[0], "__len__") else 0
            numbers = [n for n in (*values[1:], *kwargs.values()) if isinstance(n, int)]
            spend(CALL + 2 * size + sum(map(abs, numbers)))
        else:
            values = list(map(held, values)) if name in ITERATING else values
            spend(CALL + 2 * weights(*values, *kwargs.values()))
            spend(_further_cost(name, values, kwargs))
        result = function(*context, *values, **kwargs)
        return costs.each(result) if costs.is_lazy(result) else result

    return metered


def _further_cost(name: str, values: list[Any], kwargs: Mapping[str, Any]) -> int:
    """What a filter's arguments make it cost beyond reading them."""

    def argument(place: int, key: str, default: Any = None) -> Any:
        return values[place] if place < len(values) else kwargs.get(key, default)

    text = str(values[0]) if name in WRITING else ""
    if name == "center":
        return costs.width_cost(argument(1, "width", 80))
    if name == "round":
        return 4 * abs(int(argument(1, "precision", 0)))
    if name == "indent":
        return costs.width_cost(argument(1, "width", 4), len(text.splitlines()) + 1)
    if name == "join":
        items = len(values[0]) if hasattr(values[0], "__len__") else 0
        return costs.width_cost(str(argument(1, "d", "")), items)
    if name == "replace":
        return costs.replace_cost(text, argument(1, "old"), argument(2, "new"))
    if name == "trim":
        return costs.strip_cost(text, argument(1, "chars"))
    if name == "format":
        return costs.percent_cost(text, kwargs or tuple(values[1:]))
    if name in ("int", "float"):
        return len(text) ** 2 // 4096
    if name == "sum" and not isinstance(argument(2, "start", 0), int | float):
        raise TypeError("sum adds numbers only")
    return _json_cost(values[0], argument) if name == "tojson" else 0


def _json_cost(value: Any, argument: Callable[..., Any]) -> int:
    """Each part may be indented as often as it lies deep, and stands beside a separator."""
    indent, separators = argument(2, "indent"), argument(3, "separators")
    beside = costs.width_cost(indent, 2 * costs.DEEPEST)
    return weight(value) * (beside + weights(separators)) if indent or separators else 0


class _Generation(Extension):
    """{% generation %} marks an assistant's words for training; here it means nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def write_json(
    value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
    separators: tuple[str, str] | None = None, sort_keys: bool = False,
) -> str:  # fmt: skip
    return json.dumps(  # jinja's own escapes HTML
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
