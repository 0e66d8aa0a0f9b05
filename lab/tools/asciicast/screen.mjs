// SPDX-License-Identifier: Apache-2.0

// Prints, as JSON, the size of the terminal at the start of an asciicast recording
// and the lines that are on it at the end. The recording is read, and the terminal
// emulated, by load-asciicast.

import { readFileSync } from 'node:fs';
import asciicast from 'load-asciicast';

const cast = asciicast.load(readFileSync(process.argv[2], 'utf8'));
const [, last] = cast.frames[cast.frames.length - 1];
const lines = last.screen.lines.map((line) => line.map(([code]) => String.fromCodePoint(code)).join('').trimEnd());
while (lines.length > 0 && lines[lines.length - 1] === '') {
  lines.pop();
}
console.log(JSON.stringify({ version: cast.version, width: cast.width, height: cast.height, lines }));
