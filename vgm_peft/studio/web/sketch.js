// A place of a picture, shown by hand: a box that is dragged, or strokes of a brush. `props.value` is what was shown:
// {box: [left, top, right, bottom] as shares of the picture or null, mask: a PNG as a data URL or ''}.

const [canvas, strokes] = [element.querySelector('canvas'), document.createElement('canvas')];
const [pen, ink] = [canvas.getContext('2d'), strokes.getContext('2d')];
const backdrop = new Image();
const size = element.querySelector('input[type=range]');
const LONGEST = 512;
let box = null, painted = false, from = null, tool = props.scene.tools[0];

function accent() { return getComputedStyle(element).getPropertyValue('--color-accent') || '#0d9488'; }

function resize() {
  const [w, h] = backdrop.naturalWidth ? [backdrop.naturalWidth, backdrop.naturalHeight] : [LONGEST, LONGEST];
  const scale = LONGEST / Math.max(w, h);
  const kept = painted ? strokes.toDataURL() : '';
  for (const each of [canvas, strokes]) { each.width = Math.round(w * scale); each.height = Math.round(h * scale); }
  if (!kept) return draw();
  const old = new Image();
  old.onload = () => { ink.drawImage(old, 0, 0, strokes.width, strokes.height); draw(); };
  old.src = kept;
}

function draw() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (backdrop.naturalWidth) pen.drawImage(backdrop, 0, 0, canvas.width, canvas.height);
  pen.globalAlpha = 0.5;
  if (painted) pen.drawImage(strokes, 0, 0);
  pen.globalAlpha = 1;
  if (!box) return;
  const [x, y, w, h] = [box[0] * canvas.width, box[1] * canvas.height, (box[2] - box[0]) * canvas.width, (box[3] - box[1]) * canvas.height];
  pen.fillStyle = pen.strokeStyle = accent();
  pen.globalAlpha = 0.3; pen.fillRect(x, y, w, h);
  pen.globalAlpha = 1; pen.lineWidth = 3; pen.strokeRect(x, y, w, h);
}

function mask() {  // white where it was painted, black elsewhere
  if (!painted) return '';
  const flat = document.createElement('canvas');
  [flat.width, flat.height] = [strokes.width, strokes.height];
  const on = flat.getContext('2d');
  on.drawImage(strokes, 0, 0);
  on.globalCompositeOperation = 'source-in'; on.fillStyle = '#fff'; on.fillRect(0, 0, flat.width, flat.height);
  on.globalCompositeOperation = 'destination-over'; on.fillStyle = '#000'; on.fillRect(0, 0, flat.width, flat.height);
  return flat.toDataURL('image/png');
}

function unmask(url) {  // paint where a mask is white, as if by hand
  const white = new Image();
  white.onload = () => {
    clear();
    ink.drawImage(white, 0, 0, strokes.width, strokes.height);
    const pixels = ink.getImageData(0, 0, strokes.width, strokes.height);
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i];
    ink.putImageData(pixels, 0, 0);
    ink.globalCompositeOperation = 'source-in'; ink.fillStyle = accent(); ink.fillRect(0, 0, strokes.width, strokes.height);
    ink.globalCompositeOperation = 'source-over';
    painted = true;
    draw();
  };
  white.src = url;
}

function tell() { props.value = { box, mask: mask() }; showNumbers(); }

function showNumbers() {
  element.querySelectorAll('.numbers input').forEach((field, i) => { field.value = box ? Math.round(box[i] * 100) : ''; });
}

function at(event) {
  const r = canvas.getBoundingClientRect();
  return [(event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height].map((v) => Math.min(1, Math.max(0, v)));
}

function stroke(a, b) {
  ink.strokeStyle = accent(); ink.lineCap = 'round'; ink.lineJoin = 'round'; ink.lineWidth = Number(size.value) / 100 * canvas.width;
  ink.beginPath(); ink.moveTo(a[0] * canvas.width, a[1] * canvas.height); ink.lineTo(b[0] * canvas.width + 0.01, b[1] * canvas.height); ink.stroke();
}

function clear() { box = null; painted = false; ink.clearRect(0, 0, strokes.width, strokes.height); draw(); }

canvas.addEventListener('pointerdown', (event) => {
  canvas.setPointerCapture(event.pointerId);
  from = at(event);
  if (tool === 'brush') { box = null; painted = true; stroke(from, from); draw(); } else clear();
});
canvas.addEventListener('pointermove', (event) => {
  if (!from) return;
  const to = at(event);
  if (tool === 'brush') { stroke(from, to); from = to; }
  else box = [Math.min(from[0], to[0]), Math.min(from[1], to[1]), Math.max(from[0], to[0]), Math.max(from[1], to[1])].map((v) => Math.round(v * 100) / 100);
  draw();
});
const lift = () => {
  if (!from) return;
  from = null;
  if (box && (box[2] - box[0] < 0.02 || box[3] - box[1] < 0.02)) { box = null; draw(); }
  tell();
};
canvas.addEventListener('pointerup', lift);
canvas.addEventListener('pointercancel', lift);
element.querySelector('.clear').addEventListener('click', () => { clear(); tell(); });
element.querySelectorAll('.tool').forEach((button) => button.addEventListener('click', () => choose(button.dataset.tool)));
element.querySelectorAll('.numbers input').forEach((field, i) => field.addEventListener('change', () => {
  const next = [...(box ?? [0, 0, 1, 1])];
  next[i] = Math.min(1, Math.max(0, Number(field.value) / 100));
  clear();
  box = next[0] < next[2] && next[1] < next[3] ? next : null;
  draw(); tell();
}));

function choose(name) {
  tool = name;
  element.querySelectorAll('.tool').forEach((b) => { b.hidden = props.scene.tools.length < 2; b.setAttribute('aria-pressed', String(b.dataset.tool === name)); });
  element.querySelector('.width').hidden = tool !== 'brush';
  element.querySelector('.numbers').hidden = tool !== 'box';
}

function show() { if (props.scene.backdrop) backdrop.src = props.scene.backdrop; else { backdrop.removeAttribute('src'); resize(); } }
backdrop.onload = resize;
watch('scene', show);
watch('value', () => {
  if (props.value.mask) return unmask(props.value.mask);
  clear();
  box = props.value.box;
  draw(); showNumbers();
});
choose(tool); show(); resize();
