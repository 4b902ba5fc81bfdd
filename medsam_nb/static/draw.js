// The canvas of medsam_nb.draw (chapter 14): shows a slice, takes prompts, paints masks. Everything else is Python.
//
// Coordinates on the wire are image pixels, continuous: pixel (0,0) covers 0..1, so a box round it is [0,0,1,1].
// To the browser: `image` {z,width,height,dtype,pixels,spacing,unit,truth}, `answer` {seq,z,panes,prompts}, and plain settings.
// From the browser: `gestures` [{seq,case,z,object,prompt,done} or {seq,case,step:'undo'|'redo',done}], `z`, `window`.
// A prompt is {kind:'box', box:[x0,y0,x1,y1]}, {kind:'line', line:[x0,y0,x1,y1]}, {kind:'points', points:[[x,y],…], labels:[1,0,…]} or null.
// `model` needs get, set, save_changes, on and off, no more: a static page can bring its own.

const HANDLE = 9, TOUCH = 18                        // CSS pixels within which a handle is hit
const clamp = (v, lo, hi) => Math.min(Math.max(v, lo), hi)
const round = v => Math.round(v*100)/100
const mm = v => v < 10 ? v.toFixed(1) : v.toFixed(0)

// ---- bytes to pictures ----
const ARRAYS = {uint8:Uint8Array, int16:Int16Array, uint16:Uint16Array, int32:Int32Array, float32:Float32Array, rgb:Uint8Array}

function values(image) {
  const b = image.pixels, view = b instanceof DataView ? b : new DataView(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength)
  return new ARRAYS[image.dtype](view.buffer.slice(view.byteOffset, view.byteOffset+view.byteLength))
}

function bytes(b) { return b instanceof DataView ? new Uint8Array(b.buffer, b.byteOffset, b.byteLength) : new Uint8Array(b.buffer ?? b, b.byteOffset ?? 0, b.byteLength) }

function offscreen(width, height) { const c = document.createElement('canvas'); c.width = width; c.height = height; return c }

function paintImage(canvas, image, data, [lo, hi]) {
  const ctx = canvas.getContext('2d'), out = ctx.createImageData(image.width, image.height), p = new Uint32Array(out.data.buffer), k = 255/Math.max(hi-lo, 1e-9)
  if (image.dtype === 'rgb') for (let i=0, j=0; i<p.length; i++, j+=3) p[i] = 0xff000000|data[j+2]<<16|data[j+1]<<8|data[j]
  else for (let i=0; i<p.length; i++) { const v = clamp((data[i]-lo)*k, 0, 255)|0; p[i] = 0xff000000|v<<16|v<<8|v }
  ctx.putImageData(out, 0, 0)
}

const bit = (bits, i) => bits[i>>3]>>(7-(i&7))&1    // as numpy.packbits writes them

function paintMask(width, height, bits, colour) {
  const c = offscreen(width, height), ctx = c.getContext('2d'), out = ctx.createImageData(width, height), p = new Uint32Array(out.data.buffer)
  const n = parseInt(colour.slice(1), 16), rgba = 0xff000000|(n&255)<<16|(n>>8&255)<<8|n>>16
  let x0 = width, y0 = height, x1 = 0, y1 = 0
  for (let y=0, i=0; y<height; y++) for (let x=0; x<width; x++, i++) if (bit(bits, i)) { p[i] = rgba; x0 = Math.min(x0, x); x1 = Math.max(x1, x+1); y0 = Math.min(y0, y); y1 = y+1 }
  ctx.putImageData(out, 0, 0)
  const x = Math.max(0, x0-2), y = Math.max(0, y0-2)   // where anything is, and a rim for smoothing
  return {picture:c, part:[x, y, Math.max(0, Math.min(width, x1+2)-x), Math.max(0, Math.min(height, y1+2)-y)]}
}

function outline(width, height, bits) {             // the pixel edges between inside and outside
  const path = new Path2D(), at = (x, y) => x>=0 && y>=0 && x<width && y<height ? bit(bits, y*width+x) : 0
  for (let y=0; y<=height; y++) for (let x=0; x<=width; x++) {
    const here = at(x, y)
    if (here !== at(x, y-1)) { path.moveTo(x, y); path.lineTo(x+1, y) }
    if (here !== at(x-1, y)) { path.moveTo(x, y); path.lineTo(x, y+1) }
  }
  return path
}

// ---- prompts ----
const HANDLES = [['x0','y0'], ['x1','y0'], ['x1','y1'], ['x0','y1'], [null,'y0'], ['x1',null], [null,'y1'], ['x0',null]]
const CURSORS = ['nwse-resize', 'nesw-resize', 'nwse-resize', 'nesw-resize', 'ns-resize', 'ew-resize', 'ns-resize', 'ew-resize']
const IX = {x0:0, y0:1, x1:2, y1:3}

function handlePoints([x0, y0, x1, y1]) { return HANDLES.map(([h, v]) => [h ? {x0, x1}[h] : (x0+x1)/2, v ? {y0, y1}[v] : (y0+y1)/2]) }

const sorted = ([a, b, c, d]) => [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)]

function inside(box, w, h) { return [clamp(box[0], 0, w), clamp(box[1], 0, h), clamp(box[2], 0, w), clamp(box[3], 0, h)].map(round) }

function shifted([x0, y0, x1, y1], dx, dy, w, h) {
  dx = clamp(dx, -x0, w-x1); dy = clamp(dy, -y0, h-y1)
  return [x0+dx, y0+dy, x1+dx, y1+dy].map(round)
}

function nudged(q, dx, dy, end, w, h) {             // moved by keys; with `end` only the last corner, end or point
  if (q.kind === 'points') {
    const [x, y] = q.points.at(-1), now = [clamp(x+dx, 0, w), clamp(y+dy, 0, h)].map(round)
    return {kind:'points', points:[...q.points.slice(0, -1), now], labels:q.labels}
  }
  const [a, b, c, d] = q[q.kind]
  if (q.kind === 'box') return {kind:'box', box:end ? [a, b, clamp(c+dx, a+2, w), clamp(d+dy, b+2, h)].map(round) : shifted(q.box, dx, dy, w, h)}
  const far = [clamp(c+dx, 0, w), clamp(d+dy, 0, h)], near = end ? [a, b] : [clamp(a+dx, 0, w), clamp(b+dy, 0, h)]
  return Math.hypot(far[0]-near[0], far[1]-near[1]) < 2 ? q : {kind:'line', line:[...near, ...far].map(round)}
}

// ---- the widget ----
class Drawing {
  constructor(model, el) {
    this.model = model; this.base = null; this.data = null; this.masks = []; this.truth = []
    this.prompts = {}; this.seq = 0; this.queue = []; this.started = new Map(); this.zoom = 1; this.pan = [0, 0]; this.pointers = new Map(); this.drag = null; this.ruler = null
    el.classList.add('medsam-draw')
    this.root = document.createElement('div'); this.root.className = 'medsam-frame'; el.append(this.root)
    this.canvas = document.createElement('canvas')
    Object.assign(this.canvas, {tabIndex:0})
    this.canvas.setAttribute('role', 'application'); this.canvas.setAttribute('data-lm-suppress-shortcuts', 'true')
    this.canvas.setAttribute('aria-label', 'Slice viewer. Enter makes a box, a diameter or a point, arrows move it, Alt and arrows resize it, Shift takes bigger steps, Escape removes it, Page up and Page down change the slice.')
    this.busy = document.createElement('progress'); this.busy.className = 'medsam-busy'; this.busy.setAttribute('aria-label', 'preparing this slice')
    this.caption = document.createElement('div'); this.caption.className = 'medsam-caption'; this.caption.setAttribute('aria-hidden', 'true')
    this.spoken = document.createElement('div'); this.spoken.className = 'medsam-spoken'; this.spoken.setAttribute('role', 'status'); this.spoken.setAttribute('aria-live', 'polite')
    this.root.append(this.canvas, this.busy, this.caption, this.spoken)
    this.listen()
    this.onImage(); this.onAnswer()
  }

  listen() {
    const c = this.canvas, on = (t, f, o) => c.addEventListener(t, f, o)
    on('pointerdown', e => this.down(e)); on('pointermove', e => this.move(e))
    on('pointerup', e => this.up(e)); on('pointercancel', e => this.cancel(e)); on('lostpointercapture', e => this.pointers.delete(e.pointerId))
    on('wheel', e => this.wheel(e), {passive:false}); on('keydown', e => this.key(e)); on('contextmenu', e => e.preventDefault())
    on('keyup', e => { if (e.key === ' ') this.space = false }); on('blur', () => { this.space = false })
    this.quiet = e => { if (e.target.matches?.('.medsam-app .noUi-handle')) e.target.setAttribute('data-lm-suppress-shortcuts', 'true') }
    document.addEventListener('focusin', this.quiet)    // or Notebook 7 takes the arrow keys of a slider for its own
    this.resize = new ResizeObserver(() => this.dirty()); this.resize.observe(this.root)
    this.handlers = {'change:image':() => this.onImage(), 'change:answer':() => this.onAnswer(), 'change:objects':() => this.onAnswer(), 'change:window':() => this.onWindow()}
    this.handlers['comm_live_update'] = () => { this.lost = true; this.dirty() }   // the kernel has gone
    for (const t of ['opacity', 'active', 'tool', 'contour', 'status', 'z', 'height']) this.handlers[`change:${t}`] = () => this.dirty()
    for (const [k, f] of Object.entries(this.handlers)) this.model.on(k, f)
  }

  close() { for (const [k, f] of Object.entries(this.handlers)) this.model.off(k, f); document.removeEventListener('focusin', this.quiet); this.resize.disconnect(); cancelAnimationFrame(this.frame) }

  // -- what Python says --
  onImage() {
    const image = this.model.get('image')
    if (!image?.width) return
    if (!this.base || this.base.width !== image.width || this.base.height !== image.height) { this.base = offscreen(image.width, image.height); this.fit() }
    if (this.image?.z !== image.z || this.image?.case !== image.case) { this.masks = []; this.prompts = {}; if (this.drawing) this.drag = null }
    this.truth = image.truth.map(t => ({id:t.id, bits:bytes(t.bits)}))
    this.image = image; this.data = values(image); this.onWindow(); this.onAnswer()
  }

  onWindow() { if (this.image) { paintImage(this.base, this.image, this.data, this.model.get('window')); this.painted = (this.painted ?? 0)+1; this.dirty() } }

  onAnswer() {
    const a = this.model.get('answer')
    if (!a?.panes || !this.image || a.z !== this.image.z) return
    const {width, height} = this.image, colour = id => this.object(id)?.colour ?? '#ff9500'
    this.masks = a.panes.map(p => p.objects.map(o => ({...o, ...paintMask(width, height, bytes(o.bits), colour(o.id))})))
    if (a.seq >= this.seq && !this.drawing) this.prompts = a.prompts   // a hand is right until its last word is answered
    if (this.answered !== a.seq) this.arrived = performance.now()
    this.answered = a.seq; this.dirty()
  }

  object(id) { return this.model.get('objects').find(o => o.id === id) }
  get drawing() { return this.drag?.kind === 'box' || this.drag?.kind === 'line' }
  get active() { return this.model.get('active') }
  get prompt() { return this.prompts[this.active] ?? null }
  get current() {                                   // does the answer that we have belong to the prompt in view?
    const a = this.model.get('answer')
    return a?.z === this.image.z && JSON.stringify(a.prompts?.[this.active] ?? null) === JSON.stringify(this.prompt)
  }

  // -- where things are --
  get panes() { return Math.max(1, this.model.get('answer')?.panes?.length ?? 1) }
  get aspect() { const [row, col] = this.image?.spacing ?? [1, 1]; return row/col }
  get size() { const w = this.root.clientWidth || 640; return [w, Math.max(120, this.model.get('height'))] }
  get scale() { const [w, h] = this.size, i = this.image; return Math.min(w/this.panes/i.width, h/(i.height*this.aspect))*this.zoom }
  get origin() {
    const [w, h] = this.size, s = this.scale, i = this.image
    return [(w/this.panes-i.width*s)/2+this.pan[0], (h-i.height*s*this.aspect)/2+this.pan[1]]
  }
  fit() { this.zoom = 1; this.pan = [0, 0]; this.dirty() }
  at(e) {                                           // event to image pixels
    const r = this.canvas.getBoundingClientRect(), pw = this.size[0]/this.panes, px = e.clientX-r.left, py = e.clientY-r.top
    const pane = this.drag ? this.drag.pane : clamp(Math.floor(px/pw), 0, this.panes-1), [ox, oy] = this.origin, s = this.scale
    return {pane, px, py, x:(px-pane*pw-ox)/s, y:(py-oy)/(s*this.aspect)}
  }

  // -- pointer --
  down(e) {
    if (!this.image) return
    this.canvas.focus({preventScroll:true}); this.canvas.setPointerCapture(e.pointerId); this.pointers.set(e.pointerId, e)
    if (this.pointers.size > 2) return
    if (this.pointers.size === 2) { this.abort(); this.drag = {kind:'pinch', ...this.pinch(), zoom:this.zoom, pan:[...this.pan]}; return }
    const p = this.at(e), tool = this.model.get('tool')
    if (e.button === 1 || e.button === 0 && this.space) this.drag = {kind:'pan', pane:p.pane, from:[e.clientX, e.clientY], pan:[...this.pan]}
    else if (e.button === 2) this.drag = {kind:'window', pane:p.pane, from:[e.clientX, e.clientY], window:[...this.model.get('window')]}
    else if (e.button === 0) {
      this.before = {prompt:this.prompt}
      if (tool === 'ruler') { this.ruler = [p.x, p.y, p.x, p.y]; this.drag = {kind:'ruler', pane:p.pane} }
      else if (tool === 'box') this.startBox(p, e)
      else if (tool === 'line') this.startLine(p, e)
      else this.addPoint(p, tool === 'foreground' ? 1 : 0)
    }
    if (this.drag) this.drag.pointer = e.pointerId
    e.preventDefault()
  }

  reach(e) { return e?.pointerType === 'touch' ? TOUCH : HANDLE }
  near([x, y], p, e) { return Math.hypot((x-p.x)*this.scale, (y-p.y)*this.scale*this.aspect) <= this.reach(e) }

  hit(p, e) {                                       // what of the active prompt lies under the pointer
    const q = this.prompt
    if (q?.kind === 'box' && this.model.get('tool') === 'box') {
      const i = handlePoints(q.box).findIndex(h => this.near(h, p, e))
      if (i >= 0) return {part:'handle', i}
      if (p.x > q.box[0] && p.x < q.box[2] && p.y > q.box[1] && p.y < q.box[3]) return {part:'body'}
    }
    if (q?.kind === 'line' && this.model.get('tool') === 'line') {
      const i = [[q.line[0], q.line[1]], [q.line[2], q.line[3]]].findIndex(h => this.near(h, p, e))
      if (i >= 0) return {part:'end', i}
    }
    return null
  }

  startBox(p, e) {
    const h = this.hit(p, e), drag = {kind:'box', pane:p.pane, from:[p.x, p.y]}
    if (h?.part === 'handle') { const [hx, hy] = HANDLES[h.i]; this.drag = {...drag, mode:'resize', hx, hy, box:[...this.prompt.box]} }
    else if (h?.part === 'body') this.drag = {...drag, mode:'move', box:[...this.prompt.box]}
    else this.drag = {...drag, mode:'new'}
  }

  startLine(p, e) {
    const h = this.hit(p, e)
    this.drag = h ? {kind:'line', pane:p.pane, mode:'end', i:h.i, line:[...this.prompt.line]} : {kind:'line', pane:p.pane, mode:'new', from:[p.x, p.y]}
  }

  addPoint(p, label) {
    const {width, height} = this.image, q = this.prompt?.kind === 'points' ? this.prompt : {points:[], labels:[]}
    if (p.x < 0 || p.y < 0 || p.x > width || p.y > height) return
    this.draft({kind:'points', points:[...q.points, [round(p.x), round(p.y)]], labels:[...q.labels, label]}, true)
  }

  move(e) {
    if (!this.image) return
    if (this.pointers.has(e.pointerId)) this.pointers.set(e.pointerId, e)
    const d = this.drag, p = this.at(e), {width, height} = this.image
    if (!d) return this.hover(p, e)
    if (d.kind !== 'pinch' && d.pointer !== e.pointerId) return
    if (d.kind === 'pan') { this.pan = [d.pan[0]+e.clientX-d.from[0], d.pan[1]+e.clientY-d.from[1]]; this.dirty() }
    else if (d.kind === 'pinch') this.movePinch(d)
    else if (d.kind === 'window') this.moveWindow(d, e)
    else if (d.kind === 'ruler') { this.ruler = [this.ruler[0], this.ruler[1], p.x, p.y]; this.dirty() }
    else if (d.kind === 'box') {
      if (d.mode === 'new') d.now = inside(sorted([...d.from, p.x, p.y]), width, height)
      else if (d.mode === 'move') d.now = shifted(d.box, p.x-d.from[0], p.y-d.from[1], width, height)
      else {
        const b = [...d.box]
        if (d.hx) b[IX[d.hx]] += p.x-d.from[0]
        if (d.hy) b[IX[d.hy]] += p.y-d.from[1]
        d.now = inside(sorted(b), width, height)
      }
      if (this.usable(d.now)) this.draft({kind:'box', box:d.now}, false)
    } else if (d.kind === 'line') {
      const end = [clamp(p.x, 0, width), clamp(p.y, 0, height)].map(round)
      d.now = d.mode === 'new' ? [...[clamp(d.from[0], 0, width), clamp(d.from[1], 0, height)].map(round), ...end] : d.i ? [d.line[0], d.line[1], ...end] : [...end, d.line[2], d.line[3]]
      if (this.usable(d.now, 'line')) this.draft({kind:'line', line:d.now}, false)
    }
  }

  usable([x0, y0, x1, y1], kind='box') { return kind === 'box' ? x1-x0 >= 2 && y1-y0 >= 2 : Math.hypot(x1-x0, y1-y0) >= 2 }

  up(e) {
    const d = this.drag
    this.pointers.delete(e.pointerId)
    if (d?.kind === 'pinch' ? this.pointers.size : d && d.pointer !== e.pointerId) return
    if (this.drawing && d.now && !this.usable(d.now, d.kind)) return this.abort()    // drawn back to nothing
    this.drag = null
    if (d?.now) this.draft({kind:d.kind, [d.kind]:d.now}, true)
    else if (d?.kind === 'window') this.model.save_changes()
    this.dirty()
  }

  abort() { const d = this.drag; this.drag = null; if (d?.now) this.draft(this.before.prompt, true); this.dirty() }    // as if nothing had been drawn
  cancel(e) { this.pointers.delete(e.pointerId); this.abort() }

  hover(p, e) {
    const h = this.hit(p, e), tool = this.model.get('tool')
    this.canvas.style.cursor = this.space ? 'grab' : h?.part === 'handle' ? CURSORS[h.i] : h?.part === 'body' ? 'move' : h ? 'pointer' : tool === 'box' || tool === 'line' || tool === 'ruler' ? 'crosshair' : 'cell'
  }

  pinch() { const [a, b] = [...this.pointers.values()]; return {from:[(a.clientX+b.clientX)/2, (a.clientY+b.clientY)/2], spread:Math.hypot(a.clientX-b.clientX, a.clientY-b.clientY)} }
  movePinch(d) {
    if (this.pointers.size < 2) return
    const now = this.pinch()
    this.zoom = d.zoom; this.pan = [...d.pan]
    this.zoomAt(d.from, now.spread/Math.max(d.spread, 1))
    this.pan = [this.pan[0]+now.from[0]-d.from[0], this.pan[1]+now.from[1]-d.from[1]]; this.dirty()
  }

  zoomAt([cx, cy], k) {                             // keep what lies under (cx,cy) where it is
    const r = this.canvas.getBoundingClientRect(), pw = this.size[0]/this.panes, x = (cx-r.left)%pw-pw/2, y = cy-r.top-this.size[1]/2
    const old = this.zoom; this.zoom = clamp(old*k, .5, 40); k = this.zoom/old
    this.pan = [x-(x-this.pan[0])*k, y-(y-this.pan[1])*k]; this.dirty()
  }

  moveWindow(d, e) {
    const [lo, hi] = d.window, width = Math.max(hi-lo, 1e-6), k = width/300, short = v => Number(v.toPrecision(6))
    const w = Math.max(width/100, width+(e.clientX-d.from[0])*k), level = (lo+hi)/2+(e.clientY-d.from[1])*k
    this.model.set('window', [short(level-w/2), short(level+w/2)]); this.onWindow()
  }

  wheel(e) {
    if (!this.image || !e.ctrlKey && !e.metaKey && this.model.get('depth') < 2) return    // the page may scroll
    e.preventDefault()
    if (e.ctrlKey || e.metaKey) return this.zoomAt([e.clientX, e.clientY], Math.exp(-e.deltaY/200))
    this.turned = (this.turned ?? 0)+(e.deltaMode ? e.deltaY*40 : e.deltaY)
    if (Math.abs(this.turned) >= 40) { this.slice(Math.sign(this.turned)); this.turned = 0 }    // one notch, one slice
  }

  slice(n) {
    const z = clamp(this.model.get('z')+n, 0, this.model.get('depth')-1)
    if (z === this.model.get('z') || this.drawing) return
    performance.mark(`medsam:slice:${z}`)
    this.model.set('z', z); this.model.save_changes()
  }

  // -- keyboard --
  key(e) {
    if (!this.image) return
    const {width, height} = this.image, q = this.prompt, step = e.shiftKey ? 10 : 1, ctrl = e.ctrlKey || e.metaKey
    const arrow = {ArrowLeft:[-1,0], ArrowRight:[1,0], ArrowUp:[0,-1], ArrowDown:[0,1]}[e.key]
    if (e.key === 'Tab') return
    if (ctrl && e.key.toLowerCase() === 'z') this.post({step:e.shiftKey ? 'redo' : 'undo', done:true})
    else if (ctrl && e.key.toLowerCase() === 'y') this.post({step:'redo', done:true})
    else if (ctrl) return
    else if (arrow && q) this.draft(nudged(q, arrow[0]*step, arrow[1]*step, e.altKey, width, height), true)
    else if (arrow) this.slice(arrow[0]+arrow[1])
    else if (e.key === 'Escape') { this.ruler = null; if (this.drawing) this.abort(); else if (q) this.draft(null, true) }
    else if ((e.key === 'Backspace' || e.key === 'Delete') && q?.kind === 'points') {
      this.draft(q.points.length > 1 ? {kind:'points', points:q.points.slice(0, -1), labels:q.labels.slice(0, -1)} : null, true)
    } else if (e.key === 'Delete') { if (q) this.draft(null, true) }
    else if (e.key === 'Enter') {
      const tool = this.model.get('tool'), x = width/2, y = height/2, w = width/8, h = height/8
      if (tool === 'foreground' || tool === 'background') this.addPoint({x, y}, tool === 'foreground' ? 1 : 0)
      else if (!q && tool !== 'ruler') this.draft(tool === 'line' ? {kind:'line', line:[x-w, y, x+w, y].map(round)} : {kind:'box', box:[x-w, y-h, x+w, y+h].map(round)}, true)
    }
    else if (e.key === 'PageUp' || e.key === '[') this.slice(-1)
    else if (e.key === 'PageDown' || e.key === ']') this.slice(1)
    else if (e.key === '+' || e.key === '=') this.zoomAt(this.middle(), 1.25)
    else if (e.key === '-') this.zoomAt(this.middle(), .8)
    else if (e.key === '0') this.fit()
    else if (e.key === ' ') this.space = true
    else return
    e.preventDefault(); e.stopPropagation(); this.dirty()
  }
  middle() { const r = this.canvas.getBoundingClientRect(); return [r.left+r.width/this.panes/2, r.top+r.height/2] }

  // -- to Python --
  draft(prompt, done) {
    this.prompts = {...this.prompts, [this.active]:prompt}
    if (!prompt) delete this.prompts[this.active]
    this.post({z:this.image.z, object:this.active, prompt, done}); this.dirty()
  }

  post(g) {                                         // finished gestures are sent again until they are answered
    const answered = this.model.get('answer')?.seq ?? 0
    this.seq = Math.max(this.seq, answered)+1
    this.started.set(this.seq, {t:performance.now(), done:g.done}); if (this.started.size > 200) this.started.delete(this.started.keys().next().value)
    this.queue = [...this.queue.filter(o => o.done && o.seq > answered), {seq:this.seq, case:this.image.case, ...g}]
    this.model.set('gestures', this.queue); this.model.save_changes()
  }

  // -- drawing --
  dirty() { if (!this.frame) this.frame = requestAnimationFrame(() => { this.frame = 0; this.draw() }) }

  draw() {
    if (!this.image || !this.root.isConnected) return
    const [w, h] = this.size, dpr = window.devicePixelRatio || 1, c = this.canvas, ctx = c.getContext('2d')
    if (c.width !== Math.round(w*dpr) || c.height !== Math.round(h*dpr)) { c.width = Math.round(w*dpr); c.height = Math.round(h*dpr); c.style.height = `${h}px` }
    ctx.setTransform(dpr, 0, 0, dpr, 0, 0); ctx.fillStyle = '#000'; ctx.fillRect(0, 0, w, h)
    for (let i=0; i<this.panes; i++) this.drawPane(ctx, i, w/this.panes, h)
    this.say(); this.measure()
  }

  scaled(pw, h) {                                   // the slice as a pane shows it, kept while only prompts and masks change
    const dpr = window.devicePixelRatio || 1, {width, height} = this.image, [ox, oy] = this.origin, s = this.scale, key = [pw, h, dpr, ox, oy, s, this.aspect, this.painted].join()
    if (this.kept?.key === key) return this.kept.picture
    const picture = offscreen(Math.max(1, Math.round(pw*dpr)), Math.max(1, Math.round(h*dpr))), ctx = picture.getContext('2d')
    ctx.setTransform(picture.width/pw, 0, 0, picture.height/h, 0, 0); ctx.imageSmoothingEnabled = true; ctx.imageSmoothingQuality = 'high'
    ctx.drawImage(this.base, ox, oy, width*s, height*s*this.aspect)
    this.kept = {key, picture}
    return picture
  }

  drawPane(ctx, i, pw, h) {
    const [ox, oy] = this.origin, s = this.scale, sy = s*this.aspect, {width, height} = this.image
    const X = x => i*pw+ox+x*s, Y = y => oy+y*sy
    ctx.save(); ctx.beginPath(); ctx.rect(i*pw, 0, pw, h); ctx.clip()
    ctx.drawImage(this.scaled(pw, h), i*pw, 0, pw, h)
    ctx.imageSmoothingEnabled = true; ctx.imageSmoothingQuality = 'high'
    ctx.globalAlpha = this.model.get('opacity')
    for (const {picture, part:[x, y, w, h]} of this.masks[i] ?? []) if (w && h) ctx.drawImage(picture, x, y, w, h, X(x), Y(y), w*s, h*sy)
    ctx.globalAlpha = 1
    if (this.model.get('contour')) for (const t of this.truth) if (t.id === this.active || this.prompts[t.id]) {
      t.path ??= outline(width, height, t.bits)
      ctx.save(); ctx.translate(X(0), Y(0)); ctx.scale(s, sy); ctx.lineWidth = 1.5/s; ctx.strokeStyle = '#fff'; ctx.stroke(t.path); ctx.restore()
    }
    for (const o of this.model.get('objects')) if (this.prompts[o.id]) this.drawPrompt(ctx, this.prompts[o.id], o, o.id === this.active, X, Y)
    if (this.ruler && this.model.get('tool') === 'ruler') this.drawLine(ctx, this.ruler, '#ffd60a', X, Y, false)
    this.drawBar(ctx, i, pw, h, s)
    const a = this.model.get('answer')
    if (this.panes > 1) { ctx.font = '12px sans-serif'; ctx.textAlign = 'left'; this.text(ctx, a.panes[i].name, i*pw+8, 18) }
    ctx.restore()
    if (i) { ctx.fillStyle = '#888'; ctx.fillRect(i*pw, 0, 1, h) }
  }

  text(ctx, t, x, y) { ctx.lineJoin = 'round'; ctx.lineWidth = 3; ctx.strokeStyle = 'rgba(0,0,0,.8)'; ctx.strokeText(t, x, y); ctx.fillStyle = '#fff'; ctx.fillText(t, x, y) }

  stroke(ctx, path, colour, width) {                // a dark rim keeps lines visible on white bone
    ctx.strokeStyle = 'rgba(0,0,0,.6)'; ctx.lineWidth = width+2; path(); ctx.stroke()
    ctx.strokeStyle = colour; ctx.lineWidth = width; path(); ctx.stroke()
  }

  drawPrompt(ctx, q, o, active, X, Y) {
    const knob = ([x, y], r=4) => { ctx.beginPath(); ctx.rect(X(x)-r, Y(y)-r, 2*r, 2*r); ctx.fillStyle = '#fff'; ctx.fill(); ctx.strokeStyle = o.colour; ctx.lineWidth = 1.5; ctx.stroke() }
    if (q.kind === 'box') {
      const [x0, y0, x1, y1] = q.box
      this.stroke(ctx, () => { ctx.beginPath(); ctx.rect(X(x0), Y(y0), X(x1)-X(x0), Y(y1)-Y(y0)) }, o.colour, active ? 2 : 1)
      if (active) handlePoints(q.box).forEach(p => knob(p))
    } else if (q.kind === 'line') this.drawLine(ctx, q.line, o.colour, X, Y, active, knob)
    else q.points.forEach(([x, y], k) => {
      ctx.beginPath(); ctx.arc(X(x), Y(y), 6, 0, 7); ctx.fillStyle = q.labels[k] ? '#30d158' : '#ff453a'; ctx.fill(); ctx.strokeStyle = '#fff'; ctx.lineWidth = 1.5; ctx.stroke()
      ctx.beginPath(); ctx.moveTo(X(x)-3, Y(y)); ctx.lineTo(X(x)+3, Y(y)); if (q.labels[k]) { ctx.moveTo(X(x), Y(y)-3); ctx.lineTo(X(x), Y(y)+3) } ctx.stroke()
    })
  }

  drawLine(ctx, [x0, y0, x1, y1], colour, X, Y, active, knob) {
    this.stroke(ctx, () => { ctx.beginPath(); ctx.moveTo(X(x0), Y(y0)); ctx.lineTo(X(x1), Y(y1)) }, colour, 2)
    if (active && knob) { knob([x0, y0]); knob([x1, y1]) }
    ctx.font = '12px sans-serif'; ctx.textAlign = 'left'; this.text(ctx, this.length([x0, y0, x1, y1]), X(x1)+8, Y(y1)-8)
  }

  length([x0, y0, x1, y1]) { const [row, col] = this.image.spacing; return `${mm(Math.hypot((x1-x0)*col, (y1-y0)*row))} ${this.image.unit}` }

  drawBar(ctx, i, pw, h, s) {                       // a scale bar of a round length, bottom right
    const per = this.image.spacing[1]/s, want = per*pw/5, len = [1000, 500, 200, 100, 50, 20, 10, 5, 2, 1].find(v => v <= want) ?? .5, px = len/per, x = (i+1)*pw-12
    ctx.strokeStyle = 'rgba(0,0,0,.6)'; ctx.lineWidth = 4; ctx.beginPath(); ctx.moveTo(x-px, h-12); ctx.lineTo(x, h-12); ctx.stroke()
    ctx.strokeStyle = '#fff'; ctx.lineWidth = 2; ctx.stroke()
    ctx.font = '11px sans-serif'; ctx.textAlign = 'right'; this.text(ctx, `${len} ${this.image.unit}`, x, h-18)
  }

  say() {                                           // one line for everybody, read aloud by screen readers
    const a = this.model.get('answer'), o = this.object(this.active), q = this.prompt, parts = [`slice ${this.model.get('z')} (0 to ${this.model.get('depth')-1})`]
    if (o) parts.push(o.name)
    if (this.ruler && this.model.get('tool') === 'ruler') parts.push(this.length(this.ruler))
    if (q?.kind === 'box') parts.push(`box ${q.box.map(v => Math.round(v*10)/10).join(' ')} px`)
    else if (q?.kind === 'line') parts.push(`diameter ${this.length(q.line)}`)
    else if (q) parts.push(`${q.points.length} point${q.points.length > 1 ? 's' : ''}`)
    if (q && !this.current) parts.push('…')         // scores of another prompt's mask would be believed
    if (q && this.current) for (const p of a.panes) {
      const s = p.objects.find(m => m.id === this.active)
      if (s) parts.push((a.panes.length > 1 ? `${p.name}: ` : '')+[s.iou == null ? null : `predicted IoU ${s.iou.toFixed(2)}`, s.dsc == null ? null : `DSC ${s.dsc.toFixed(3)}`, s.nsd == null ? null : `NSD ${s.nsd.toFixed(3)}`].filter(Boolean).join(', '))
    }
    const t = this.lost ? 'The kernel behind this drawing has gone: run its cell again.' : [parts.join(' · '), this.model.get('status')].filter(Boolean).join(' · ')
    if (t !== this.caption.textContent) this.caption.textContent = t
    if (!this.drag && t !== this.spoken.textContent) this.spoken.textContent = t    // not while a box is still moving
    this.busy.style.visibility = this.model.get('status').startsWith('preparing') ? 'visible' : 'hidden'
  }

  measure() {                                       // for the benchmark: from the gesture to the frame that shows its answer
    const there = this.current                      // the mask of just this prompt is painted already, asked for by the last move
    for (const [seq, {t, done}] of this.started) if (seq <= this.answered || done && there) {
      this.started.delete(seq)
      if (done && (seq === this.answered || there)) setTimeout(() => performance.measure('medsam:answer', {start:t, end:performance.now(), detail:{seq, model_ms:this.model.get('answer').model_ms, prompt:!!this.prompt, paint_ms:performance.now()-this.arrived}}))
    }
    const mark = `medsam:slice:${this.image.z}`
    if (performance.getEntriesByName(mark).length) { const t = performance.getEntriesByName(mark).at(-1).startTime; performance.clearMarks(mark); setTimeout(() => performance.measure('medsam:slice', {start:t, end:performance.now()})) }
  }
}

function render({model, el}) {
  const d = new Drawing(model, el)
  el.medsam = d                                     // for tests and the curious
  return () => d.close()
}

export default {render}
