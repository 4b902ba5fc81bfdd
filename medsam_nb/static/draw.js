// The canvas of medsam_nb.draw (chapter "draw"): shows a slice, takes prompts, paints masks. All else is Python.
//
// `View` knows where things are, `Hand` turns pointer and keys into gestures, `Painter` draws; `render` ties them.
// What differs from one kind of prompt to the next is a row of `KINDS`, and nowhere else: a new kind is a new row.
//
// Coordinates on the wire are image pixels, continuous: pixel (0,0) covers 0..1, so a box round it is [0,0,1,1].
// To the browser: `image`, `answer`, and the plain settings `objects`, `active`, `tool`, `z`, `depth`, `window`,
// `opacity`, `contour`, `status`, `height`. From the browser: `gestures`, `z`, `window`.
// `model` needs get, set, save_changes, on and off, no more: a static page can bring its own.

/**
 * A slice, as Python sends it.
 * @typedef {Object} Image
 * @property {number} z  the slice
 * @property {number} case  index of the case it belongs to
 * @property {number} width  in pixels
 * @property {number} height  in pixels
 * @property {string} dtype  a key of ARRAYS
 * @property {DataView} pixels  row by row
 * @property {number[]} spacing  row and column spacing
 * @property {string} unit  of the spacing: 'mm', or 'px' where nobody knows
 * @property {{id:number, bits:DataView}[]} truth  the true masks, one bit a pixel
 */

/**
 * What was drawn for one object on one slice. The field that is named like the kind holds it.
 * @typedef {Object} Prompt
 * @property {string} kind  a key of KINDS
 * @property {number[]} [box]  x0 y0 x1 y1
 * @property {number[]} [line]  x0 y0 x1 y1, its two ends
 * @property {number[][]} [points]  x y of each
 * @property {number[]} [labels]  1 inside and 0 outside, one for each point
 * @property {number[][]} [outline]  x y of each corner; the last is joined to the first
 */

/**
 * Masks and prompts of a slice, as Python sends them.
 * @typedef {Object} Answer
 * @property {number} seq  the last gesture that is answered
 * @property {number} z  the slice
 * @property {{name:string, objects:{id:number, bits:DataView, iou:number, dsc:?number, nsd:?number}[]}[]} panes
 *   one for each decoder
 * @property {Object<string,Prompt>} prompts  of the objects, by their ids
 * @property {number} model_ms  how long the model took
 */

/**
 * What a hand did, as Python gets it: either a prompt, or a step of the history.
 * @typedef {Object} Gesture
 * @property {number} seq  counts up
 * @property {number} case  the case it was done on
 * @property {boolean} done  false while the button is still down
 * @property {number} [z]  the slice
 * @property {number} [object]  id of the object
 * @property {?Prompt} [prompt]  null takes it away
 * @property {'undo'|'redo'} [step]
 */

/**
 * A pointer that is down.
 * @typedef {Object} Drag
 * @property {number} [pointer]  its id; none for a pinch, which has two
 * @property {number} [pane]  where it began, so that leaving the pane is not jumping to the next
 * @property {function(PointerEvent, number[])} move  called with the event and its place on the image
 * @property {function()} end
 * @property {string} [kind]  of the prompt that is drawn, if one is
 * @property {?Prompt} [before]  what was there, to come back to
 * @property {?Prompt} [now]  what is there while the hand moves
 */

/**
 * A row of KINDS: one kind of prompt. `image` is the Image, places are [x, y] on it.
 * @typedef {Object} Kind
 * @property {string[]} tools  the tools that draw it
 * @property {string} cursor  over the slice, with one of these tools in hand
 * @property {string} made  what Enter makes, in words
 * @property {function} press  (at, prompt, tool, image): the prompt that a press makes, for kinds without a drag
 * @property {function} start  ({at, prompt, grip, image, gap}): what `drag` has to know, for kinds that are dragged
 * @property {function} drag  (stroke, at, image): the prompt now
 * @property {function} hit  (prompt, at, near): the part under the pointer with its cursor, or null
 * @property {function} usable  (prompt): is it more than a slip of the hand?
 * @property {function} enter  (prompt, tool, image): what Enter makes, or null
 * @property {function} nudge  (prompt, [dx, dy], end, image): moved by keys; with `end` only its last corner or end
 * @property {function} shorter  (prompt): what Backspace leaves; kinds without it ignore that key
 * @property {function} draw  (pen, prompt, colour, active)
 * @property {function} trail  (pen, stroke, colour): what is seen of a drag that is no prompt yet, if anything
 * @property {function} say  (prompt, length): in words, for the caption
 */

const HANDLE = 9    // CSS pixels within which a handle is hit
const TOUCH = 18    // the same for a finger
const STEP = 2      // CSS pixels between two points of a freehand line
const MOST = 400    // points of a freehand line: more say nothing new and make the message long
const SMALLEST = 2  // image pixels: less than this is a slip of the hand
const YELLOW = '#ffd60a'
const SHADE = 'rgba(0,0,0,.6)'

// ---- numbers ----
const clamp = (v, lo, hi) => Math.min(Math.max(v, lo), hi)
const round = v => Math.round(v*100)/100
const short = v => v < 10 ? v.toFixed(1) : v.toFixed(0)
const distance = ([x0, y0], [x1, y1]) => Math.hypot(x1-x0, y1-y0)
const middle = ({width, height}) => [width/2, height/2]

// ---- bytes to pictures ----
const ARRAYS = {
  uint8: Uint8Array,
  int16: Int16Array,
  uint16: Uint16Array,
  int32: Int32Array,
  float32: Float32Array,
  rgb: Uint8Array,
}

/** Bytes of whatever a kernel or a page hands over: a DataView, a typed array or a buffer. */
function bytes(b) {
  if (b instanceof ArrayBuffer) return new Uint8Array(b)
  return new Uint8Array(b.buffer, b.byteOffset, b.byteLength)
}

/** Numbers of a slice. Copied, since a message's bytes need not lie where 16 bits may begin. */
function values(image) {
  const copy = bytes(image.pixels).slice()
  return new ARRAYS[image.dtype](copy.buffer)
}

function offscreen(width, height) {
  const canvas = document.createElement('canvas')
  canvas.width = width
  canvas.height = height
  return canvas
}

/** Fill a picture with 32-bit pixels, alpha first and red last, which is how a canvas keeps them. */
function fillPixels(canvas, fill) {
  const ctx = canvas.getContext('2d')
  const out = ctx.createImageData(canvas.width, canvas.height)
  fill(new Uint32Array(out.data.buffer))
  ctx.putImageData(out, 0, 0)
}

const OPAQUE = 0xff000000

function paintColour(canvas, data) {
  fillPixels(canvas, pixels => {
    for (let i = 0, j = 0; i < pixels.length; i++, j += 3) {
      pixels[i] = OPAQUE | data[j+2] << 16 | data[j+1] << 8 | data[j]
    }
  })
}

function paintGrey(canvas, data, [lo, hi]) {
  const k = 255/Math.max(hi-lo, 1e-9)
  fillPixels(canvas, pixels => {
    for (let i = 0; i < pixels.length; i++) {
      const v = clamp((data[i]-lo)*k, 0, 255) | 0
      pixels[i] = OPAQUE | v << 16 | v << 8 | v
    }
  })
}

/** Bit `i`, as numpy.packbits writes them. */
const bit = (bits, i) => bits[i >> 3] >> (7-(i & 7)) & 1

/** The part of a mask where anything is, with a rim for smoothing: x y width height. */
function partOf(width, height, bits) {
  let [x0, y0, x1, y1] = [width, height, 0, 0]
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!bit(bits, i)) continue
      x0 = Math.min(x0, x)
      x1 = Math.max(x1, x+1)
      y0 = Math.min(y0, y)
      y1 = y+1
    }
  }
  const left = Math.max(0, x0-2)
  const top = Math.max(0, y0-2)
  return [left, top, Math.max(0, Math.min(width, x1+2)-left), Math.max(0, Math.min(height, y1+2)-top)]
}

function maskPicture(width, height, bits, colour) {
  const picture = offscreen(width, height)
  const n = parseInt(colour.slice(1), 16)
  const pixel = OPAQUE | (n & 255) << 16 | (n >> 8 & 255) << 8 | n >> 16
  fillPixels(picture, pixels => {
    for (let i = 0; i < pixels.length; i++) if (bit(bits, i)) pixels[i] = pixel
  })
  return {picture, part: partOf(width, height, bits)}
}

/** The pixel edges between inside and outside of a mask. */
function edges(width, height, bits) {
  const path = new Path2D()
  const at = (x, y) => x >= 0 && y >= 0 && x < width && y < height ? bit(bits, y*width+x) : 0
  const line = (x0, y0, x1, y1) => {
    path.moveTo(x0, y0)
    path.lineTo(x1, y1)
  }
  for (let y = 0; y <= height; y++) {
    for (let x = 0; x <= width; x++) {
      const here = at(x, y)
      if (here !== at(x, y-1)) line(x, y, x+1, y)
      if (here !== at(x-1, y)) line(x, y, x, y+1)
    }
  }
  return path
}

// ---- drawing with a pen: {ctx, X, Y, length}, where X and Y turn image pixels into CSS pixels ----
/** A line with a dark rim, so that it is seen on white bone too. */
function stroke(ctx, path, colour, width) {
  ctx.strokeStyle = SHADE
  ctx.lineWidth = width+2
  ctx.stroke(path)
  ctx.strokeStyle = colour
  ctx.lineWidth = width
  ctx.stroke(path)
}

function pathThrough({X, Y}, points) {
  const path = new Path2D()
  for (const [x, y] of points) path.lineTo(X(x), Y(y))
  return path
}

function knob({ctx, X, Y}, [x, y], colour) {
  ctx.beginPath()
  ctx.rect(X(x)-4, Y(y)-4, 8, 8)
  ctx.fillStyle = '#fff'
  ctx.fill()
  ctx.strokeStyle = colour
  ctx.lineWidth = 1.5
  ctx.stroke()
}

function write(ctx, text, x, y, font = '12px sans-serif', align = 'left') {
  ctx.save()   // its round joins are for letters
  ctx.font = font
  ctx.textAlign = align
  ctx.lineJoin = 'round'
  ctx.lineWidth = 3
  ctx.strokeStyle = 'rgba(0,0,0,.8)'
  ctx.strokeText(text, x, y)
  ctx.fillStyle = '#fff'
  ctx.fillText(text, x, y)
  ctx.restore()
}

/** A line with its length beside its end: a diameter, and the ruler. */
function drawLine(pen, line, colour) {
  const [x0, y0, x1, y1] = line
  stroke(pen.ctx, pathThrough(pen, [[x0, y0], [x1, y1]]), colour, 2)
  write(pen.ctx, pen.length(line), pen.X(x1)+8, pen.Y(y1)-8)
}

function drawPoint({ctx, X, Y}, [x, y], label) {
  ctx.beginPath()
  ctx.arc(X(x), Y(y), 6, 0, 7)
  ctx.fillStyle = label ? '#30d158' : '#ff453a'
  ctx.fill()
  ctx.strokeStyle = '#fff'
  ctx.lineWidth = 1.5
  ctx.stroke()
  ctx.beginPath()
  ctx.moveTo(X(x)-3, Y(y))
  ctx.lineTo(X(x)+3, Y(y))
  if (label) {
    ctx.moveTo(X(x), Y(y)-3)
    ctx.lineTo(X(x), Y(y)+3)
  }
  ctx.stroke()
}

// ---- geometry ----
const within = ([x, y], {width, height}) => [clamp(x, 0, width), clamp(y, 0, height)].map(round)
const sorted = ([a, b, c, d]) => [Math.min(a, c), Math.min(b, d), Math.max(a, c), Math.max(b, d)]
const ends = ([x0, y0, x1, y1]) => [[x0, y0], [x1, y1]]

/** How far something within `box` can be moved by (dx, dy) before it meets the edge of the image. */
function free([x0, y0, x1, y1], [dx, dy], {width, height}) {
  return [clamp(dx, -x0, width-x1), clamp(dy, -y0, height-y1)]
}

function boxAround(points) {
  const xs = points.map(p => p[0])
  const ys = points.map(p => p[1])
  return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)]
}

const wideEnough = ([x0, y0, x1, y1]) => x1-x0 >= SMALLEST && y1-y0 >= SMALLEST
const longEnough = ([p, q]) => distance(p, q) >= SMALLEST

/** Area of a polygon, by the shoelace formula. */
function area(points) {
  const cross = ([x, y], i) => {
    const [u, v] = points[(i+1)%points.length]
    return x*v-u*y
  }
  return Math.abs(points.reduce((sum, p, i) => sum+cross(p, i), 0))/2
}

/** Corners and sides of a box: which of x0 y0 x1 y1 each of them moves. */
const HANDLES = [
  {x: 0, y: 1, cursor: 'nwse-resize'},
  {x: 2, y: 1, cursor: 'nesw-resize'},
  {x: 2, y: 3, cursor: 'nwse-resize'},
  {x: 0, y: 3, cursor: 'nesw-resize'},
  {y: 1, cursor: 'ns-resize'},
  {x: 2, cursor: 'ew-resize'},
  {y: 3, cursor: 'ns-resize'},
  {x: 0, cursor: 'ew-resize'},
]

function handlePlace(box, {x, y}) {
  const [x0, y0, x1, y1] = box
  return [box[x] ?? (x0+x1)/2, box[y] ?? (y0+y1)/2]
}

// ---- the kinds of prompts ----
const toBox = box => ({kind: 'box', box: box.map(round)})
const toLine = line => ({kind: 'line', line: line.map(round)})
const toOutline = outline => ({kind: 'outline', outline: outline.map(p => p.map(round))})

/** @type {Object<string,Kind>} */
const KINDS = {
  box: {
    tools: ['box'],
    cursor: 'crosshair',
    made: 'a box',

    hit({box}, at, near) {
      const handle = HANDLES.find(h => near(handlePlace(box, h)))
      if (handle) return handle
      const [x, y] = at
      const inside = x > box[0] && x < box[2] && y > box[1] && y < box[3]
      return inside ? {body: true, cursor: 'move'} : null
    },

    start: ({at, prompt, grip}) => ({from: at, grip, box: grip && prompt.box}),

    drag({from, grip, box}, at, image) {
      const by = [at[0]-from[0], at[1]-from[1]]
      if (grip?.body) return this.shift(box, by, image)
      const moved = grip ? [...box] : [...from, ...at]
      if (grip?.x !== undefined) moved[grip.x] += by[0]
      if (grip?.y !== undefined) moved[grip.y] += by[1]
      const [a, b] = ends(sorted(moved))
      return toBox([...within(a, image), ...within(b, image)])
    },

    shift(box, by, image) {
      const [dx, dy] = free(box, by, image)
      const [x0, y0, x1, y1] = box
      return toBox([x0+dx, y0+dy, x1+dx, y1+dy])
    },

    usable: ({box}) => wideEnough(box),

    enter(prompt, tool, image) {
      if (prompt) return null
      const [x, y] = middle(image)
      const [w, h] = [image.width/8, image.height/8]
      return toBox([x-w, y-h, x+w, y+h])
    },

    nudge({box}, by, end, image) {
      if (!end) return this.shift(box, by, image)
      const [x0, y0, x1, y1] = box
      const right = clamp(x1+by[0], x0+SMALLEST, image.width)
      const bottom = clamp(y1+by[1], y0+SMALLEST, image.height)
      return toBox([x0, y0, right, bottom])
    },

    draw(pen, {box}, colour, active) {
      const [x0, y0, x1, y1] = box
      const path = pathThrough(pen, [[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
      path.closePath()
      stroke(pen.ctx, path, colour, active ? 2 : 1)
      if (active) for (const h of HANDLES) knob(pen, handlePlace(box, h), colour)
    },

    say: ({box}) => `box ${box.map(v => Math.round(v*10)/10).join(' ')} px`,
  },

  line: {
    tools: ['line'],
    cursor: 'crosshair',
    made: 'a diameter',

    hit({line}, at, near) {
      const end = ends(line).findIndex(near)
      return end < 0 ? null : {end, cursor: 'pointer'}
    },

    // a new line is a line without length whose second end is pulled
    start({at, prompt, grip, image}) {
      if (grip) return {line: prompt.line, end: grip.end}
      const first = within(at, image)
      return {line: [...first, ...first], end: 1}
    },

    drag({line, end}, at, image) {
      const both = ends(line)
      both[end] = within(at, image)
      return toLine(both.flat())
    },

    usable: ({line}) => longEnough(ends(line)),

    enter(prompt, tool, image) {
      if (prompt) return null
      const [x, y] = middle(image)
      const w = image.width/8
      return toLine([x-w, y, x+w, y])
    },

    nudge(prompt, [dx, dy], end, image) {
      const moved = ([x, y]) => within([x+dx, y+dy], image)
      const [first, last] = ends(prompt.line)
      const both = [end ? first : moved(first), moved(last)]
      return longEnough(both) ? toLine(both.flat()) : prompt
    },

    draw(pen, {line}, colour, active) {
      drawLine(pen, line, colour)
      if (active) for (const p of ends(line)) knob(pen, p, colour)
    },

    say: ({line}, length) => `diameter ${length(line)}`,
  },

  points: {
    tools: ['background', 'foreground'],  // in the order of their labels, 0 and 1
    cursor: 'cell',
    made: 'a point',

    press([x, y], prompt, tool, {width, height}) {
      if (x < 0 || y < 0 || x > width || y > height) return null
      const {points, labels} = prompt?.points ? prompt : {points: [], labels: []}
      const label = this.tools.indexOf(tool)
      return {kind: 'points', points: [...points, [round(x), round(y)]], labels: [...labels, label]}
    },

    hit: () => null,

    enter(prompt, tool, image) {
      return this.press(middle(image), prompt, tool, image)
    },

    nudge({points, labels}, [dx, dy], end, image) {
      const [x, y] = points.at(-1)
      return {kind: 'points', points: [...points.slice(0, -1), within([x+dx, y+dy], image)], labels}
    },

    shorter({points, labels}) {
      if (points.length === 1) return null
      return {kind: 'points', points: points.slice(0, -1), labels: labels.slice(0, -1)}
    },

    draw(pen, {points, labels}) {
      points.forEach((p, i) => drawPoint(pen, p, labels[i]))
    },

    say: ({points}) => `${points.length} point${points.length > 1 ? 's' : ''}`,
  },

  outline: {
    tools: ['outline'],
    cursor: 'crosshair',
    made: 'an outline',

    hit: () => null,  // a new outline replaces the old one, wherever it begins

    start: ({at, image, gap}) => ({points: [within(at, image)], gap, prompt: null}),

    drag(stroke, at, image) {
      const next = within(at, image)
      if (distance(next, stroke.points.at(-1)) < stroke.gap) return stroke.prompt
      stroke.points.push(next)
      if (stroke.points.length > MOST) this.thin(stroke)
      stroke.prompt = toOutline(stroke.points)
      return stroke.prompt
    },

    // a long line keeps every second point, and takes new ones twice as far apart
    thin(stroke) {
      stroke.points = stroke.points.filter((p, i) => i%2 === 0)
      stroke.gap *= 2
    },

    usable: ({outline}) => outline.length > 2 && wideEnough(boxAround(outline)) && area(outline) >= SMALLEST**2,

    // an octagon: few corners, and nearly an ellipse
    enter(prompt, tool, image) {
      if (prompt) return null
      const [x, y] = middle(image)
      const corner = i => [x+image.width/8*Math.cos(i*Math.PI/4), y+image.height/8*Math.sin(i*Math.PI/4)]
      return toOutline([0, 1, 2, 3, 4, 5, 6, 7].map(corner))
    },

    nudge({outline}, by, end, image) {
      const [dx, dy] = free(boxAround(outline), by, image)
      return toOutline(outline.map(([x, y]) => [x+dx, y+dy]))
    },

    draw(pen, {outline}, colour, active) {
      const path = pathThrough(pen, outline)
      path.closePath()
      stroke(pen.ctx, path, colour, active ? 2 : 1)
    },

    trail(pen, {points}, colour) {
      stroke(pen.ctx, pathThrough(pen, points), colour, 2)
    },

    say: ({outline}) => `outline of ${outline.length} points`,
  },
}

/** The kind that a tool draws; none for the ruler, which draws no prompt. */
const kindOf = tool => Object.keys(KINDS).find(kind => KINDS[kind].tools.includes(tool))

// ---- where things are ----
/** The canvas and the slice on it: size, scale, zoom, pan, panes. */
class View {
  constructor(model, el, paint) {
    this.model = model
    this.paint = paint
    /** @type {?Image} */
    this.image = null
    this.zoom = 1
    this.pan = [0, 0]
    this.frame = 0
    this.root = addChild(el, 'div', 'medsam-frame')
    this.canvas = addChild(this.root, 'canvas')
    this.resize = new ResizeObserver(() => this.dirty())
    this.resize.observe(this.root)
  }

  close() {
    this.resize.disconnect()
    cancelAnimationFrame(this.frame)
  }

  /** Ask for one frame, however much has changed. */
  dirty() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0
      this.paint()
    })
  }

  /** Take an image; true if it is of another slice than the last. */
  show(image) {
    const old = this.image
    this.image = image
    if (image.width !== old?.width || image.height !== old?.height) this.fit()
    return image.z !== old?.z || image.case !== old?.case
  }

  fit() {
    this.zoom = 1
    this.pan = [0, 0]
    this.dirty()
  }

  get panes() {
    return Math.max(1, this.model.get('answer')?.panes?.length ?? 1)
  }

  /** CSS pixels: width and height of the canvas. */
  get size() {
    return [this.root.clientWidth || 640, Math.max(120, this.model.get('height'))]
  }

  get paneWidth() {
    return this.size[0]/this.panes
  }

  /** Pixels of a scan need not be square: how much taller than wide they are. */
  get aspect() {
    const [row, col] = this.image?.spacing ?? [1, 1]
    return row/col
  }

  /** CSS pixels for the width of an image pixel. */
  get scale() {
    const {width, height} = this.image
    const fitted = Math.min(this.paneWidth/width, this.size[1]/(height*this.aspect))
    return fitted*this.zoom
  }

  /** CSS pixels from the corner of a pane to the corner of its slice. */
  get origin() {
    const {width, height} = this.image
    const x = (this.paneWidth-width*this.scale)/2
    const y = (this.size[1]-height*this.scale*this.aspect)/2
    return [x+this.pan[0], y+this.pan[1]]
  }

  /** CSS pixels between two places on the image. */
  apart([x0, y0], [x1, y1]) {
    return Math.hypot((x0-x1)*this.scale, (y0-y1)*this.scale*this.aspect)
  }

  paneAt(e) {
    const r = this.canvas.getBoundingClientRect()
    return clamp(Math.floor((e.clientX-r.left)/this.paneWidth), 0, this.panes-1)
  }

  /** Where on the image an event is, seen from a pane. */
  at(e, pane) {
    const r = this.canvas.getBoundingClientRect()
    const [ox, oy] = this.origin
    const x = (e.clientX-r.left-pane*this.paneWidth-ox)/this.scale
    const y = (e.clientY-r.top-oy)/(this.scale*this.aspect)
    return [x, y]
  }

  /** Where on the page the middle of the first pane is. */
  get centre() {
    const r = this.canvas.getBoundingClientRect()
    return [r.left+r.width/this.panes/2, r.top+r.height/2]
  }

  /** Zoom by `k`, and keep what lies under a place of the page where it is. */
  zoomAt([px, py], k) {
    const r = this.canvas.getBoundingClientRect()
    const x = (px-r.left)%this.paneWidth-this.paneWidth/2
    const y = py-r.top-this.size[1]/2
    const old = this.zoom
    this.zoom = clamp(old*k, .5, 40)
    const grown = this.zoom/old
    this.pan = [x-(x-this.pan[0])*grown, y-(y-this.pan[1])*grown]
    this.dirty()
  }
}

function addChild(parent, tag, name = '') {
  const child = document.createElement(tag)
  child.className = name
  parent.append(child)
  return child
}

// ---- pointer, keys, gestures ----
/** What a key does; one that answers false leaves the key to the page. */
const KEYS = {
  ArrowLeft: (hand, e) => hand.arrow(e, [-1, 0]),
  ArrowRight: (hand, e) => hand.arrow(e, [1, 0]),
  ArrowUp: (hand, e) => hand.arrow(e, [0, -1]),
  ArrowDown: (hand, e) => hand.arrow(e, [0, 1]),
  Enter: hand => hand.enter(),
  Escape: hand => hand.escape(),
  Backspace: hand => hand.shorten(),
  Delete: hand => hand.shorten() || hand.remove(),
  PageUp: hand => hand.slice(-1),
  '[': hand => hand.slice(-1),
  PageDown: hand => hand.slice(1),
  ']': hand => hand.slice(1),
  '+': hand => hand.view.zoomAt(hand.view.centre, 1.25),
  '=': hand => hand.view.zoomAt(hand.view.centre, 1.25),
  '-': hand => hand.view.zoomAt(hand.view.centre, .8),
  '0': hand => hand.view.fit(),
  ' ': hand => hand.holdSpace(),
}

/** The same with Ctrl or Cmd. */
const CHORDS = {
  z: (hand, e) => hand.post({step: e.shiftKey ? 'redo' : 'undo', done: true}),
  y: hand => hand.post({step: 'redo', done: true}),
}

/** Notebook 7 takes the arrow keys of a slider for its own, unless the slider says that they are not. */
function keepSliderKeys(e) {
  const slider = e.target.matches?.('.medsam-app .noUi-handle')
  if (slider) e.target.setAttribute('data-lm-suppress-shortcuts', 'true')
}

/** What people do, and what Python is told of it. */
class Hand {
  constructor(model, view) {
    this.model = model
    this.view = view
    /** @type {Object<string,Prompt>} */
    this.prompts = {}
    this.seq = 0
    /** @type {Gesture[]} */
    this.queue = []
    this.started = new Map()   // for the benchmark: when which gesture was sent
    this.pointers = new Map()
    /** @type {?Drag} */
    this.drag = null
    this.ruler = null
    this.space = false
    this.turned = 0            // how far the wheel is on its way to the next slice
    this.listen(view.canvas)
  }

  listen(canvas) {
    const on = (type, f, options) => canvas.addEventListener(type, f, options)
    canvas.tabIndex = 0
    on('pointerdown', e => this.onDown(e))
    on('pointermove', e => this.onMove(e))
    on('pointerup', e => this.onUp(e))
    on('pointercancel', e => this.onCancel(e))
    on('lostpointercapture', e => this.pointers.delete(e.pointerId))
    on('wheel', e => this.onWheel(e), {passive: false})
    on('contextmenu', e => e.preventDefault())
    on('keydown', e => this.onKey(e))
    on('keyup', e => this.onKeyUp(e))
    on('blur', () => this.releaseSpace())
    document.addEventListener('focusin', keepSliderKeys)
  }

  get active() {
    return this.model.get('active')
  }

  get tool() {
    return this.model.get('tool')
  }

  /** @returns {?Prompt} what the active object has on this slice */
  get prompt() {
    return this.prompts[this.active] ?? null
  }

  /** Is a prompt being drawn? */
  get drawing() {
    return Boolean(this.drag?.kind)
  }

  /** Does the answer that we have belong to the prompt in view? */
  get current() {
    const answer = this.model.get('answer')
    const same = JSON.stringify(answer?.prompts?.[this.active] ?? null) === JSON.stringify(this.prompt)
    return same && answer?.z === this.view.image.z
  }

  /** Another slice is shown: what was drawn belongs to the last one. */
  leave() {
    this.prompts = {}
    if (this.drawing) this.drag = null
  }

  /** A hand is right until its last word is answered. */
  takeAnswer(answer) {
    if (answer.seq >= this.seq && !this.drawing) this.prompts = answer.prompts
  }

  // -- pointer --
  onDown(e) {
    if (!this.view.image) return
    this.view.canvas.focus({preventScroll: true})
    this.view.canvas.setPointerCapture(e.pointerId)
    this.pointers.set(e.pointerId, e)
    if (this.pointers.size > 2) return
    if (this.pointers.size === 2) {
      this.abort()
      this.drag = this.pinch()
      return
    }
    const pane = this.view.paneAt(e)
    const drag = this.begin(e, this.view.at(e, pane))
    this.drag = drag && {...drag, pane, pointer: e.pointerId}
    e.preventDefault()
  }

  /** The drag that a button begins, if it begins one. */
  begin(e, at) {
    if (e.button === 1 || e.button === 0 && this.space) return this.panning(e)
    if (e.button === 2) return this.windowing(e)
    if (e.button !== 0) return null
    const kind = kindOf(this.tool)
    if (!kind) return this.measuring(at)
    return KINDS[kind].press ? this.press(KINDS[kind], at) : this.sketch(kind, at, e)
  }

  onMove(e) {
    if (!this.view.image) return
    if (this.pointers.has(e.pointerId)) this.pointers.set(e.pointerId, e)
    const {drag} = this
    if (!drag) return this.hover(e)
    const other = drag.pointer !== undefined && drag.pointer !== e.pointerId
    if (other) return
    drag.move(e, this.view.at(e, drag.pane))
    this.view.dirty()
  }

  onUp(e) {
    const {drag} = this
    this.pointers.delete(e.pointerId)
    const held = drag?.pointer === undefined ? this.pointers.size > 0 : drag.pointer !== e.pointerId
    if (drag && held) return
    this.drag = null
    drag?.end(drag)
    this.view.dirty()
  }

  onCancel(e) {
    this.pointers.delete(e.pointerId)
    this.abort()
  }

  /** End a drag as if nothing had been drawn. */
  abort() {
    const {drag} = this
    this.drag = null
    if (drag?.now) this.draft(drag.before, true)
    this.view.dirty()
  }

  hover(e) {
    const kind = kindOf(this.tool)
    const at = this.view.at(e, this.view.paneAt(e))
    const cursor = this.grip(at, e)?.cursor ?? KINDS[kind]?.cursor ?? 'crosshair'
    this.view.canvas.style.cursor = this.space ? 'grab' : cursor
  }

  /** The part of the active prompt under the pointer, if the tool in hand can move it. */
  grip(at, e) {
    const {prompt} = this
    if (!prompt || prompt.kind !== kindOf(this.tool)) return null
    const reach = e.pointerType === 'touch' ? TOUCH : HANDLE
    return KINDS[prompt.kind].hit(prompt, at, place => this.view.apart(place, at) <= reach)
  }

  // -- what a drag can be --
  panning(e) {
    const pan = this.view.pan
    const move = now => {
      this.view.pan = [pan[0]+now.clientX-e.clientX, pan[1]+now.clientY-e.clientY]
    }
    return {move, end() {}}
  }

  windowing(e) {
    const [lo, hi] = this.model.get('window')
    const width = Math.max(hi-lo, 1e-6)
    const digits = v => Number(v.toPrecision(6))
    const move = now => {
      const w = Math.max(width/100, width+(now.clientX-e.clientX)*width/300)
      const level = (lo+hi)/2+(now.clientY-e.clientY)*width/300
      this.model.set('window', [digits(level-w/2), digits(level+w/2)])
    }
    return {move, end: () => this.model.save_changes()}
  }

  measuring(from) {
    this.ruler = [...from, ...from]
    const move = (e, at) => {
      this.ruler = [...from, ...at]
    }
    return {move, end() {}}
  }

  pinch() {
    const {zoom, pan} = this.view
    const first = this.fingers()
    const move = () => {
      if (this.pointers.size < 2) return
      const now = this.fingers()
      this.view.zoom = zoom
      this.view.pan = pan
      this.view.zoomAt(first.middle, now.spread/Math.max(first.spread, 1))
      const [x, y] = this.view.pan
      this.view.pan = [x+now.middle[0]-first.middle[0], y+now.middle[1]-first.middle[1]]
    }
    return {move, end() {}}
  }

  fingers() {
    const [a, b] = [...this.pointers.values()].map(e => [e.clientX, e.clientY])
    return {middle: [(a[0]+b[0])/2, (a[1]+b[1])/2], spread: distance(a, b)}
  }

  /** A prompt that a press makes: there is nothing to drag. */
  press(kind, at) {
    const prompt = kind.press(at, this.prompt, this.tool, this.view.image)
    if (prompt) this.draft(prompt, true)
    return null
  }

  /** A prompt that is dragged: told while it moves, finished when the button comes up. */
  sketch(kind, at, e) {
    const {image, scale} = this.view
    const gap = Math.max(1, STEP/scale)
    const stroke = KINDS[kind].start({at, prompt: this.prompt, grip: this.grip(at, e), image, gap})
    const move = (now, place) => this.sketchTo(place)
    const end = drag => this.finish(drag)
    return {kind, stroke, before: this.prompt, now: null, move, end}
  }

  sketchTo(at) {
    const {drag} = this
    const kind = KINDS[drag.kind]
    const now = kind.drag(drag.stroke, at, this.view.image)
    if (now === drag.now) return
    drag.now = now
    if (kind.usable(now)) this.draft(now, false)
  }

  finish({kind, now, before}) {
    if (!now) return
    const drawn = KINDS[kind].usable(now)   // or it was drawn back to nothing
    this.draft(drawn ? now : before, true)
  }

  // -- wheel --
  onWheel(e) {
    const zooming = e.ctrlKey || e.metaKey
    const slices = this.model.get('depth') > 1
    if (!this.view.image || !zooming && !slices) return   // the page may scroll
    e.preventDefault()
    if (zooming) this.view.zoomAt([e.clientX, e.clientY], Math.exp(-e.deltaY/200))
    else this.turn(e.deltaMode ? e.deltaY*40 : e.deltaY)
  }

  /** One notch of the wheel is one slice, however many events it comes in. */
  turn(by) {
    this.turned += by
    if (Math.abs(this.turned) < 40) return
    this.slice(Math.sign(this.turned))
    this.turned = 0
  }

  slice(n) {
    const old = this.model.get('z')
    const z = clamp(old+n, 0, this.model.get('depth')-1)
    if (z === old || this.drawing) return
    performance.mark(`medsam:slice:${z}`)
    this.model.set('z', z)
    this.model.save_changes()
  }

  // -- keyboard --
  onKey(e) {
    if (!this.view.image) return
    const action = e.ctrlKey || e.metaKey ? CHORDS[e.key.toLowerCase()] : KEYS[e.key]
    if (!action || action(this, e) === false) return
    e.preventDefault()
    e.stopPropagation()
    this.view.dirty()
  }

  /** Move the prompt, or without one go to the next slice. */
  arrow(e, [dx, dy]) {
    const {prompt} = this
    if (!prompt) {
      this.slice(dx+dy)
      return
    }
    const step = e.shiftKey ? 10 : 1
    const moved = KINDS[prompt.kind].nudge(prompt, [dx*step, dy*step], e.altKey, this.view.image)
    this.draft(moved, true)
  }

  enter() {
    const kind = KINDS[kindOf(this.tool)]
    const prompt = kind?.enter(this.prompt, this.tool, this.view.image)
    if (prompt) this.draft(prompt, true)
  }

  escape() {
    this.ruler = null
    if (this.drawing) this.abort()
    else this.remove()
  }

  /** Take away the last part of a prompt; false if it has no parts. */
  shorten() {
    const {prompt} = this
    const shorter = KINDS[prompt?.kind]?.shorter
    if (!shorter) return false
    this.draft(shorter(prompt), true)
    return true
  }

  remove() {
    if (this.prompt) this.draft(null, true)
  }

  holdSpace() {
    this.space = true
  }

  releaseSpace() {
    this.space = false
  }

  onKeyUp(e) {
    if (e.key === ' ') this.releaseSpace()
  }

  // -- to Python --
  draft(prompt, done) {
    this.prompts = {...this.prompts, [this.active]: prompt}
    if (!prompt) delete this.prompts[this.active]
    this.post({z: this.view.image.z, object: this.active, prompt, done})
    this.view.dirty()
  }

  /** Finished gestures are sent again until they are answered. */
  post(gesture) {
    const answered = this.model.get('answer')?.seq ?? 0
    this.seq = Math.max(this.seq, answered)+1
    this.started.set(this.seq, {t: performance.now(), done: gesture.done})
    if (this.started.size > 200) this.started.delete(this.started.keys().next().value)
    const waiting = this.queue.filter(g => g.done && g.seq > answered)
    this.queue = [...waiting, {seq: this.seq, case: this.view.image.case, ...gesture}]
    this.model.set('gestures', this.queue)
    this.model.save_changes()
  }

  close() {
    document.removeEventListener('focusin', keepSliderKeys)
  }
}

// ---- pictures, words, times ----
const BARS = [1000, 500, 200, 100, 50, 20, 10, 5, 2, 1, .5]   // round lengths of a scale bar
const GONE = 'The kernel behind this drawing has gone: run its cell again.'

/** What is seen and heard: slices, masks, prompts, the caption; and how long it took. */
class Painter {
  constructor(model, view, hand) {
    this.model = model
    this.view = view
    this.hand = hand
    this.base = null           // the slice, one pixel a pixel
    this.data = null           // its numbers
    this.shown = 0             // counts the images taken
    this.truth = []
    this.masks = []
    this.kept = {slice: '', scaled: '', picture: null}
    this.answered = undefined  // seq of the last answer, and when it came
    this.arrived = 0
    this.lost = false          // has the kernel gone?
    this.busy = addChild(view.root, 'progress', 'medsam-busy')
    this.caption = addChild(view.root, 'div', 'medsam-caption')
    this.spoken = addChild(view.root, 'div', 'medsam-spoken')
    this.label()
  }

  /** What screen readers say: the caption twice, once to see and once to hear. */
  label() {
    const made = Object.values(KINDS).map(kind => kind.made)
    const help = `Slice viewer. Enter makes ${made.slice(0, -1).join(', ')} or ${made.at(-1)}, arrows move it, `
      + 'Alt and arrows resize it, Shift takes bigger steps, Escape removes it, Page up and Page down change the slice.'
    this.view.canvas.setAttribute('role', 'application')
    this.view.canvas.setAttribute('data-lm-suppress-shortcuts', 'true')
    this.view.canvas.setAttribute('aria-label', help)
    this.busy.setAttribute('aria-label', 'preparing this slice')
    this.caption.setAttribute('aria-hidden', 'true')
    this.spoken.setAttribute('role', 'status')
    this.spoken.setAttribute('aria-live', 'polite')
  }

  // -- what Python says --
  leave() {
    this.masks = []
  }

  takeImage(image) {
    const {width, height} = image
    if (this.base?.width !== width || this.base?.height !== height) this.base = offscreen(width, height)
    this.data = values(image)
    this.truth = image.truth.map(({id, bits}) => ({id, path: null, bits: bytes(bits)}))
    this.shown += 1
  }

  takeAnswer(answer) {
    const {width, height} = this.view.image
    const picture = o => maskPicture(width, height, bytes(o.bits), this.object(o.id)?.colour ?? '#ff9500')
    this.masks = answer.panes.map(pane => pane.objects.map(o => ({...o, ...picture(o)})))
    if (this.answered !== answer.seq) this.arrived = performance.now()
    this.answered = answer.seq
  }

  lose() {
    this.lost = true
    this.view.dirty()
  }

  object(id) {
    return this.model.get('objects').find(o => o.id === id)
  }

  length([x0, y0, x1, y1]) {
    const {spacing: [row, col], unit} = this.view.image
    return `${short(Math.hypot((x1-x0)*col, (y1-y0)*row))} ${unit}`
  }

  // -- pictures --
  draw() {
    if (!this.view.image || !this.view.root.isConnected) return
    const ctx = this.blank()
    this.paintSlice()
    for (let pane = 0; pane < this.view.panes; pane++) this.drawPane(ctx, pane)
    this.say()
    this.measure()
  }

  get dpr() {
    return window.devicePixelRatio || 1
  }

  /** The canvas, black, with a pixel for each pixel of the screen. */
  blank() {
    const {canvas, size: [w, h]} = this.view
    const wide = Math.round(w*this.dpr)
    const high = Math.round(h*this.dpr)
    if (canvas.width !== wide || canvas.height !== high) {
      canvas.width = wide
      canvas.height = high
      canvas.style.height = `${h}px`
    }
    const ctx = canvas.getContext('2d')
    ctx.setTransform(this.dpr, 0, 0, this.dpr, 0, 0)
    ctx.fillStyle = '#000'
    ctx.fillRect(0, 0, w, h)
    return ctx
  }

  /** The slice through its window, painted again only if one of the two has changed. */
  paintSlice() {
    const limits = this.model.get('window')
    const key = [this.shown, ...limits].join()
    if (this.kept.slice === key) return
    this.kept.slice = key
    if (this.view.image.dtype === 'rgb') paintColour(this.base, this.data)
    else paintGrey(this.base, this.data, limits)
  }

  /** The slice as a pane shows it, kept while only prompts and masks change. */
  scaledSlice() {
    const {paneWidth, size, origin: [ox, oy], scale, aspect, image} = this.view
    const key = [paneWidth, size[1], this.dpr, ox, oy, scale, aspect, this.kept.slice].join()
    if (this.kept.scaled === key) return this.kept.picture
    const wide = Math.max(1, Math.round(paneWidth*this.dpr))
    const high = Math.max(1, Math.round(size[1]*this.dpr))
    const picture = offscreen(wide, high)
    const ctx = picture.getContext('2d')
    ctx.setTransform(wide/paneWidth, 0, 0, high/size[1], 0, 0)
    ctx.imageSmoothingQuality = 'high'
    ctx.drawImage(this.base, ox, oy, image.width*scale, image.height*scale*aspect)
    this.kept.scaled = key
    this.kept.picture = picture
    return picture
  }

  drawPane(ctx, pane) {
    const {paneWidth, size: [, h]} = this.view
    const left = pane*paneWidth
    const pen = this.pen(ctx, left)
    ctx.save()
    ctx.beginPath()
    ctx.rect(left, 0, paneWidth, h)
    ctx.clip()
    ctx.drawImage(this.scaledSlice(), left, 0, paneWidth, h)
    this.drawMasks(pen, this.masks[pane] ?? [])
    if (this.model.get('contour')) this.drawTruth(pen)
    this.drawPrompts(pen)
    this.drawBar(ctx, left+paneWidth)
    if (this.view.panes > 1) write(ctx, this.model.get('answer').panes[pane].name, left+8, 18)
    ctx.restore()
    if (pane) this.drawBorder(ctx, left)
  }

  /** What the drawing of prompts needs to know of a pane. */
  pen(ctx, left) {
    const {origin: [ox, oy], scale, aspect} = this.view
    const X = x => left+ox+x*scale
    const Y = y => oy+y*scale*aspect
    return {ctx, X, Y, length: line => this.length(line)}
  }

  drawMasks({ctx, X, Y}, masks) {
    const {scale, aspect} = this.view
    ctx.imageSmoothingQuality = 'high'
    ctx.globalAlpha = this.model.get('opacity')
    for (const {picture, part: [x, y, w, h]} of masks) {
      if (w && h) ctx.drawImage(picture, x, y, w, h, X(x), Y(y), w*scale, h*scale*aspect)
    }
    ctx.globalAlpha = 1
  }

  /** True outlines: of the active object, and of those that have a prompt. */
  drawTruth({ctx, X, Y}) {
    const {scale, aspect, image: {width, height}} = this.view
    const wanted = this.truth.filter(t => t.id === this.hand.active || this.hand.prompts[t.id])
    for (const t of wanted) {
      t.path ??= edges(width, height, t.bits)
      ctx.save()
      ctx.translate(X(0), Y(0))
      ctx.scale(scale, scale*aspect)
      ctx.lineWidth = 1.5/scale
      ctx.strokeStyle = '#fff'
      ctx.stroke(t.path)
      ctx.restore()
    }
  }

  drawPrompts(pen) {
    const {prompts, active, drag, ruler, tool} = this.hand
    for (const {id, colour} of this.model.get('objects')) {
      const prompt = prompts[id]
      if (prompt) KINDS[prompt.kind].draw(pen, prompt, colour, id === active)
    }
    KINDS[drag?.kind]?.trail?.(pen, drag.stroke, this.object(active)?.colour ?? YELLOW)
    if (ruler && tool === 'ruler') drawLine(pen, ruler, YELLOW)
  }

  /** A scale bar of a round length, bottom right. */
  drawBar(ctx, right) {
    const {size: [, h], image: {spacing, unit}, scale, paneWidth} = this.view
    const perPixel = spacing[1]/scale
    const length = BARS.find(v => v <= perPixel*paneWidth/5) ?? BARS.at(-1)
    const path = new Path2D()
    path.moveTo(right-12-length/perPixel, h-12)
    path.lineTo(right-12, h-12)
    stroke(ctx, path, '#fff', 2)
    write(ctx, `${length} ${unit}`, right-12, h-18, '11px sans-serif', 'right')
  }

  drawBorder(ctx, x) {
    ctx.fillStyle = '#888'
    ctx.fillRect(x, 0, 1, this.view.size[1])
  }

  // -- words --
  /** One line for everybody, read aloud by screen readers. */
  say() {
    const status = this.model.get('status')
    const text = this.lost ? GONE : [...this.words(), status].filter(Boolean).join(' · ')
    if (text !== this.caption.textContent) this.caption.textContent = text
    const moving = this.hand.drag   // nobody wants to hear every place of a box on its way
    if (!moving && text !== this.spoken.textContent) this.spoken.textContent = text
    this.busy.style.visibility = status.startsWith('preparing') ? 'visible' : 'hidden'
  }

  words() {
    const {active, ruler, tool, prompt, current} = this.hand
    const words = [`slice ${this.model.get('z')} (0 to ${this.model.get('depth')-1})`, this.object(active)?.name]
    if (ruler && tool === 'ruler') words.push(this.length(ruler))
    if (!prompt) return words
    words.push(KINDS[prompt.kind].say(prompt, line => this.length(line)))
    const scores = current ? this.scores() : ['…']   // scores of another prompt's mask would be believed
    return [...words, ...scores]
  }

  /** How good the active object's masks are, one for each pane that has one. */
  scores() {
    const {panes} = this.model.get('answer')
    const found = panes.map(({name, objects}) => ({name, mask: objects.find(m => m.id === this.hand.active)}))
    const title = name => panes.length > 1 ? `${name}: ` : ''
    return found.filter(({mask}) => mask).map(({name, mask}) => title(name)+this.score(mask))
  }

  score({iou, dsc, nsd}) {
    const words = []
    if (iou != null) words.push(`predicted IoU ${iou.toFixed(2)}`)
    if (dsc != null) words.push(`DSC ${dsc.toFixed(3)}`)
    if (nsd != null) words.push(`NSD ${nsd.toFixed(3)}`)
    return words.join(', ')
  }

  // -- times, for the benchmark: from the gesture to the frame that shows its answer --
  measure() {
    const {current, started} = this.hand
    for (const [seq, {t, done}] of started) {
      const early = done && current   // the mask of just this prompt is there, asked for by the last move
      if (seq > this.answered && !early) continue
      started.delete(seq)
      if (done && (seq === this.answered || current)) this.measureAnswer(seq, t)
    }
    this.measureSlice()
  }

  measureAnswer(seq, start) {
    const model_ms = this.model.get('answer').model_ms
    const prompt = Boolean(this.hand.prompt)
    afterFrame(end => {
      const detail = {seq, model_ms, prompt, paint_ms: end-this.arrived}
      performance.measure('medsam:answer', {start, end, detail})
    })
  }

  measureSlice() {
    const mark = `medsam:slice:${this.view.image.z}`
    const start = performance.getEntriesByName(mark).at(-1)?.startTime
    if (start === undefined) return
    performance.clearMarks(mark)
    afterFrame(end => performance.measure('medsam:slice', {start, end}))
  }
}

const afterFrame = f => setTimeout(() => f(performance.now()))

// ---- the widget ----
const LOOKS = ['opacity', 'active', 'tool', 'contour', 'status', 'z', 'height', 'window']

function render({model, el}) {
  el.classList.add('medsam-draw')
  const view = new View(model, el, () => painter.draw())
  const hand = new Hand(model, view)
  const painter = new Painter(model, view, hand)

  function onAnswer() {
    const answer = model.get('answer')
    if (!answer?.panes || answer.z !== view.image?.z) return
    painter.takeAnswer(answer)
    hand.takeAnswer(answer)
    view.dirty()
  }

  function onImage() {
    const image = model.get('image')
    if (!image?.width) return
    const another = view.show(image)
    if (another) hand.leave()
    if (another) painter.leave()
    painter.takeImage(image)
    onAnswer()
    view.dirty()
  }

  const handlers = {
    'change:image': onImage,
    'change:answer': onAnswer,
    'change:objects': onAnswer,   // their colours
    comm_live_update: () => painter.lose(),
  }
  for (const name of LOOKS) handlers[`change:${name}`] = () => view.dirty()
  for (const [name, f] of Object.entries(handlers)) model.on(name, f)
  onImage()
  el.medsam = {model, view, hand, painter}   // for tests and the curious

  return () => {
    for (const [name, f] of Object.entries(handlers)) model.off(name, f)
    hand.close()
    view.close()
  }
}

export default {render}
