"One hand: the rules of CONTRIBUTING.md (The hand), held over exported cells, tests and tools"
import ast, io, re, statistics, tokenize
from functools import lru_cache
from pathlib import Path
import pytest
from test_repo import ROOT, cells, exports, flags, modules, notebooks, source, text, tracked, tree, where

COLUMNS = 120

def chapters()->list: return [o for o in notebooks() if re.match(r'nbs/\d\d_', o)]
def code(name)->list: return [c for c in cells(name) if source(c).strip()]
def scripts()->list: return [o for o in tracked() if re.match(r'(tests|tools)/\w+\.py$', o)]

@lru_cache(None)
def pieces()->tuple:
    "(where, source) of everything that the rules of writing are about: exported cells, tests, tools"
    out = [(f'{o} {c["id"]}', source(c)) for o in chapters() for c in code(o) if exports(c)]
    return tuple(out+[(o, text(o)) for o in scripts()])

def is_literal(node)->bool:
    "Is it made of nothing but constants?"
    try: ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError): return False
    return True

def tokens(src:str)->list: return list(tokenize.generate_tokens(io.StringIO(src).readline))

def table_lines(src:str)->set:
    "Lines of tables of data: module-level names for constants"
    out = set()
    for o in ast.parse(src).body:
        if isinstance(o, ast.Assign) and is_literal(o.value): out |= set(range(o.lineno, o.end_lineno+1))
    return out

def found(rule)->list: return [(at, o) for at,src in pieces() for o in rule(src)]

# ---- how it is written

def string_lines(src:str)->set:
    "Lines inside strings of several lines: text of another language"
    long = [t for t in tokens(src) if t.type==tokenize.STRING and t.end[0]>t.start[0]]
    return {n for t in long for n in range(t.start[0], t.end[0]+1)}

def wide(src):
    free = table_lines(src)|string_lines(src)
    return [f'line {i}' for i,l in enumerate(src.splitlines(), 1)
            if len(l)>COLUMNS and i not in free and not l.startswith('#|')]

def test_lines_have_120_columns(): assert found(wide)==[]

def joined(src): return [f'line {t.start[0]}' for t in tokens(src) if t.type==tokenize.OP and t.string==';']

def test_one_statement_a_line(): assert found(joined)==[]

COMPARE = ('==', '!=', '<=', '>=', '<', '>')

def spaced_comparison(src):
    out = []
    for t in tokens(src):
        if t.type!=tokenize.OP or t.string not in COMPARE: continue
        before,after = t.line[:t.start[1]],t.line[t.end[1]:]
        if before.endswith(' ') or after.startswith(' '): out.append(f'line {t.start[0]}: {t.line.strip()[:60]}')
    return out

def test_comparisons_have_no_spaces(): assert found(spaced_comparison)==[]

def docstrings(src)->list:
    "The docstring nodes of a piece of code"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    bodies = [n.body for n in ast.walk(ast.parse(src)) if isinstance(n, kinds) and n.body]
    firsts = [b[0].value for b in bodies if isinstance(b[0], ast.Expr) and isinstance(b[0].value, ast.Constant)]
    return [d for d in firsts if isinstance(d.value, str)]

def double_quoted(src):
    docs = {(d.lineno, d.col_offset) for d in docstrings(src)}
    out = []
    for t in tokens(src):
        if t.type!=tokenize.STRING or t.start in docs: continue
        body = re.match(r'[a-zA-Z]*("""|")(.*)\1$', t.string, re.S)
        if body and body[1]=='"' and "'" not in body[2]: out.append(f'line {t.start[0]}: {t.string[:60]}')
    return out

def test_strings_are_single_quoted_unless_they_hold_a_quote(): assert found(double_quoted)==[]

def ended_docstring(src):
    return [d.value[-60:] for d in docstrings(src) if re.search(r'[^.…]\.$', d.value.strip()) and '\n' not in d.value]

def test_docstrings_have_no_final_period(): assert found(ended_docstring)==[]

def said(call)->str:
    "The sentence of an error, its values as …"
    if not call.args: return ''
    parts = ast.walk(call.args[0]) if isinstance(call.args[0], ast.BinOp) else [call.args[0]]
    joined = next((o for o in parts if isinstance(o, (ast.JoinedStr, ast.Constant))), None)
    if isinstance(joined, ast.Constant): return str(joined.value)
    values = joined.values if joined is not None else []
    return ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in values)

def loud_errors(src):
    calls = [n for n in ast.walk(ast.parse(src)) if isinstance(n, ast.Call) and getattr(n.func, 'id', '')=='InputError']
    heard = [said(c) for c in calls]
    return [s[:60] for s in heard if re.match(r'[A-Z][a-z]', s) or re.search(r'[a-z]\.$', s)]

def test_errors_begin_small_and_end_without_a_period():
    assert [(at, o) for at,src in pieces() if at.startswith('nbs/') for o in loud_errors(src)]==[]

def docmented(src)->list:
    "Public functions with parameters that have a comment"
    lines = src.splitlines()
    out = []
    for f in ast.walk(ast.parse(src)):
        if not isinstance(f, ast.FunctionDef) or f.name.startswith('_') and f.name!='__init__': continue
        args = [a for a in f.args.args+f.args.kwonlyargs if a.arg not in ('self','cls')]
        if any('#' in lines[a.lineno-1] for a in args): out.append((f, args, lines))
    return out

def crooked(src):
    out = []
    for f,args,lines in docmented(src):
        places = [a.lineno for a in args]
        if len(set(places))<len(places): out.append(f'{f.name}: two parameters on a line')
        for n in places:
            if not re.match(r' +\*{0,2}\w[^#]*, # \S', lines[n-1]): out.append(f'{f.name}: {lines[n-1].strip()[:50]}')
    return out

def test_docments_stand_in_one_layout():
    assert [(at, o) for at,src in pieces() if at.startswith('nbs/') for o in crooked(src)]==[]

# ---- how dense it is

def nodes_a_line(path)->list:
    "AST nodes on each line of code inside functions, docstrings and comments left out"
    src = path.read_text(encoding='utf-8')
    lines,root = src.splitlines(),ast.parse(src)
    docs = {n for d in docstrings(src) for n in range(d.lineno, d.end_lineno+1)}
    inside = {}
    for f in ast.walk(root):
        if not isinstance(f, ast.FunctionDef): continue
        for n in range(f.body[0].lineno, f.end_lineno+1):
            if n not in docs and lines[n-1].strip() and not lines[n-1].strip().startswith('#'): inside[n] = 0
    for n in ast.walk(root):
        if getattr(n, 'lineno', None) in inside: inside[n.lineno] += 1
    return list(inside.values())

def test_a_line_holds_few_ideas():
    counts = sorted(n for o in modules() for n in nodes_a_line(o))
    median,p90 = statistics.median(counts),counts[int(.9*len(counts))]
    print(f'AST nodes a line inside functions: median {median:g}, p90 {p90}')
    assert median<=9 and p90<=18

def defines(c)->list: return [n for n in ast.parse(source(c)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]

def test_an_exported_cell_is_short():
    counts = [sum(bool(l.strip()) and not l.startswith('#|') for l in source(c).splitlines())
              for o in chapters() for c in code(o) if exports(c) and defines(c)]
    print(f'lines of an exported cell that defines something: median {statistics.median(counts):g}')
    assert statistics.median(counts)<=12

# ---- the rhythm of a chapter

def public(c)->list: return [n.name for n in defines(c) if not n.name.startswith('_')]

def unshown(name)->tuple:
    "Public names of a chapter, and those that the next two code cells do not use"
    cs = code(name)
    names,missed = [],[]
    for i,c in enumerate(cs):
        if not exports(c): continue
        after = ' '.join(source(o) for o in [o for o in cs[i+1:] if not exports(o)][:2])
        names += public(c)
        missed += [n for n in public(c) if not re.search(rf'\b{n}\b', after)]
    return names, missed

def in_chapters(f):
    found = chapters() if (ROOT/'.git').exists() else []
    return pytest.mark.parametrize('name', found, ids=lambda o: o[4:-6])(f)

@in_chapters
def test_a_public_name_is_used_within_two_cells(name):
    names,missed = unshown(name)
    assert len(missed)<=.1*len(names), missed

@in_chapters
def test_no_more_than_three_exported_cells_in_a_row(name):
    row = ''.join('x' if exports(c) else '.' for c in code(name))
    assert 'xxxx' not in row

def test_there_are_asserts_for_what_is_defined():
    defined = sum(len(defines(c)) for o in chapters() for c in code(o) if exports(c))
    shown = [source(c) for o in chapters() for c in code(o) if not exports(c)]
    asked = sum(len(re.findall(r'\bassert\b|\btest_\w+\(', s)) for s in shown)
    print(f'{asked} asserts for {defined} definitions: {asked/defined:.2f}')
    assert asked>=1.5*defined

@in_chapters
def test_a_command_runs_once_in_its_own_chapter(name):
    made = [n.name for c in code(name) if exports(c) for n in defines(c) if re.match(r'medsam_|pre_', n.name)]
    run = ' '.join(source(c) for c in code(name) if not exports(c))
    assert [n for n in made if not re.search(rf'\b{n}\b', run)]==[]

# ---- one name, one thing

def test_there_is_one_palette():
    hexes = {where(o): re.findall(r"'#[0-9a-f]{6}'", o.read_text(encoding='utf-8')) for o in modules()}
    assert [o for o,h in hexes.items() if len(h)>4]==['medsam_nb/show.py']

def test_there_is_one_window_table():
    pair = re.compile(r'\(-160, ?240\)')
    assert [where(o) for o in modules() if pair.search(o.read_text(encoding='utf-8'))]==['medsam_nb/view.py']

def test_label_ids_have_one_name():
    "A parameter called label_id or names (for name -> id) is the hand of yesterday"
    bad = []
    for o in modules():
        for f in ast.walk(tree(o)):
            if not isinstance(f, ast.FunctionDef): continue
            bad += [f'{where(o)}: {f.name}' for a in f.args.args+f.args.kwonlyargs if a.arg=='label_id']
    assert bad==[]
