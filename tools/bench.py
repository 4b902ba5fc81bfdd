"""Measure this machine: the drawing cell in a real JupyterLab, the encoder, the decoder, training. Ratios are side by
side, in one run; times are this machine's"""
import argparse, json, os, platform, statistics, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests'))
CELLS = ('from medsam_nb.draw import annotate\nfrom medsam_nb.phantom import make_phantom',
         'app = annotate(*make_phantom(2023, (40,512,512)))\napp')

def timed(f, n, warm=2):
    "Median seconds of `n` calls"
    for _ in range(warm): f()
    out = []
    for _ in range(n):
        t = time.perf_counter()
        f()
        out.append(time.perf_counter()-t)
    return statistics.median(out)

def drawing(n):
    "Pointer-up to painted mask, and slice change to painted image, in ms; over `n` gestures each, embeddings at hand"
    from playwright.sync_api import sync_playwright
    from labs import FLAGS, Notebook, Server, chromium
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        server = Server(Path(tmp))
        try:
            b = p.chromium.launch(executable_path=chromium(), args=FLAGS)
            page = b.new_context(viewport=dict(width=1280, height=1000)).new_page()
            nb = Notebook(page, server, server.notebook('bench', *CELLS))
            nb.run()
            nb.python('z = app.canvas.z\nfor k in range(z-3, z+4): app.session.embedder("pretrained").get(k)')
            z = nb.ask('app.canvas.z')
            page.wait_for_function("() => !document.querySelector('.medsam-draw').medsam.model"
                                   ".get('status').startsWith('preparing')")
            at = lambda x, y: page.evaluate("([x,y]) => { const d = document.querySelector('.medsam-draw').medsam, r "
                                            '= d.view.canvas.getBoundingClientRect(), [ox,oy] = d.view.origin; return '
                                            '[r.left+ox+x*d.view.scale, r.top+oy+y*d.view.scale*d.view.aspect] }',
                                            [x,y])
            count = lambda name: page.evaluate('n => performance.getEntriesByName(n).length', name)
            def settled(name, k):
                page.wait_for_function('([n, k]) => performance.getEntriesByName(n).length >= k', arg=[name, k],
                                       timeout=30_000)
                page.wait_for_timeout(150)
            for k in range(n+3):
                x, y, w, h = 120+37*k%150, 120+53*k%150, 60+11*k%60, 60+7*k%60
                page.keyboard.press('Escape')
                page.wait_for_timeout(120)
                have = count('medsam:answer')
                page.mouse.move(*at(x, y))
                page.mouse.down()
                for s in range(1, 9):
                    page.mouse.move(*at(x+w*s/8, y+h*s/8))
                    page.wait_for_timeout(16)
                page.mouse.up()
                settled('medsam:answer', have+1)
            answers = page.evaluate("performance.getEntriesByName('medsam:answer').filter(m => m.detail.prompt).map(m "
                                    '=> [m.duration, m.detail.model_ms, m.detail.paint_ms])')[3:]
            page.keyboard.press('Escape')
            for k in range(n):
                have = count('medsam:slice')
                page.keyboard.press('PageDown' if k//3%2==0 else 'PageUp')
                settled('medsam:slice', have+1)
            slices = page.evaluate("performance.getEntriesByName('medsam:slice').map(m => m.duration)")
            b.close()
        finally: server.stop()
    return answers, slices

def models(n):
    "Seconds of the parts, on the CPU, with the threads that torch takes"
    import numpy as np, torch
    from medsam_nb.embed import encode
    from medsam_nb.finetune import DiceBCE, PromptedDecoder
    from medsam_nb.sam import decode, load_model
    sam, x = load_model('lite', device='cpu'), np.random.default_rng(0).integers(0, 255, (1,256,256,3), dtype=np.uint8)
    emb, box, mask = encode(sam, x), torch.tensor([[60.,60.,150.,140.]]), torch.zeros(1,1,256,256)
    mask[...,60:140,60:150] = 1
    net, loss = PromptedDecoder(sam), DiceBCE()
    opt = torch.optim.Adam(net.mask_decoder.parameters(), lr=1e-5)
    def step():
        sum(loss(net(emb.clone(), box), mask)).backward()
        opt.step()
        opt.zero_grad()
    @torch.inference_mode()
    def ask(): decode(sam, emb, box)
    return dict(encode_fp32=timed(lambda: encode(sam, x), n),
                encode_bf16=timed(lambda: encode(sam, x, precision='bf16'), n), decode=timed(ask, 4*n),
                train=timed(step, n))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--n', type=int, default=30, help='gestures; the parts are timed a third as often')
    a = p.parse_args()
    os.chdir(ROOT)
    m = models(max(5, a.n//3))
    answers, slices = drawing(a.n)
    total, model, paint = (statistics.median(v) for v in zip(*[a for a in answers if a[1]>1] or answers))
    total = statistics.median(a[0] for a in answers)
    p95 = sorted(t for t, *_ in answers)[int(.95*len(answers))-1]
    rows = [('pointer-up to painted mask, median', f'{total:.0f} ms',
             f'{total/(1000*m["decode"]):.2f} x one decoder call; model and scores {model:.0f} ms, painting '
             f'{paint:.0f} ms of it'),
            ('pointer-up to painted mask, 95 %', f'{p95:.0f} ms', f'over {len(answers)} gestures'),
            ('slice change to painted image, median', f'{statistics.median(slices):.0f} ms',
             f'over {len(slices)} changes, 512 x 512 int16'),
            ('lite: decode one box', f'{1000*m["decode"]:.0f} ms', '1'),
            ('lite: encode a slice, fp32', f'{m["encode_fp32"]:.2f} s', f'{m["encode_fp32"]/m["decode"]:.1f} x decode'),
            ('lite: encode a slice, bf16', f'{m["encode_bf16"]:.2f} s',
             f'{m["encode_bf16"]/m["encode_fp32"]:.2f} x fp32'),
            ('lite: train on one sample', f'{m["train"]:.2f} s',
             f'{m["train"]/m["decode"]:.1f} x decode, {1/m["train"]:.1f} samples a second')]
    print(f'{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}')
    for r in rows: print(f'{r[0]:<40}{r[1]:>9}  {r[2]}')
    out = ROOT/'work_dir'/'bench.json'
    out.write_text(json.dumps(dict(answers_ms=answers, slices_ms=slices, seconds=m), indent=1), encoding='utf-8')
    print(f'written to {out.relative_to(ROOT)}')

if __name__=='__main__': main()
