// SPDX-License-Identifier: Apache-2.0

// The player of a recording. The server emulates the terminal and sends what its screen
// shows, a frame a line: see player.go. Nothing that comes from a recording becomes markup:
// it is put into text nodes, and colors have to look like colors.
'use strict';
(() => {
  const $ = (id) => document.getElementById(id);
  const player = $('player'), stage = $('stage'), screen = $('screen'), message = $('message');
  const toggle = $('toggle'), seek = $('seek'), clock = $('clock'), speed = $('speed'), skip = $('skip');
  const MAX_PAUSE = 1; // seconds that a pause lasts if pauses are skipped
  const AHEAD = 400; // frames that are read before they are due
  const AHEAD_SIZE = 4 << 20; // characters of frames that are read before they are due
  const PALETTE = ['#3b4048', '#e06c75', '#98c379', '#d9b66a', '#61a5ef', '#c678dd', '#56b6c2', '#c8ccd4',
    '#6b7280', '#ff8a92', '#b5e890', '#ffd98a', '#8fc1ff', '#e3a0f5', '#7fdfea', '#ffffff'];

  let length = Number(player.dataset.length) / 1000;
  let frames = []; // that are due later
  let waiting = 0; // characters of them
  let now = 0; // position in the recording, in seconds
  let playing = false, over = false, following = false;
  let request = null; // the running request
  let more = null; // lets the request read on
  let cursor = null, rows = [];

  const time = (s) => {
    s = Math.max(0, Math.floor(s));
    const two = (n) => String(n).padStart(2, '0');
    const m = Math.floor(s / 60);
    return m < 60 ? m + ':' + two(s % 60) : Math.floor(m / 60) + ':' + two(m % 60) + ':' + two(s % 60);
  };

  const color = (c) => /^#[0-9a-f]{6}$/.test(c) ? c : /^(\d|1[0-5])$/.test(c) ? PALETTE[c] : '';
  const CLASSES = [[1, 'bold'], [2, 'faint'], [4, 'italic'], [8, 'under'], [32, 'struck'], [64, 'e'], [128, 'w']];

  function drawRow(row, runs) {
    row.replaceChildren(...runs.map(([text, fg = '', bg = '', attributes = 0]) => {
      text = String(text);
      if (!fg && !bg && !attributes) return document.createTextNode(text);
      const span = document.createElement('span');
      span.textContent = text;
      let front = color(fg), back = color(bg);
      if (attributes & 16) [front, back] = [back || '#16181d', front || '#d7dae0'];
      if (front) span.style.color = front;
      if (back) span.style.backgroundColor = back;
      for (const [bit, name] of CLASSES) if (attributes & bit) span.classList.add(name);
      return span;
    }));
  }

  function show(frame) {
    if (frame.size) {
      rows = Array.from({ length: Math.min(frame.size[1], 200) }, () => document.createElement('div'));
      screen.replaceChildren(...rows);
      screen.style.minWidth = frame.size[0] + 'ch';
      fit(frame.size);
      return;
    }
    for (const y in frame.rows) if (rows[y]) drawRow(rows[y], frame.rows[y]);
    if (frame.note) message.textContent = frame.note;
    if (cursor) cursor.classList.remove('cursor');
    const [, y, visible] = frame.cursor || [0, 0, 0];
    cursor = visible && rows[y] && rows[y].lastElementChild;
    if (cursor) cursor.classList.add('cursor');
  }

  // fit makes the font as large as the screen of the terminal allows.
  let size = [80, 24];
  function fit(s) {
    size = s || size;
    screen.style.fontSize = '14px';
    const wide = (stage.clientWidth - 4) / (screen.offsetWidth || 1) * 14;
    const high = player.classList.contains('full') ? (stage.clientHeight - 4) / (screen.offsetHeight || 1) * 14 : 18;
    screen.style.fontSize = Math.max(7, Math.min(wide, high, 28)).toFixed(2) + 'px';
  }

  function tell(s) { message.textContent = s; }

  function update() {
    seek.max = Math.max(length, now).toFixed(1);
    seek.value = now;
    clock.value = time(now) + ' / ' + time(Math.max(length, now));
    toggle.textContent = playing ? 'Pause' : 'Play';
    toggle.setAttribute('aria-label', playing ? 'Pause' : 'Play');
    seek.setAttribute('aria-valuetext', clock.value);
  }

  // open asks for the recording from a position on.
  async function open(at) {
    if (request) request.abort();
    const mine = request = new AbortController();
    frames = [];
    waiting = 0;
    over = false;
    following = at === 'end';
    let first = true;
    tell('Loading…');
    try {
      const url = player.dataset.play + '?' + new URLSearchParams({ at });
      // Not in the URL, which is in logs.
      const headers = { Accept: 'application/x-ndjson;token=' + player.dataset.token };
      let answer;
      for (let tries = 0; ; tries++) {
        answer = await fetch(url, { headers, signal: mine.signal, credentials: 'omit' });
        if (answer.status !== 429 || tries === 5) break;
        await new Promise((resolve) => setTimeout(resolve, 500)); // the last request has not ended yet
        if (mine !== request) return;
      }
      if (!answer.ok) {
        tell('The server answers ' + answer.status + '. Load the page again.');
        playing = false;
        update();
        return;
      }
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = '';
      for (;;) {
        const { done, value } = await reader.read();
        if (mine !== request) return;
        if (done) break;
        const lines = (rest + value).split('\n');
        rest = lines.pop();
        for (const line of lines) {
          if (!line) continue;
          const frame = JSON.parse(line);
          if (frame.progress !== undefined) { tell('Skipping… ' + Math.round(frame.progress * 100) + ' %'); continue; }
          if (frame.live !== undefined) { tell('Live'); length = Math.max(length, frame.live); update(); continue; }
          if (frame.end !== undefined) { over = true; length = Math.max(frame.end, now); continue; }
          if (first && frame.rows) { first = false; now = frame.t; tell(following ? 'Live' : ''); }
          frame.length = line.length;
          waiting += line.length;
          frames.push(frame);
        }
        if (frames.length && (following || !playing)) drain(); // up to the position
        tick();
        while (tooMany() && mine === request) await new Promise((resolve) => { more = resolve; });
        if (mine !== request) return;
      }
      if (!over) stopped(mine, '');
    } catch (e) {
      stopped(mine, e.name);
    }
  }

  // stopped says that the server has ended the request before the recording was over.
  function stopped(mine, why) {
    if (mine !== request || why === 'AbortError') return;
    request = null;
    tell(following ? 'The server has ended this. Load the page again.' : 'The server has ended this. Play to go on.');
    playing = false;
    following = false;
    update();
  }

  const tooMany = () => frames.length > AHEAD || waiting > AHEAD_SIZE && frames.length > 1;

  // drain shows all frames that have come.
  function drain() {
    const upTo = following ? Infinity : now;
    while (frames.length && (frames[0].t === undefined || frames[0].t <= upTo)) {
      const frame = frames.shift();
      waiting -= frame.length;
      if (frame.t !== undefined) now = Math.max(now, frame.t);
      show(frame);
    }
    if (more && !tooMany()) { const go = more; more = null; go(); }
    update();
  }

  let last = 0, ticking = false;
  function tick(at) {
    if (at === undefined) {
      if (!ticking && playing) { ticking = true; last = performance.now(); requestAnimationFrame(tick); }
      return;
    }
    ticking = false;
    if (!playing || following) return;
    const passed = (at - last) / 1000 * Number(speed.value);
    last = at;
    if (frames.length) {
      const next = frames.find((f) => f.t !== undefined);
      now += passed;
      if (next && skip.checked && next.t - now > MAX_PAUSE) now = next.t - MAX_PAUSE;
    } else if (over) {
      now = Math.max(now, 0);
      playing = false;
      tell('The end');
      update();
      return;
    }
    drain();
    ticking = true;
    requestAnimationFrame(tick);
  }

  function play(on) {
    if (on && (over && !frames.length || !request)) { go(over ? 0 : now); }
    playing = on;
    if (!on) following = false;
    update();
    tick();
  }

  // go goes to a position.
  function go(at) {
    at = Math.max(0, Math.min(at, Math.max(length, now)));
    now = at;
    update();
    open(at.toFixed(3));
  }

  function live() {
    playing = true;
    update();
    open('end');
  }

  function full() {
    const on = player.classList.toggle('full');
    if (on && player.requestFullscreen) player.requestFullscreen().catch(() => {});
    if (!on && document.fullscreenElement) document.exitFullscreen();
    fit();
  }
  document.addEventListener('fullscreenchange', () => {
    if (!document.fullscreenElement) player.classList.remove('full');
    fit();
  });

  toggle.addEventListener('click', () => play(!playing));
  seek.addEventListener('change', () => go(Number(seek.value)));
  seek.addEventListener('input', () => { clock.value = time(seek.value) + ' / ' + time(length); });
  $('live').addEventListener('click', live);
  $('full').addEventListener('click', full);
  window.addEventListener('resize', () => fit());

  // Jump to text.
  const lines = $('lines'), find = $('find'), needle = $('needle'), hits = $('hits');
  let found = [], which = -1;
  function jump(line) {
    for (const l of found) l.classList.toggle('hit', l === line);
    line.classList.add('hit');
    line.scrollIntoView({ block: 'nearest' });
    go(Number(line.dataset.at) / 1000);
  }
  function search(text) {
    for (const l of found) l.classList.remove('hit');
    const lower = text.normalize('NFC').toLowerCase();
    found = lower && lines ? [...lines.children].filter((l) => l.textContent.toLowerCase().includes(lower)) : [];
    which = -1;
  }
  function next() {
    if (!found.length) { hits.textContent = needle.value ? 'not found' : ''; return; }
    which = (which + 1) % found.length;
    hits.textContent = (which + 1) + ' of ' + found.length;
    jump(found[which]);
  }
  if (lines) {
    lines.classList.add('ready');
    lines.addEventListener('click', (e) => {
      const line = e.target.closest('[data-at]');
      if (line && String(getSelection()) === '') jump(line);
    });
    find.hidden = false;
    needle.addEventListener('input', () => search(needle.value));
    find.addEventListener('submit', (e) => { e.preventDefault(); next(); });
  }

  document.addEventListener('keydown', (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || e.target.closest('input:not([type=range]), select')) return;
    const step = (by) => {
      const i = Math.max(0, Math.min(speed.options.length - 1, speed.selectedIndex + by));
      speed.selectedIndex = i;
    };
    const keys = {
      ' ': () => play(!playing), k: () => play(!playing), ArrowLeft: () => go(now - 5), ArrowRight: () => go(now + 5),
      Home: () => go(0), ',': () => step(-1), '.': () => step(1), f: full, '/': () => needle.focus(), n: next,
      Escape: () => { if (player.classList.contains('full')) full(); },
    };
    if (e.key === ' ' && e.target.closest('button, a')) return;
    if (!keys[e.key]) return;
    e.preventDefault();
    keys[e.key]();
  });

  player.hidden = false;
  update();
  if (player.dataset.live !== undefined) {
    live();
  } else if (player.dataset.find && lines) {
    needle.value = player.dataset.find;
    search(needle.value);
    next();
    if (!found.length) open('0');
  } else {
    open('0');
    play(!matchMedia('(prefers-reduced-motion: reduce)').matches);
  }
})();
