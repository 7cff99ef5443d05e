"""Promises about chat templates from strangers: none takes much time or memory."""

import random
import resource
import time
from typing import Any

import pytest
from jinja2 import pass_context
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.prompt import Tokenizer
from mlx_vlm_prune.inputs.template import ChatTemplate, write_json
from mlx_vlm_prune.scenes import CHECKPOINT

from .limited import run_limited

TURNS = [
    {"role": "user", "content": "Is it <b>red</b>?\n" * 9},
    {"role": "assistant", "content": "é"},
]


def grown(step: str, first: str = "'x'") -> str:
    """A template that does a step sixty times."""
    loop = "{% for i in range(60) %}" + step + "{% endfor %}"
    return f"{{% set ns = namespace(x={first}, y={first}) %}}{loop}"


SHARED = grown("{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}", "(1,)")
THOUSANDS = "{% for i in range(100000) %}"
HOSTILE = {
    "center": "{{ 'x' | center(99999999) }}",
    "method": "{{ 'x'.center(99999999) }}",
    "method by its name": "{{ ('x' | attr('center'))(99999999) }}",
    "filter by its name": "{{ ['x'] | map('center', 99999999) | list | length }}",
    "times": "{{ 'x' * 10**9 }}",
    "list times": "{% set x = [0] * 10**9 %}",
    "power": "{{ 2**100000000 }}",
    "numbers": grown("{% set ns.x = ns.x * ns.x %}", "3"),
    "joined": grown("{% set ns.x = ns.x ~ ns.x %}"),
    "added": grown("{% set ns.x = ns.x + ns.x %}"),
    "replaced": grown("{% set ns.x = ns.x.replace('x', 'xx') %}"),
    "replaced by a filter": grown("{% set ns.x = ns.x | replace('', 'x') %}"),
    "loops": THOUSANDS * 3 + "{% endfor %}" * 3,
    "loops of nothing": THOUSANDS + "{% for j in range(100000) if false %}" + "{% endfor %}" * 2,
    "10 MB": THOUSANDS + "a hundred letters " * 6 + "{% endfor %}",
    "10 MB that are held": "{% set x %}" + THOUSANDS + "a " * 999 + "{% endfor %}{% endset %}",
    "a macro twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a macro of itself": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a block of itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a loop of itself": "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}"
    "{% endif %}{% endfor %}",
    "callers": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call f() %}" * 40
    + "{% endcall %}" * 40,
    "shown": SHARED + "{{ ns.x }}",
    "compared": SHARED + "{{ ns.x == ns.y }}",
    "looked up": SHARED + "{{ {}[ns.x] }}",
    "a key": SHARED + "{{ {ns.x: 1} | length }}",
    "as json": SHARED + "{{ ns.x | tojson | length }}",
    "sorted": SHARED + "{{ [ns.x, ns.y] | map('list') | sort | length }}",
    "in": SHARED + "{{ ns.x in [ns.y] | map('list') }}",
    "format": "{{ '{:999999999}'.format('x') }}",
    "format in a format": "{{ '{:{w}}'.format('x', w=999999999) }}",
    "percent": "{{ '%0000000000999999999d' | format(1) }}",
    "percent star": "{{ '%*d' % (999999999, 1) }}",
    "percent key": "{{ '%((a)b)999999999d' % {'(a)b': 1} }}",
    "fields": "{{ ('{0}' * 100000).format('x' * 100000) | length }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) | length }}",
    "separator": "{{ range(100000) | join('x' * 100000) | length }}",
    "join": "{{ ('x' * 100000).join(['a'] * 100000) | length }}",
    "batch": "{{ [1] | batch(999999999, 0) | list | length }}",
    "slice": "{{ [1] | slice(999999999) | list | length }}",
    "round": "{{ 1.5 | round(999999999, 'ceil') }}",
    "digits": "{{ ('9' * 4000000) | int }}",
    "json indent": "{{ [[[1]]] | tojson(indent=999999999) }}",
    "bytes": "{{ (1).to_bytes(999999999, 'big') | length }}",
    "words": "{{ lipsum(n=100000000) }}",
    "wrap": "{{ ('a' * 100000) | wordwrap(1) }}",
    "strip": "{{ ('b' * 1000000).strip('a' * 1000000 ~ 'b') | length }}",
    "cut": "{% set x = 'x' * 1000000 %}" + THOUSANDS + "{% set y = x[1:] %}{% endfor %}",
    "itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "escapes": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "brackets": "{{ " + "(" * 900 + "1" + ")" * 900 + " }}",
    "blocks": "{% if 1 %}" * 900 + "{% endif %}" * 900,
    "length": "{{ a }}" * 20000,
    "message": "{{ raise_exception('\x1b[2Jx' * 100000) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_too_much_is_refused_in_one_short_sentence(name):
    tokenizer = Tokenizer.from_folder(CHECKPOINT)
    tokenizer.chat_template = HOSTILE[name]
    start = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refused:
        tokenizer.render(TURNS)
    sentence = str(refused.value)
    assert sentence.isprintable() and len(sentence) < 700
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB on Linux


def test_a_long_conversation_is_no_hostile_template():
    text = (
        "{%- for m in messages -%}{%- if m.content is string -%}<|{{ m['role'] }}|>{{ '\n' }}"
        "{{ m.content | trim }}{%- else -%}{%- for p in m.content -%}{{ p.text ~ '.' }}"
        "{%- endfor -%}{%- endif -%}{{ '<|end|>' + '\n' }}{%- endfor -%}"
    )
    turns = [*TURNS, {"role": "user", "content": [{"type": "text", "text": "a"}]}] * 2000
    assert ChatTemplate(text).render({"messages": turns}).count("<|end|>") == 6000
    long = [{"role": "user", "content": "one two " * 500_000}]
    assert len(ChatTemplate(text).render({"messages": long})) > 3_900_000


VALUES = """
    messages 'ab' 'x' '' 'é{}' '%s-%d' 3 0 -1 99999999 2.5 true none a ns.x ns [1,'b'] (1,2)
    {'k':'v'} range(9) range(100000) messages[0] messages[0].content m i loop.index loop.length
    undefined_name bos_token
""".split()
FILTERS = """
    length upper lower trim list first last join join(',') tojson tojson(indent=2) string int float
    replace('a','bcd') center(40) center(9999999) indent(4) sort unique reverse batch(2) slice(3)
    map('upper') map('string') select('string') selectattr('role','equalto','user') default('d')
    items dictsort sum min max round abs title capitalize wordcount truncate(5) escape urlencode
    random attr('upper') groupby('role') safe format(1) rejectattr('role') map(attribute='role')
""".split()
METHODS = """
    upper() strip() split() split('a') replace('a','bb') join(['q','r']) center(30) zfill(9999999)
    startswith('a') format(1,2) get('k') items() keys() count('a') index('a') title() splitlines()
    pop() encode() __class__
""".split()
OPERATORS = "+ - * / // % ** ~ == != < > in and or".split()


class Maker:
    """Draws templates by jinja's grammar."""

    def __init__(self, seed: int, is_tame: bool = False):
        self.draw, self.is_tame = random.Random(seed), is_tame

    def pick(self, listed: list[str]) -> str:
        while True:
            text = self.draw.choice(listed)
            if not (self.is_tame and text in ("random", "99999999", "range(100000)", "ns", "**")):
                return text

    def value(self, depth: int = 0) -> str:
        kind = self.draw.randrange(9 if depth < 3 else 3)
        if kind < 3:
            return self.pick(VALUES)
        if kind < 6:
            return f"({self.value(depth + 1)} | {self.pick(FILTERS)})"
        if kind == 6:
            return f"({self.value(depth + 1)}).{self.pick(METHODS)}"
        if kind == 7:
            return f"({self.value(depth + 1)} {self.pick(OPERATORS)} {self.value(depth + 1)})"
        return f"{self.value(depth + 1)}[{self.pick(['0', '-1', '1:', '::-1', ':2', '(1,)', 'i'])}]"

    def statement(self, depth: int = 0) -> str:
        kind = self.draw.randrange(9 if depth < 2 else 3)
        inner = lambda: "".join(  # noqa: E731
            self.statement(depth + 1) for _ in range(self.draw.randint(1, 2))
        )
        if kind < 2:
            return "{{ " + self.value() + " }}"
        if kind == 2:
            return "{% set " + self.pick(["a", "ns.x", "b"]) + " = " + self.value() + " %}"
        if kind == 3:
            return "{% if " + self.value() + " is defined %}" + inner() + "{% endif %}"
        if kind < 6:
            name = self.pick(["i", "m"])
            return f"{{% for {name} in {self.value()} %}}{inner()}{{% endfor %}}"
        if kind == 6:
            return f"{{% set a %}}{inner()}{{% endset %}}"
        if kind == 7 and depth == 0:
            return f"{{% macro a(i) %}}{inner()}{{% endmacro %}}{{{{ a(1) }}}}"
        return self.pick(["text ", "\n", "<|im_start|>", "{# no #}"])

    def template(self) -> str:
        body = "".join(self.statement() for _ in range(self.draw.randint(1, 3)))
        return "{% set ns = namespace(x=1) %}" + body


def outcome(render: Any) -> str | None:
    """What a template writes; None where it is refused."""
    try:
        text: str = render({"messages": TURNS, "bos_token": "<s>"})
    except Exception:
        return None
    return text


def test_what_a_tame_template_writes_is_what_jinja_itself_writes():
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[loopcontrols],
        finalize=pass_context(lambda context, value: value),  # nothing is computed beforehand
    )
    plain.filters["tojson"] = write_json
    written = 0
    for seed in range(1000):
        text = Maker(seed, is_tame=True).template()
        expected = outcome(lambda values, text=text: plain.from_string(text).render(values))
        actual = outcome(lambda values, text=text: ChatTemplate(text).render(values))
        if expected is None or " at 0x" in expected:  # an address
            continue
        written += 1
        refused = ("encode", "__class__", "center(9999999)", "zfill(9999999)")
        assert actual == expected or any(name in text for name in refused), text
    assert written > 200


FUZZ = """
import time
from tests.test_hostile_templates import Maker, TURNS
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.prompt import Tokenizer
from mlx_vlm_prune.scenes import CHECKPOINT

tokenizer, counts, longest = Tokenizer.from_folder(CHECKPOINT), {"written": 0, "refused": 0}, 0
for seed in range(1000):
    case = Tokenizer(tokenizer.backend, {}, Maker(10_000 + seed).template())
    start = time.process_time()
    try:
        case.render(TURNS)
        counts["written"] += 1
    except UserError as e:
        assert str(e).isprintable() and len(str(e)) < 700
        counts["refused"] += 1
    longest = max(longest, time.process_time() - start)
assert longest < 10, longest
print(min(counts.values()), time.process_time())
"""


def test_a_thousand_templates_are_written_or_refused_within_limits():
    assert int(run_limited(FUZZ, seconds=120, gigabytes=3).split()[0]) > 100
