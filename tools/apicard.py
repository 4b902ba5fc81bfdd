"""How an API card of the documentation looks: signature, docstring, then a table of the parameters. tools/docs.py
names it to nbdev as `renderer`"""
import inspect, re
from dataclasses import is_dataclass
from importlib import import_module
from fastcore.docments import DocmentTbl
from nbdev.showdoc import BasicMarkdownRenderer
from nbdev.doclinks import NbdevLookup

def short(anno)->str:
    "A type as one says it: without quotes and without the modules it comes from"
    return re.sub(r'\b(?:[A-Za-z_]\w*\.)+(\w+)', r'\1', inspect.formatannotation(anno).strip("'"))

def said(default)->str:
    "A default as one would write it; a dataclass makes some anew, and their making has no name"
    return '…' if repr(default)=='<factory>' else getattr(default, '__name__', None) or repr(default)

def param(p)->str:
    "One parameter of a signature"
    star = {p.VAR_POSITIONAL: '*', p.VAR_KEYWORD: '**'}.get(p.kind, '')
    anno = '' if p.annotation is p.empty else f':{short(p.annotation)}'
    default = '' if p.default is p.empty else f'={said(p.default)}'
    return f'{star}{p.name}{anno}{default}'

def signature(sym, name:str, sig, width:int=72)->str:
    "`sym` as one would write it, on one line or with a line for each parameter"
    if sig is None: return name
    own = [param(p) for k, p in sig.parameters.items() if k!='self']
    isclass = inspect.isclass(sym)
    to = '' if isclass or sig.return_annotation is sig.empty else f' -> {short(sig.return_annotation)}'
    head = f"{'class ' if isclass else ''}{name}"
    line = f"{head}({', '.join(own)}){to}"
    return line if len(line)<=width else f'{head}(\n    ' + ',\n    '.join(own) + f'\n){to}'

def exported(sym, name:str):
    "A class as its module has it: the one a notebook makes has no source, so the comments in it are not to be read"
    m = inspect.isclass(sym) and re.search(r'(\w+)/(\w+)\.py', NbdevLookup().code(name) or '')
    return getattr(import_module(f'{m[1]}.{m[2]}'), sym.__name__, sym) if m else sym

def table(sym)->str:
    "Name, type, default and what the comment beside it says; empty when no parameter has a comment"
    try: t = DocmentTbl(sym)
    except (TypeError, ValueError, KeyError): return ''
    if not t.has_docment: return ''
    def cell(k, o):
        if o is inspect.Parameter.empty or o is type(None) or k=='anno' and o is None: return ''
        text = short(o) if k=='anno' else f'`{said(o)}`' if k=='default' else str(o)
        return re.sub(r'(?<!\\)\|', r'\|', text).replace('\n', ' ')
    def row(first, values):
        return f"| {' | '.join([first, *(cell(k, o) for k, o in zip(t._columns, values))])} |"
    out = [f"| {' | '.join(['Name', *t._columns.values()])} |", '|' + ' --- |'*(1 + len(t._columns)),
           *(row(f'`{r[0]}`', r[1:]) for r in t._row_list)]
    if t.has_return: out.append(row('**Returns**', [t.dm['return'][k] for k in t._columns]))
    return '\n'.join(out)

class Card(BasicMarkdownRenderer):
    "nbdev's card with a table in place of the comments in the signature"
    def _repr_markdown_(self):
        parts, src = ['---'], NbdevLookup().code(self.fn)
        if src: parts.append(f'[source]({src}){{target="_blank" style="float:right; font-size:smaller"}}')
        parts.append(f"{'#'*self.title_level} {self.nm}")
        parts.append(f'```python\n{signature(self.sym, self.nm, self.sig)}\n```')
        if self.docs: parts.append(re.sub(r'^(\s*)(.+)', r'\1*\2*', self.docs, count=1))
        if t := table(exported(self.sym, self.fn) if is_dataclass(self.sym) else self.sym): parts.append(t)
        if inspect.isclass(self.sym): parts += [o for f in self.methods() for o in self.method(*f)]
        return '\n\n'.join(parts)

    def methods(self)->list:
        "The class's own public methods whose parameters are explained: (name, function, table)"
        cls = exported(self.sym, self.fn)
        own = [(k, inspect.unwrap(getattr(cls, k))) for k, v in vars(self.sym).items() if not k.startswith('_')
               and (inspect.isfunction(v) or isinstance(v, (classmethod, staticmethod)))]
        return [(k, f, t) for k, f in own if (t := table(f))]

    def method(self, name, f, t)->list:
        "A smaller card below the class's"
        full = f'{self.nm}.{name}'
        own = inspect.signature(f)
        sig = own.replace(parameters=[p for k, p in own.parameters.items() if k not in ('self', 'cls')])
        doc = inspect.getdoc(f) or ''
        return [f"{'#'*(self.title_level+1)} {full}", f'```python\n{signature(f, full, sig)}\n```',
                *([f'*{doc.splitlines()[0]}*'] if doc else []), t]
