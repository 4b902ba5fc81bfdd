"""The repository keeps its own rules: notebooks, library and README in step, imports upwards, nothing that only works
on one machine"""
import ast, json, os, re, shutil, subprocess, sys
from functools import lru_cache
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT/'medsam_nb'
sys.path.insert(0, str(ROOT/'tools'))
import notebooks as runner, pins

ORDER = ('core show metrics volume phantom view curate prompt sam embed predict finetune evaluate segment draw '
         'doctor pre_CT pre_grey_rgb2D').split()
MB = 1_000_000

@lru_cache(None)
def tracked()->tuple:
    "What is in git or would be with `git add .`"
    if not (ROOT/'.git').exists(): pytest.skip('not a git checkout')
    out = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT,
                         capture_output=True, check=True).stdout
    return tuple(sorted({o for o in out.decode().split('\0') if o and (ROOT/o).is_file()}))

def copy_tracked(dest:Path)->Path:
    for o in tracked():
        (dest/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/o, dest/o)
    return dest

@lru_cache(None)
def text(name:str)->str:
    try: return (ROOT/name).read_text(encoding='utf-8')
    except UnicodeDecodeError: return ''

def notebooks(): return [o for o in tracked() if o.startswith('nbs/') and o.endswith('.ipynb')]
def cells(name, kind='code'): return [c for c in json.loads(text(name))['cells'] if c['cell_type']==kind]
def source(c): return ''.join(c['source'])
def flags(c): return {o.rstrip(':') for o in re.findall(r'^#\|\s*(\S+)', source(c), re.M)}
def exports(c): return flags(c) & {'export', 'exports', 'exporti'}
def modules(): return sorted(o for o in LIB.glob('*.py') if not o.name.startswith('_'))
def tree(path): return ast.parse(path.read_text(encoding='utf-8'))
def where(o): return o.relative_to(ROOT).as_posix()

def run(*args, cwd):
    "A tool in a clean copy: it must see the copy's package and settings, and not think that a notebook is being tested"
    env = {**{k: v for k, v in os.environ.items() if k!='IN_TEST'}, 'PYTHONPATH': str(cwd)}
    r = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stdout + r.stderr
    return r.stdout

# ---- notebooks, library and README in step

def test_there_are_notebooks():
    assert len(notebooks())>5

def test_export_gives_what_is_there(tmp_path):
    copy_tracked(tmp_path)
    lib = tmp_path/'medsam_nb'
    for o in lib.glob('*.py'):
        if o.name!='__init__.py': o.unlink()  # so a module whose notebook is gone shows too
    run('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()', cwd=tmp_path)
    made = {o.name for o in lib.glob('*.py')}
    here = {o.name for o in LIB.glob('*.py')}
    assert here - made==set(), 'modules that no notebook makes: delete them'
    assert made - here==set(), 'modules not exported yet: make sync'
    names = [f'medsam_nb/{o}' for o in sorted(made)] + ['pyproject.toml']
    stale = [o for o in names if (tmp_path/o).read_bytes()!=(ROOT/o).read_bytes()]
    assert stale==[], 'out of step with nbs/: edit the notebook, then make sync'

def test_notebooks_are_clean(tmp_path):
    copy_tracked(tmp_path)
    run('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean.__wrapped__()', cwd=tmp_path)
    assert [o for o in notebooks() if (tmp_path/o).read_bytes()!=(ROOT/o).read_bytes()]==[], 'make sync'

def test_readme_is_index():
    r = subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode==0, r.stderr

def test_nbdev_yml_is_from_settings(tmp_path):
    copy_tracked(tmp_path)
    run('-c', 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()', cwd=tmp_path)
    for o in ('nbs/nbdev.yml', 'nbs/_quarto.yml'): assert (tmp_path/o).read_bytes()==(ROOT/o).read_bytes(), o

def test_version_in_one_place():
    assert re.search(r'__version__ = "(.+)"', text('medsam_nb/__init__.py'))[1]==pins.settings()['version']
    assert f"## {pins.settings()['version']}" in text('CHANGELOG.md')

# ---- what a notebook may hold

def test_every_chapter_opens_with_title_and_line():
    bad = [o for o in notebooks() if not re.match(r'# \S.*\n+> \S', source(cells(o, 'markdown')[0]))]
    assert bad==[]

def test_tutorials_say_what_they_need_and_where_to_go_next():
    "Time, memory and data before the first code; the way on at the end, and on pages of how-to and explanation too"
    for o in notebooks():
        if not o.startswith('nbs/tutorials/'): continue
        text = json.loads((ROOT/o).read_text(encoding='utf-8'))['cells']
        start = '\n'.join(source(c) for c in text[:next(i for i, c in enumerate(text) if c['cell_type']=='code')])
        need = re.search(r'\*\*What you need:\*\*(.*)', start)
        assert need and all(w in need[1] for w in ('minutes', 'GB of memory')) and re.search('data|FLARE22Train',
            need[1]), o
    bad = [o for o in notebooks() if re.match('nbs/(tutorials|howto|explain)/', o)
           and '**Where next:**' not in source(cells(o, 'markdown')[-1])]
    assert bad==[]

def test_no_stored_error():
    bad = [o for o in notebooks() for c in cells(o) for out in c.get('outputs', []) if out['output_type']=='error'
           or out.get('name')=='stderr']
    assert bad==[], 'a stored error, or warnings on stderr'

DRAWS = re.compile(r'(show(_\w+)?|plot(_\w+)?|imshow|savefig)$')
def draws(c):
    "Does a statement of the cell's own (not of a function in it) draw a figure?"
    code = re.sub(r'^[%!].*$', '', source(c), flags=re.M)
    for stmt in ast.parse(code).body:
        v = getattr(stmt, 'value', None)
        if isinstance(stmt, (ast.Expr, ast.Assign)) and isinstance(v, ast.Call):
            name = getattr(v.func, 'attr', getattr(v.func, 'id', ''))
            # app is the drawing cell: it turns to a slice
            if DRAWS.match(name) and getattr(getattr(v.func, 'value', None), 'id', '')!='app':
                return True
    return False

def pictures(c):
    return [o for o in c.get('outputs', []) if any(k.startswith('image/') for k in o.get('data', {}))]

def test_figures_are_stored():
    bad = [(o, source(c)[:60]) for o in notebooks() for c in cells(o) if not exports(c) and 'hide' not in flags(c)
           and draws(c) and not pictures(c)]
    assert bad==[], 'a cell that draws has no picture stored: make notebooks'

def test_values_are_stored():
    "A cell that ends in a value, or that prints, shows it"
    def says(c):
        body = ast.parse(re.sub(r'^[%!].*$', '', source(c), flags=re.M)).body
        if any(isinstance(o, ast.Expr) and isinstance(o.value, ast.Call) and getattr(o.value.func, 'id', '')=='print'
               for o in body):
            return True
        v = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
        if getattr(v, 'id', '')=='app': return False   # the drawing cell, whose still picture stands below
        return isinstance(v, (ast.Name, ast.JoinedStr, ast.Tuple, ast.Dict, ast.Subscript)) or isinstance(v,
            ast.Call) and getattr(getattr(v.func, 'value', None), 'id', '')=='pd'
    bad = [(o, source(c)[:60]) for o in notebooks() for c in cells(o) if not exports(c)
           and not flags(c) & {'hide', 'eval', 'cuda', 'slow', 'output'} and not source(c).rstrip().endswith(';')
           and says(c) and not c.get('outputs')]
    assert bad==[], 'a cell whose output is not stored: make notebooks'

def test_figures_have_alt_text():
    bad = [(o, source(c)[:60]) for o in notebooks() for c in cells(o) if pictures(c)
           and not flags(c) & {'fig-alt', 'hide'}]
    assert bad==[], 'a figure without #| fig-alt'

def test_only_chapters_export():
    bad = [o for o in notebooks() for c in cells(o) if exports(c) and not re.match(r'nbs/\d\d_\w+\.ipynb', o)]
    assert bad==[]

def test_imports_have_cells_of_their_own():
    "The documentation build runs every cell with an import in it, without the cells that do not export"
    def mixed(c):
        stmts = ast.parse(re.sub(r'^[%!].*$', '', source(c), flags=re.M)).body
        has = any(isinstance(n, (ast.Import, ast.ImportFrom)) for o in stmts for n in ast.walk(o))
        return has and not all(isinstance(o, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
                               for o in stmts)
    bad = [(o, source(c)[:60]) for o in notebooks() for c in cells(o) if not exports(c) and 'eval' not in flags(c)
           and mixed(c)]
    assert bad==[]

def test_links_lead_somewhere():
    """Links in notebooks and Markdown files are to files that are there (notebooks link to notebooks, so that they
    work in Jupyter too)"""
    bad = []
    for o in tracked():
        if o.endswith('.ipynb'): body = '\n'.join(source(c) for c in cells(o, 'markdown'))
        elif o.endswith('.md'): body = text(o)
        else: continue
        body = re.sub(r'```.*?```|`[^`\n]*`', '', body, flags=re.S)
        for url in re.findall(r'\]\(([^)\s]+)\)', body):
            if not re.match(r'[a-z][a-z0-9+.-]*:|#',
                            url) and not (ROOT/o).parent.joinpath(url.partition('#')[0]).exists():
                bad.append((o, url))
    assert bad==[]

def test_addresses_live_in_core():
    "A cell that runs by itself asks no other host; addresses of downloads stand in the chapter core"
    url = re.compile(r'(?:https?|ftp|s3)://(?!127\.0\.0\.1|localhost)')
    bad = [(o, source(c)[:60]) for o in notebooks() if o!='nbs/00_core.ipynb' for c in cells(o)
           if url.search(source(c)) and not flags(c) & {'eval', 'slow', 'cuda'}]
    assert bad==[]

# ---- translations: nbs/ko/

def translations(): return [o for o in notebooks() if re.match('nbs/[a-z]{2}/', o)]
def original(name): return where(runner.original(ROOT/name))
def translated(f):
    return pytest.mark.parametrize('name', translations() if (ROOT/'.git').exists() else [],
                                   ids=lambda o: o.removeprefix('nbs/'))(f)
def prose(name): return '\n\n'.join(source(c) for c in cells(name, 'markdown'))
def blocks(name): return [o.rstrip() for o in re.findall(r'(?:(?:^ {4}.*\n?)+\n*)+', prose(name), re.M)]
def said(name):
    return {o for o in re.findall(r'`([^`\n]+)`', re.sub(r'^ {4}.*$', '', prose(name), flags=re.M))}
def pages(name):
    "What a notebook links to; a translation counts as its original"
    to = {os.path.normpath(os.path.join(os.path.dirname(name), o)) if not re.match(r'[a-z]+:', o) else o
          for o in re.findall(r'\]\(([^)\s]+)\)', prose(name))}
    return {original(o) if o in translations() else o for o in to}

def test_there_are_translations():
    assert {'nbs/ko/index.ipynb', 'nbs/ko/flare22_gallbladder.ipynb'}<=set(translations())

@translated
def test_a_translation_has_the_code_and_the_outputs_of_its_original(name):
    mine, theirs = cells(name), cells(original(name))
    def code_of(cs): return [runner.ALT.sub('', source(c)) for c in cs]
    assert code_of(mine)==code_of(theirs), 'only prose and #| fig-alt lines are translated'
    assert [c['outputs'] for c in mine]==[c['outputs'] for c in theirs], f'tools/notebooks.py {name} takes them over'
    assert [flags(c) for c in mine]==[flags(c) for c in theirs]

@translated
def test_a_translation_says_the_same_commands_names_and_links(name):
    orig = original(name)
    assert blocks(name)==blocks(orig), 'an indented block of code'
    assert said(name) ^ said(orig)==set(), 'something in backticks'
    assert pages(name) ^ pages(orig)==set(), 'a link'
    assert [len(re.findall('^##', source(c), re.M)) for c in cells(name,
                                                                   'markdown')]==[len(re.findall('^##', source(c),
                                                                       re.M)) for c in cells(orig,
                                                                           'markdown')], 'a heading'

def test_only_translations_with_code_are_skipped_and_that_is_said():
    assert [o for o in notebooks() if runner.skips(ROOT/o)]==[o for o in translations() if cells(o)]
    name = 'nbs/ko/flare22_gallbladder.ipynb'
    r = subprocess.run([sys.executable, 'tools/nbtest.py', name], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode==0 and f'{name}: not run' in r.stdout and original(name) in r.stdout, r.stdout + r.stderr
    with pytest.raises(ValueError, match='translation of no notebook'):
        runner.original(ROOT/'nbs'/'00_core.ipynb')

def test_a_translation_takes_outputs_of_the_same_code_only(tmp_path):
    name = 'nbs/ko/flare22_gallbladder.ipynb'
    nb = json.loads(text(name))
    for c in nb['cells']:
        if c['cell_type']=='code': c['outputs'] = []
    (made := tmp_path/'ko.ipynb').write_text(json.dumps(nb), encoding='utf-8')
    runner.borrow(made, ROOT/original(name))
    assert json.loads(made.read_text(encoding='utf-8'))==json.loads(text(name))
    last = next(c for c in reversed(nb['cells']) if c['cell_type']=='code')
    last['source'] = ['1 + 1']
    made.write_text(json.dumps(nb), encoding='utf-8')
    with pytest.raises(ValueError, match='differs'): runner.borrow(made, ROOT/original(name))

# ---- nothing that works on one machine only

PATHS = re.compile(r'(?<![\w.:/~*<>-])/(?:' + '|'.join(('root', 'home', 'Users', 'work', 'mnt', 'private', 'builds',
                                                        'var/folders')) + r')/[\w.~-]')
TEMPS = re.compile(r'(?<![\w.:/~*<>-])/(?:tmp|var/tmp)/[\w.~-]')  # in a notebook: a path that changes with each run
HOSTS = re.compile('|'.join(('pypi' + r'\.org', 'files' + r'\.pythonhosted', 'registry' + r'\.npmjs',
                             'deb' + r'\.debian')))

def test_no_machine_paths_and_no_registry_hosts():
    bad = [(o, m[0]) for o in tracked() for m in [PATHS.search(text(o)) or HOSTS.search(text(o))
                                                  or (o.endswith('.ipynb') and TEMPS.search(text(o)))] if m]
    assert bad==[]

def test_sizes():
    assert [o for o in tracked() if (ROOT/o).stat().st_size>MB]==[]

def test_data_is_not_in_git():
    assert [o for o in tracked() if re.match(r'(data|work_dir)/(?!README\.md)', o)]==[]

# ---- the library

def imported(path)->set:
    "The modules of this package that a module imports, at its top or inside a function"
    out = set()
    for n in ast.walk(tree(path)):
        if isinstance(n, ast.ImportFrom):
            if n.level: out |= {n.module.split('.')[0]} if n.module else {a.name for a in n.names}
            elif n.module=='medsam_nb': out |= {a.name for a in n.names}
            elif (n.module or '').startswith('medsam_nb.'): out.add(n.module.split('.')[1])
        elif isinstance(n, ast.Import):
            out |= {a.name.split('.')[1] for a in n.names if a.name.startswith('medsam_nb.')}
    return out & set(ORDER)

def test_modules_are_chapters():
    assert {o.stem for o in modules()}<=set(ORDER)

@pytest.mark.parametrize('path', modules(), ids=lambda o: o.stem)
def test_imports_go_upwards(path):
    assert {o for o in imported(path) if ORDER.index(o)>=ORDER.index(path.stem)}==set()

@pytest.mark.parametrize('name', ['predict', 'draw', 'segment'])
def test_prediction_never_needs_training(name):
    if not (LIB/f'{name}.py').exists(): pytest.skip(f'medsam_nb/{name}.py is not written yet')
    seen, todo = set(), {name}
    while todo:
        o = todo.pop()
        seen.add(o)
        todo |= imported(LIB/f'{o}.py') - seen
    assert 'finetune' not in seen

RUNS_CODE = re.compile(r'(eval|exec|os\.system|pd\.read_pickle|'
                       r'(pickle|dill|marshal|shelve|joblib)\.(loads?|open|Unpickler))$')

def calls(path): return [n for n in ast.walk(tree(path)) if isinstance(n, ast.Call)]
def keyword(call, name):
    return next((k.value.value for k in call.keywords if k.arg==name and isinstance(k.value, ast.Constant)), None)

@pytest.mark.parametrize('path', modules(), ids=lambda o: o.stem)
def test_files_are_read_without_running_them(path):
    bad = []
    for n in calls(path):
        f = ast.unparse(n.func)
        if f=='torch.load' and keyword(n, 'weights_only') is not True: bad.append(ast.unparse(n))
        if f in ('np.load', 'numpy.load') and keyword(n, 'allow_pickle') is not False:
            bad.append(ast.unparse(n))
        if RUNS_CODE.match(f): bad.append(ast.unparse(n))
    assert bad==[]

@pytest.mark.parametrize('path', modules(), ids=lambda o: o.stem)
def test_no_device_is_taken_for_granted(path):
    "Only core.pick_device names a device; elsewhere one may ask what a device is, but not choose it"
    bad = [ast.unparse(n) for n in calls(path) if isinstance(n.func, ast.Attribute) and n.func.attr=='cuda']
    if path.stem!='core':
        for n in calls(path):
            values = [*n.args, *(k.value for k in n.keywords if k.arg!='device_type')]
            bad += [ast.unparse(n) for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)
                    and re.match(r'(cuda|mps)(:\d+)?$', v.value)]
    assert bad==[]

@pytest.mark.parametrize('path', modules(), ids=lambda o: o.stem)
def test_no_work_at_import(path):
    "A module defines things; it reads no file, asks no question and prints nothing while it is imported"
    bad = []
    for stmt in tree(path).body:
        if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
        bad += [ast.unparse(n) for n in ast.walk(stmt) if isinstance(n, ast.Call)
                and re.match(r'(open|print|input|torch\.load|np\.load|Path\.cwd|home|os\.getcwd)$',
                             ast.unparse(n.func))]
    assert bad==[]

# ---- dependencies

def pinned():
    return [re.match(r'[\w.-]+', o)[0] for o in text('constraints.txt').splitlines() if o and not o.startswith('#')]

def test_constraints_pin_exactly_the_direct_dependencies():
    assert sorted(pinned())==sorted(pins.norm(o) for o in pins.direct()), 'make pins'
    assert all(re.match(r'[\w.-]+==[\w.]+( ; python_version >= "[\d.]+")?$', o)
               for o in text('constraints.txt').splitlines() if not o.startswith('#'))

def test_constraints_allow_what_settings_ask():
    from packaging.requirements import Requirement
    cfg = pins.settings()
    version = dict(re.match(r'([\w.-]+)==([\w.]+)', o).groups() for o in text('constraints.txt').splitlines()
                   if not o.startswith('#'))
    for o in (cfg['requirements'] + ' ' + cfg['dev_requirements']).split():
        r = Requirement(o)
        assert version[pins.norm(r.name)] in r.specifier, o

@pytest.mark.parametrize('path', modules(), ids=lambda o: o.stem)
def test_imports_are_declared(path):
    "What the library imports is a runtime requirement by its own name, not by luck of another package"
    have = {pins.norm(re.match(r'[\w.-]+', o)[0]) for o in pins.settings()['requirements'].split()}
    top = set()
    for n in ast.walk(tree(path)):
        if isinstance(n, ast.Import): top |= {a.name.split('.')[0] for a in n.names}
        elif isinstance(n, ast.ImportFrom) and not n.level: top.add(n.module.split('.')[0])
    top -= set(sys.stdlib_module_names) | {'medsam_nb'}
    dists = packages_distributions()
    assert {o for o in top if not {pins.norm(d) for d in dists.get(o, [])} & have}==set()

# ---- commands that people are told to type

def test_make_targets_in_readme_exist():
    made = set(re.findall(r'^([a-z]+):', text('Makefile'), re.M))
    told = {m for o in ('README.md', 'CONTRIBUTING.md', 'data/README.md', 'CHANGELOG.md')
            for m in re.findall(r'`make ([a-z]+)', text(o))}
    assert {'demo', 'test'}<=told<=made

def test_console_scripts_point_at_functions():
    for o in pins.settings()['console_scripts'].split():
        name, mod, fn = re.match(r'(\w+)=([\w.]+):(\w+)$', o).groups()
        path = ROOT/(mod.replace('.', '/') + '.py')
        assert path.is_file(), f'{name}: no {where(path)}'
        names = {n.name for n in tree(path).body if isinstance(n, ast.FunctionDef)}
        assert fn in names, f'{name}: no {fn} in {where(path)}'
