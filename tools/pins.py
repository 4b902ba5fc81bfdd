"Write constraints.txt: the installed version of every package that settings.ini names, and no other"
import argparse, re
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
HEAD = '''# The versions this package was last tested with, for the packages that settings.ini names; `make env` installs these.
# Written by `python tools/pins.py`. A pin with a marker is of a release that no longer supports the oldest Python in settings.ini.
'''

def norm(name:str)->str: return re.sub(r'[-_.]+', '-', name).lower()

def settings(root=ROOT):
    "settings.ini's one section"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def direct(root=ROOT)->list:
    "Names of the direct dependencies, runtime and dev, in the order of settings.ini"
    return [re.match(r'[\w.-]+', o)[0] for k in ('requirements', 'dev_requirements') for o in settings(root)[k].split()]

def pin(name:str, oldest:str)->str:
    "One line of constraints.txt"
    d = distribution(name)
    needs = d.metadata.get('Requires-Python') or ''
    if SpecifierSet(needs).contains(oldest): return f'{norm(name)}=={d.version}'
    least = re.search(r'>=\s*([\d.]+)', needs)[1]
    return f'{norm(name)}=={d.version} ; python_version >= "{least}"'

def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    out = HEAD + '\n'.join(sorted(pin(o, settings()['min_python']) for o in direct())) + '\n'
    (ROOT/'constraints.txt').write_text(out, encoding='utf-8')
    print(f'constraints.txt: {len(direct())} pins')

if __name__=='__main__': main()
