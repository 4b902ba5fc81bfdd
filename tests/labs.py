"A real Jupyter server with a real Chromium in front of it, for the tests of the drawing cell"
import json, os, secrets, shutil, signal, socket, subprocess, sys, time, urllib.error, urllib.request
from contextlib import contextmanager
from pathlib import Path
import nbformat, pytest

FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']
# Notebook 7.6 says these of itself, in any notebook
OWN = ("Cannot read properties of undefined (reading 'schema')", "Command 'filebrowser:open-path' not registered.")

def chromium():
    "Playwright's Chromium, from the system's executable"
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not exe: pytest.skip('no Chromium on this machine: apt-get install chromium')
    return exe

def _port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def settings(own:Path)->dict:
    "Environment for a Jupyter that keeps everything of its own below `own` and announces nothing"
    (own/'config'/'labconfig').mkdir(parents=True)
    off = dict(disabledExtensions={'@jupyterlab/apputils-extension:announcements': True})
    (own/'config'/'labconfig'/'page_config.json').write_text(json.dumps(off))
    dirs = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime',
                JUPYTERLAB_SETTINGS_DIR='lab', JUPYTERLAB_WORKSPACES_DIR='workspaces', IPYTHONDIR='ipython')
    return {k: str(own/v) for k, v in dirs.items()}

class Server:
    "JupyterLab and Notebook 7 (one server has both) on a folder, with settings of its own"
    def __init__(self, root:Path):
        self.root, self.port, self.token, own = root, _port(), secrets.token_hex(16), root/'.settings'
        env = dict(os.environ, PYTHONWARNINGS='ignore', MEDSAM_NB_HOME=str(root), OMP_NUM_THREADS='2', **settings(own))
        cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1',
               f'--ServerApp.port={self.port}', '--ServerApp.port_retries=0',
               f'--IdentityProvider.token={self.token}', '--LabApp.expose_app_in_browser=True',
               '--JupyterNotebookApp.expose_app_in_browser=True', '--LabApp.extension_manager=readonly',
               f'--ServerApp.root_dir={root}']
        self.log = open(root/'.server.log', 'wb')
        self.process = subprocess.Popen(cmd, env=env, cwd=root, stdout=self.log, stderr=self.log,
                                        start_new_session=True)
        for _ in range(240):
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{self.port}/api/status?token={self.token}', timeout=2)
                return
            except (urllib.error.URLError, OSError): time.sleep(.25)
            if self.process.poll() is not None: break
        self.stop()
        raise RuntimeError('Jupyter did not start:\n'+(root/'.server.log').read_text()[-3000:])
    def stop(self):
        if self.process.poll() is None: os.killpg(self.process.pid, signal.SIGTERM)
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()
    def notebook(self, name, *cells):
        "A new notebook with these cells; returns its name"
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        nb.metadata['kernelspec'] = dict(name='python3', display_name='Python 3', language='python')
        nbformat.write(nb, self.root/f'{name}.ipynb')
        return f'{name}.ipynb'

class Notebook:
    "One notebook open in a browser page"
    def __init__(self, page, server, name, app='lab'):
        self.page, self.server, self.complaints = page, server, []
        page.on('pageerror', lambda o: str(o) in OWN or self.complaints.append(str(o)))
        where, reset = ('lab/tree', '&reset') if app=='lab' else ('notebooks', '')
        self.url = f'http://127.0.0.1:{server.port}/{where}/{name}?token={server.token}{reset}'
        self.app = app
        self.open()
    def open(self):
        self.page.goto(self.url, wait_until='domcontentloaded')
        self.page.wait_for_function('() => !!window.jupyterapp', timeout=90_000)
        self.js('''async () => {
            const a = window.jupyterapp; await a.restored
            const until = async f => { for (let i=0; i<600 && !f(); i++) await new Promise(r => setTimeout(r, 100)) }
            await until(() => a.shell.currentWidget && a.shell.currentWidget.context)
            const w = a.shell.currentWidget; await w.context.ready; await w.sessionContext.ready
            await until(() => w.sessionContext.session && w.sessionContext.session.kernel)
            await w.sessionContext.session.kernel.info }''')
    def js(self, code, arg=None): return self.page.evaluate(code, arg)
    def run(self):
        "Run all cells and wait for the first drawing"
        self.js("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        self.page.wait_for_selector('.medsam-draw canvas', timeout=90_000)
        self.page.wait_for_function("() => document.querySelector('.medsam-draw').medsam?.view?.image", timeout=60_000)
    def python(self, code):
        "Run code in the notebook's kernel and return the value of its last line, through JSON"
        out = self.js('''async code => {
            const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
            const f = k.requestExecute({code:'', user_expressions:{}, silent:false, store_history:false})
            const g = k.requestExecute({code, silent:false, store_history:false})
            let text = '', error = ''
            g.onIOPub = m => {
                if (m.header.msg_type === 'stream') text += m.content.text
                if (m.header.msg_type === 'error') error += m.content.ename+': '+m.content.evalue
            }
            await g.done; await f.done
            return [text, error] }''', code)
        assert not out[1], out[1]
        return out[0]
    def ask(self, expression): return json.loads(self.python(f'import json; print(json.dumps({expression}))'))
    def close(self):
        "Close the page and end its kernel, which would go on encoding slices behind the tests that follow"
        try: self.js('async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown() }')
        finally: self.page.context.close()
    def save(self): self.js("async () => { await window.jupyterapp.commands.execute('docmanager:save') }")
