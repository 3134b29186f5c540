"""Writes tests/golden/chat/expressions.json: template sources and their output in transformers' Jinja2 environment (null: refused)."""

import json
import pathlib

from transformers.utils.chat_template_utils import _compile_jinja_template

VARIABLES = {"f": 1e-7, "big": 1e20, "l": [1e16, 2.0, None, True, "it's"], "d": {"a": 0.1, "b": [False]}, "s": "a-b c"}
EXPRESSIONS = r"""
f | string
f ~ big ~ l
'x' ~ 1e16 ~ none ~ true
l
d
d | string
[f, [f]]
{'k': f, 1: none}
(1,)
(1, 'a')
["a'b", 'a"b', 'a\'b"c', 'a\nb\t\\', 'é', '\x01', '\u200b']
1e22
-0.0
1.0
3 / 2
4 / 2
7 // 2
-7 // 2
-7 % 3
7.5 % 2
2 ** 10
'%s and %s' % ('a', 1.0)
'%d%%' % 5
'%5.2f|%-5s|%05d' % (3.14159, 'ab', 42)
'%(a)s' % d
'%s' % l
'%x %X %o %e %g %g' % (255, 255, 8, 12345.678, 0.0001, 1e10)
'%r' % 'a'
'%+d % d' % (1, 2)
'%s %s' % 'a'
'%s' % (1, 2)
'%.3s|%c|%c' % ('abcdef', 65, 'z')
none is iterable
1 is iterable
'a' is iterable
[] is iterable
{} is iterable
missing is iterable
none is sequence
'a' is sequence
{} is sequence
[1] is sequence
1 is sequence
{} is mapping
[] is mapping
none is mapping
range is callable
'a' is callable
missing is callable
true is number
1 is number
1.0 is float
1 is float
true is integer
1 is integer
true is boolean
'a' is string
none is none
missing is defined
'ab'.center(7)
'abc'.center(6, '*')
'ab'.ljust(5, '.') ~ '|'
'ab'.rjust(5) ~ '|'
'-42'.zfill(6)
'aBc'.swapcase()
'hello'.index('l')
'hello'.rindex('l')
'hello'.index('z')
'hello'.find('l', 3)
'hello'.rfind('l')
'a-b-c'.partition('-')
'a-b-c'.rpartition('-')
'abc'.partition('-')
'abc'.rpartition('-')
'Straße'.casefold()
'a\tb'.expandtabs()
'a\tb'.expandtabs(4)
'a'.encode()
'a'.encode('utf-8').decode()
'12'.isdecimal()
'1²'.isdecimal()
'1²'.isdigit()
'½'.isnumeric()
'½'.isdigit()
''.isdigit()
'a1'.isalnum()
'a b'.isalpha()
' \t'.isspace()
'Ab Cd'.istitle()
'a_1'.isidentifier()
'a b  c '.split()
'a b  c '.split(maxsplit=1)
' a b  c '.split(none, 1)
'a b  c '.rsplit(none, 1)
'a,b,c'.split(',', 1)
'a,b,c'.split(',', maxsplit=1)
'a,b,c'.split(sep=',')
'a,b,c'.rsplit(',', 1)
'a,b,c'.rsplit(',', maxsplit=1)
'a,,b'.split(',')
''.split(',')
''.split()
'a\nb\r\nc\n'.splitlines()
'a\nb\r\nc'.splitlines(true)
'a\nb'.splitlines(keepends=true)
'aaa'.replace('a', 'b', 2)
'aaa'.replace('', '-')
'abab'.count('ab')
'abab'.count('b', 2)
'abc'.startswith(('x', 'a'))
'abc'.startswith('b', 1)
'abc'.endswith('c')
'xxaxx'.strip('x')
'xxaxx'.lstrip('x')
'xxaxx'.rstrip('x')
"they're bill's".title()
'hello WORLD'.capitalize()
'abc'.removeprefix('a')
'abc'.removesuffix('c')
', '.join(['a', 'b'])
', '.join([1])
'{} {}'.format('a', 1)
'{}'.format(f)
'{:.2f}|{:>5}|{:<5}|{:^5}'.format(3.14159, 'a', 'b', 'c')
'{0}{1}{0}'.format('a', 'b')
'{name}'.format(name='x')
[1, 2, 3].index(2)
[1, 2, 2].count(2)
[1].index(5)
[1].append(2)
(1, 2).count(1)
d.get('a')
d.get('zz')
d.get('zz', 1)
d.items() | list
d.keys() | list
d.values() | list
d | items | list
d | dictsort
'a b c d e f g' | truncate(9)
'a b c d e f g' | truncate(9, true)
'a b c d e f g' | truncate(9, false, '!', 0)
'foo bar' | truncate(5)
'one two, three-four' | wordcount
'one two three four five' | wordwrap(9)
'abcdefghij' | wordwrap(4)
'a b' | wordwrap(1)
'ab' | center(7) ~ '|'
'abc' | center(6) ~ '|'
'a b/c?d=é&' | urlencode
{'a': 'b c', 'd': 1} | urlencode
'<p>a  <b>b</b></p>&lt;' | striptags
{'class': 'a"b', 'id': none, 'x': 1} | xmlattr
1 | filesizeformat
100 | filesizeformat
1000 | filesizeformat
123456 | filesizeformat
123456 | filesizeformat(true)
'12' | int
'x' | int
'x' | int(5)
'x' | int(default=7)
'ff' | int(base=16)
'0xff' | int(0, 16)
'1.9' | int
1.9 | int
none | int
true | int
'1_000' | int
'1.5' | float
'x' | float
'x' | float(2.5)
'nan' | float
1 | float
42.55 | round
42.55 | round(1)
2.5 | round
3.5 | round
0.125 | round(2)
42.55 | round(1, 'floor')
42.51 | round(0, 'ceil')
42 | round
1234.5 | round(-2)
[1.0, none, true, 'a'] | join(', ')
[{'a': 1}, {'a': 2}] | join('-', attribute='a')
'abc' | join('-')
'<a href="x">\'&' | e
'<a>' | escape
'<a>' | safe
('<a>' | safe) | e
('<a>' | safe) + '<b>'
'<b>' + ('<a>' | safe)
'<a>' | safe + '<b>' + '&' | upper + '>'
'<a>' | safe + '<b>' if true else '<c>' + '<d>'
1 + 2 + ('<a>' | safe | length)
3 - 1 + ('abc' | safe | length) * 2
[1] + [2] + (['<a>' | safe])
('<a>' | safe) + 1
'<a>' | safe + '<b>' == '<a>&lt;b&gt;'
'<a>' | e | e
'<a>' | forceescape
'a' | upper
1e-7 | upper
'HELLO w' | lower
'hello wORLD foo-bar (baz)' | title
'hELLO' | capitalize
'  a ' | trim
'xxaxx' | trim('x')
'aaa' | replace('a', 'b', 2)
'a\nb\n\nc' | indent
'a\nb\n\nc' | indent(2, true)
'a\nb\n\nc' | indent(2, false, true)
'a\nb' | indent(width='> ', first=true)
'%s-%s' | format('a', 1.0)
'%(a)s' | format(a=1)
'abc' | list
{'a': 1} | list
[3, 1, 2] | sort
['b', 'A', 'c'] | sort
['b', 'A'] | sort(case_sensitive=true)
[3, 1, 2] | sort(reverse=true)
[1, 2, 3] | sum
[1, 2, 3] | first
[1, 2, 3] | last
'abc' | first
[1, 2, 3] | max
[1, 1, 2] | unique | list
[1, 2, 3, 4] | batch(3) | list
[1, 2, 3, 4] | slice(2) | list
[1, 2, 3] | map('string') | list
[{'a': 1}, {'a': 2}] | map(attribute='a') | list
[0, 1, 2] | select | list
[1, 2, 3] | select('odd') | list
[{'a': 1}, {'a': 0}] | selectattr('a') | list
[{'a': 1}, {'a': 0}] | rejectattr('a') | list
[{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | list
'abc' | reverse
[1, 2] | reverse | list
'abc'[::-1]
[1, 2, 3][1:]
[1, 2, 3][-1]
'abc'[-2:]
'a' * 3
[1] * 2
[1] + [2.0]
'a' in 'abc'
'z' not in 'abc'
1 == 1.0
1 < 2 < 3
'a' ~ 'b' if true else 'c'
'a' ~ ('b' ~ 1.0)
1 + 2 ~ 3 * 4
not true ~ 'a'
'a' ~ -1.0
'\x41\d\u00e9\/'
'abc' | length
d | length
none | length
missing | length
missing | default('x')
'' | default('x')
'' | default('x', true)
f | tojson
big | tojson
l | tojson
d | tojson(indent=2)
0.1 + 0.2
1e15
123456789012345678
1e16 | int
[1, [2, [3.5, none]]] | string
range(3) | list
range(3) | join
-5 | abs
'a,b' | replace(',', ';')
dict(a=1)
namespace(a=1.0).a
'a' 'b'
"é" | urlencode
"it's" | pprint
"""
TEMPLATES = [
    "a\r\nb\rc\n\n", "a\n", "a\n\n", "{% if true %}\r\nx\r\n{% endif %}\r\ny", "{% raw %}{{ 'a' ~ 1.0 % 2 }}{% endraw %}", "{# {{ x ~ #}y",
    "  {% set x = 1.0 ~ 'a' %}\n{{ x }}", "{% set ns = namespace(x='') %}{% for i in l %}{% set ns.x = ns.x ~ i %}{% endfor %}{{ ns.x }}",
    "{% for k, v in d.items() %}{{ k ~ '=' ~ v }};{% endfor %}", "{% macro m(x, y=1.5) %}{{ x ~ y }}{% endmacro %}{{ m('a') }}{{ m(1e-7, y=2) }}",
    "{% for i in range(5) if i % 2 == 0 %}{{ i }}{% if loop.last %}.{% endif %}{% endfor %}", "{{ {'a': {'b': 1.0}}['a'] }}",
    "{% if 'a' ~ 'b' == 'ab' and not (s ~ 1) in ['x'] %}yes{% else %}no{% endif %}", "{{ l | map('string') | join(' ~ ') ~ '%}' }}",
    "{% set x %}{{ 1e-7 }}{% endset %}{{ x ~ x | length }}", "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
    "{{ x.y }}", "{{ x }}", "{%- if d is mapping and d.a is not string %}{{ d.a }}{% endif -%}\n z",
]


def main():
    cases = []
    for source in [f"{{{{ {line} }}}}" for line in EXPRESSIONS.strip("\n").split("\n")] + TEMPLATES:
        try:
            text = _compile_jinja_template(source).render(**VARIABLES)
        except Exception:
            text = None
        cases.append([source, text])
    path = pathlib.Path(__file__).parent.parent / "crates/metal-candle/tests/golden/chat/expressions.json"
    path.write_text("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n")
    print(len(cases), "cases,", sum(text is None for _, text in cases), "refused")


main()
