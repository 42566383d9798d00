// A list of rows, each with a switch, perhaps a strength, and more behind a button; edited in place, without the server.
// `props.value` is the list; `props.spec` says what a row has. Whatever comes from a file is set as text, never as HTML.

const spec = () => props.spec;
let rows = [];

function make(tag, attributes, ...inside) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (typeof value === 'boolean') node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...inside);
  return node;
}

function keep() { props.value = rows.map((row) => ({ ...row })); }

// Rows that came, went or moved: others who show them want to know.
function relist() { keep(); draw(); trigger('listed', { names: rows.map((row) => row.name) }); }

function slider(row, field) {
  const of = `${field.label} of ${row.name}`;
  const bounds = { min: field.min, max: field.max, step: field.step, title: field.info ?? '' };
  const range = make('input', { type: 'range', 'aria-label': of, ...bounds });
  const number = make('input', { type: 'number', 'aria-label': `number for ${of}`, ...bounds });
  const fill = () => range.style.setProperty('--share', `${(range.value - field.min) / (field.max - field.min) * 100}%`);
  const show = () => { range.value = row[field.key]; number.value = row[field.key]; fill(); };
  const set = (text) => {
    const value = Number(text);
    row[field.key] = text === '' || Number.isNaN(value) ? row[field.key] : Math.min(field.max, Math.max(field.min, value));
    keep();
  };
  range.addEventListener('input', () => { set(range.value); number.value = row[field.key]; fill(); });
  number.addEventListener('change', () => { set(number.value); show(); });
  show();
  return make('div', { class: 'pair' }, range, number);
}

function control(row, field) {
  if (field.type === 'range') return slider(row, field);
  const label = { 'aria-label': `${field.label} of ${row.name}`, title: field.info ?? '' };
  if (field.type === 'choice') {
    const choices = field.choices.some(([, value]) => value === row[field.key]) ? field.choices
      : [...field.choices, [`${row[field.key]} (gone)`, row[field.key]]];
    const options = choices.map(([text, value]) => make('option', { value, selected: value === row[field.key] }, text));
    return make('select', { ...label, onchange: (e) => { row[field.key] = e.target.value; keep(); } }, ...options);
  }
  const area = make('textarea', { ...label, rows: '2', maxlength: '4000', placeholder: field.placeholder ?? '' });
  area.value = row[field.key];
  area.addEventListener('input', () => { row[field.key] = area.value; keep(); });
  return area;
}

function button(sign, title, onclick, more = {}) {
  return make('button', { type: 'button', class: 'sign', title, 'aria-label': title, onclick, ...more }, sign);
}

function say(word) {  // put a word into the prompt where the cursor is
  const prompt = document.querySelector('#prompt textarea');
  const [before, after] = [prompt.value.slice(0, prompt.selectionStart), prompt.value.slice(prompt.selectionEnd)];
  const gap = before && !/\s$/.test(before) ? ' ' : '';
  prompt.setRangeText(gap + word + (after && !/^[\s,.]/.test(after) ? ' ' : ''), before.length, prompt.selectionEnd, 'end');
  prompt.dispatchEvent(new Event('input', { bubbles: true }));
}

function head(row, i) {
  const move = (to) => { rows.splice(to, 0, ...rows.splice(i, 1)); relist(); };
  const flip = make('input', { type: 'checkbox', checked: row.on, 'aria-label': `Use ${row.name}`, title: 'Use it, or leave it out' });
  flip.addEventListener('change', () => { row.on = flip.checked; keep(); flip.closest('.entry').classList.toggle('off', !row.on); });
  const name = make('span', { class: 'name', title: row.name }, row.name);
  const kind = row.kind ? [make('span', { class: 'kind' }, row.kind)] : [];
  const signs = [
    button('↑', `Move ${row.name} up`, () => move(i - 1), { disabled: i === 0 }),
    button('↓', `Move ${row.name} down`, () => move(i + 1), { disabled: i === rows.length - 1 }),
    button('⋯', `More of ${row.name}`, () => { row.more = !row.more; keep(); draw(); }, { 'aria-expanded': String(row.more) }),
    button('✕', `Remove ${row.name}`, () => { rows.splice(i, 1); relist(); }),
  ];
  return make('div', { class: 'head' }, flip, name, ...kind, make('span', { class: 'signs' }, ...signs));
}

function entry(row, i) {
  const node = make('div', { class: row.on ? 'entry' : 'entry off' }, head(row, i));
  const body = make('div', { class: 'body' });
  if (row.thumb && row.thumb.startsWith('data:image/')) body.append(make('img', { src: row.thumb, alt: '' }));
  if (spec().main) body.append(control(row, spec().main));
  if (body.childNodes.length) node.append(body);
  if (row.words && row.words.length) {
    const words = row.words.map((word) => make('button', { type: 'button', class: 'word', title: 'Put this word into the prompt', onclick: () => say(word) }, word));
    node.append(make('div', { class: 'words' }, make('span', {}, 'Words:'), ...words));
  }
  if (row.more) {
    const fields = spec().more.filter((field) => !(field.unless && row[field.unless]));
    node.append(make('div', { class: 'more' }, ...fields.map((field) =>
      make('label', { class: field.type }, make('span', { title: field.info ?? '' }, field.label), control(row, field)))));
  }
  return node;
}

function draw() {
  const empty = rows.length ? [] : [make('p', { class: 'empty' }, spec().empty)];
  element.querySelector('.rows').replaceChildren(...empty, ...rows.map(entry));
}

function refresh() { rows = (props.value || []).map((row) => ({ ...row })); draw(); }
watch(['value', 'spec'], refresh);
refresh();
