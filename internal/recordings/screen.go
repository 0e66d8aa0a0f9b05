// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"unicode/utf8"

	uv "github.com/charmbracelet/ultraviolet"
	"github.com/charmbracelet/x/ansi"
	"github.com/charmbracelet/x/vt"
)

// Bounds of a terminal. A session's client chooses the size, up to 65535 by 65535.
const (
	maxWidth, maxHeight = 400, 120
	// maxCell is how many bytes of characters are kept for a cell: a letter may be
	// followed by any number of combining characters.
	maxCell = 64
	// maxSequence is the length of the longest control sequence that is looked at.
	maxSequence = 128
	// piece is how many bytes are printed before the lines that have scrolled off the
	// screen are taken away, as is done before each control sequence. It has fewer lines
	// than scrolled.
	piece = 256
	// scrolled is how many lines that have scrolled off the screen are kept.
	scrolled = 256
)

// cell is what a cell takes with its characters and colors, in bytes, and screens how many
// screens a screen has: two emulators, with two each.
const (
	cell    = 176
	screens = 4
)

// memoryOf returns what a screen of that size takes at most, with what has scrolled off.
func memoryOf(width, height int) int64 {
	w, h := int64(clamp(width, maxWidth)), int64(clamp(height, maxHeight))
	return w*(screens*h+scrolled)*cell + 1<<20
}

// screenMemory is what the largest screen takes.
const screenMemory = maxWidth*(screens*maxHeight+scrolled)*cell + 1<<20

// screen is the screen of a terminal. It emulates what programs print.
//
// The emulator's library is not made for input that wants to harm it: it answers queries
// into a pipe that somebody has to read, keeps ten thousand lines of the alternate screen,
// repeats a character as often as it is told, and holds control strings of megabytes. So
// it gets only the sequences that are on the lists below. There is one emulator for each
// of the two screens.
type screen struct {
	main *vt.Emulator
	alt  *vt.Emulator // nil unless the alternate screen is on
	// spare is alt while that is off, nil if it never was on. Making one is expensive.
	spare *vt.Emulator
	// panics is how often the library has panicked.
	panics int
	// last is the cell that was printed to last, to which combining characters belong.
	last    uv.Position
	printed bool // last is set
	// full says that the last column was printed to, and that the next character goes to
	// the next line.
	full bool
	// pending is full after a wide character, of which the emulator does not know.
	pending bool
	// state and sequence are those of a control sequence whose end has not been printed.
	state    byte
	sequence []byte
	// noWrap says that the terminal does not wrap lines.
	noWrap bool
	// insert says that characters move what is behind them.
	insert bool
	// newlines says that a line feed returns to the first column as well, as there is no
	// terminal between the program and its reader that makes it so.
	newlines bool
	// onScroll is called with each line that scrolls off the main screen.
	onScroll func(uv.Line)
	// goOn is called after each piece. If it returns false, what is left is not drawn.
	goOn func() bool
	// credit is how many more times characters are repeated.
	credit int
}

// newScreen returns an empty screen.
func newScreen(width, height int) *screen {
	s := &screen{onScroll: func(uv.Line) {}, goOn: func() bool { return true }, credit: maxWidth * maxHeight}
	s.main = newEmulator(clamp(width, maxWidth), clamp(height, maxHeight))
	return s
}

func newEmulator(width, height int) *vt.Emulator {
	e := vt.NewEmulator(width, height)
	e.SetScrollbackSize(scrolled)
	return e
}

func clamp(n, limit int) int { return min(max(n, 1), limit) }

// emulator returns the emulator that draws.
func (s *screen) emulator() *vt.Emulator {
	if s.alt != nil {
		return s.alt
	}
	return s.main
}

// resize changes the size of the terminal.
func (s *screen) resize(width, height int) {
	width, height = clamp(width, maxWidth), clamp(height, maxHeight)
	s.guard(width, height, func() {
		s.moved()
		if s.alt != nil {
			s.alt.Resize(width, height)
		}
		// The library drops the lines at the bottom of a screen that becomes lower. Terminals
		// let those at the top scroll off, so that the cursor's line remains.
		if over := s.main.CursorPosition().Y - (height - 1); over > 0 {
			_, _ = fmt.Fprintf(s.main, "\x1b[%dS\x1b[%dA", over, over)
			s.scroll()
		}
		s.main.Resize(width, height)
	})
}

// guard calls f. If the library panics, as it does after some sequences that make no sense,
// what follows is drawn on an empty screen.
func (s *screen) guard(width, height int, f func()) {
	defer func() {
		if p := recover(); p != nil {
			s.panics++
			s.main, s.alt, s.spare = newEmulator(width, height), nil, nil
			s.state, s.sequence = ansi.NormalState, s.sequence[:0]
			s.noWrap, s.insert = false, false
			s.moved()
		}
	}()
	if s.panics < maxPanics { // somebody makes them happen
		f()
	}
}

// maxPanics is how often the library may panic.
const maxPanics = 100

// draw prints what a program wrote, which is valid UTF-8.
func (s *screen) draw(p []byte) {
	for len(p) > 0 {
		size := min(piece, len(p))
		// Whole characters, together with what combines with them.
		for size < len(p) && !ascii(p[size]) && (size < 2*piece || !utf8.RuneStart(p[size])) {
			size++
		}
		s.guard(s.main.Width(), s.main.Height(), func() {
			s.write(p[:size])
			s.scroll()
		})
		p = p[size:]
		s.credit = min(s.credit+creditPerByte*size, maxWidth*maxHeight)
		if !s.goOn() {
			return
		}
	}
}

// creditPerByte is how many repetitions a byte of output allows. Programs that fill lines
// with the help of repetitions need one for each cell, with at least four bytes a line.
const creditPerByte = 64

func ascii(b byte) bool { return b < utf8.RuneSelf }

// scroll takes away the lines that have scrolled off.
func (s *screen) scroll() {
	gone := s.main.Scrollback()
	if gone.Len() == 0 {
		return
	}
	for _, line := range gone.Lines() {
		s.onScroll(line)
	}
	gone.Clear()
}

func (s *screen) write(p []byte) {
	for len(p) > 0 {
		if s.state == ansi.NormalState {
			if n := plain(p); n > 0 {
				s.printPlain(p[:n])
				p = p[n:]
				continue
			}
		}
		sequence, width, n, state := ansi.DecodeSequence(p, s.state, nil)
		if n == 0 { // an invalid sequence, of which nothing is left
			n = 1
			sequence = nil
		}
		p = p[n:]
		whole := s.state == ansi.NormalState && state == ansi.NormalState
		s.state = state
		if whole {
			s.decoded(sequence, width)
			continue
		}
		if len(s.sequence) <= maxSequence {
			s.sequence = append(s.sequence, sequence...)
		}
		if state == ansi.NormalState {
			if len(s.sequence) <= maxSequence {
				s.control(s.sequence)
			}
			s.sequence = s.sequence[:0]
		}
	}
}

// plain returns how many of the characters at the start of p are ASCII and printable.
func plain(p []byte) int {
	for i, b := range p {
		if b < ' ' || b > '~' {
			return i
		}
	}
	return len(p)
}

// decoded handles a character or a control sequence.
func (s *screen) decoded(sequence []byte, width int) {
	switch r, _ := utf8.DecodeRune(sequence); {
	case len(sequence) == 0:
	case r < ' ' || r == 0x7f:
		s.control(sequence)
	case r <= 0x9f && r >= utf8.RuneSelf: // C1
	default:
		s.print(sequence[:min(len(sequence), wholeRunes(sequence))], width)
	}
}

// wholeRunes returns how many bytes of a character and what combines with it are kept.
func wholeRunes(p []byte) int {
	if len(p) <= maxCell {
		return len(p)
	}
	n := maxCell
	for n > 0 && !utf8.RuneStart(p[n]) {
		n--
	}
	return n
}

// nextLine goes to the start of the next line. The library does not know ESC E.
const nextLine = "\r\x1bD"

// wrap starts the next line, if the last one is full and the library does not know.
func (s *screen) wrap() {
	if s.pending {
		_, _ = s.emulator().WriteString(nextLine)
		s.full, s.pending = false, false
	}
}

// makeRoom moves the characters behind the cursor if the terminal inserts, which the
// library does not do.
func (s *screen) makeRoom(cells int) {
	if s.insert {
		_, _ = fmt.Fprintf(s.emulator(), "\x1b[%d@", min(cells, maxWidth))
	}
}

// printPlain prints ASCII characters.
func (s *screen) printPlain(p []byte) {
	e := s.emulator()
	s.wrap()
	at, width := e.CursorPosition().X, e.Width()
	if s.full {
		at = 0
	} else {
		s.makeRoom(len(p))
	}
	_, _ = e.Write(p)
	s.full = !s.noWrap && (at+len(p))%width == 0
	s.last, s.printed = e.CursorPosition(), true
	if !s.full && s.last.X > 0 && (!s.noWrap || s.last.X != width-1) {
		s.last.X--
	}
}

// print prints a character that is not ASCII.
func (s *screen) print(character []byte, width int) {
	e := s.emulator()
	if width <= 0 {
		s.combine(character)
		return
	}
	s.wrap()
	at := e.CursorPosition()
	last := e.Width() - 1
	if width == 2 && at.X == last && !s.noWrap && last > 0 {
		// It has no room on this line, whether or not that is full.
		_, _ = e.WriteString(nextLine)
		s.full = false
		at = e.CursorPosition()
	}
	if s.full {
		at.X = 0
	} else {
		s.makeRoom(width)
	}
	_, _ = e.Write(character)
	s.last, s.printed = uv.Pos(at.X, e.CursorPosition().Y), true
	end := at.X + width - 1
	s.full = !s.noWrap && end >= last
	s.pending = s.full && width == 2
}

// combine adds a character without a width to the one that was printed last.
func (s *screen) combine(character []byte) {
	e := s.emulator()
	cell := e.CellAt(s.last.X, s.last.Y)
	if !s.printed || cell == nil || cell.Content == "" || len(cell.Content)+len(character) > maxCell {
		return
	}
	combined := *cell
	combined.Content += string(character)
	e.SetCell(s.last.X, s.last.Y, &combined)
}

// The control characters and sequences that the emulator gets. Others ask the terminal for
// something, tell its window something, or are unknown.
const (
	controls = "\b\t\n\v\f\r\x0e\x0f"
	// escapes are those of ESC and one character.
	escapes = "78DEHMc=>no|}~"
	// designates are those of ESC, one of these, and one character: character sets.
	designates = "()*+"
	// csi are the last characters of sequences without a prefix, private those with one.
	csi     = "@ABCDEFGHIJKLMPSTXZ`abdefgmrsu"
	private = "JK"
)

// The modes that can be set.
const (
	insertMode  = 4
	newlineMode = 20
)

var privateModes = []int{6, 7, 25, 69}

// control handles a control character or sequence.
func (s *screen) control(sequence []byte) {
	// It may scroll as many lines as the screen has, or clear those that have scrolled off.
	s.scroll()
	first := sequence[0]
	if len(sequence) == 1 {
		if bytes.IndexByte([]byte(controls), first) >= 0 {
			s.moved()
			if first == '\n' && s.newlines {
				_, _ = s.emulator().WriteString("\r")
			}
			_, _ = s.emulator().Write(sequence)
		}
		return
	}
	if first != 0x1b {
		return // C1, or a string that was cut off
	}
	last := sequence[len(sequence)-1]
	switch {
	case sequence[1] == '[':
		s.csi(sequence, last)
	case len(sequence) == 2 && bytes.IndexByte([]byte(escapes), last) >= 0:
		if last == 'c' { // reset
			s.setAlternate(false)
			s.noWrap, s.insert = false, false
		}
		s.moved()
		if last == 'E' {
			sequence = []byte(nextLine)
		}
		_, _ = s.emulator().Write(sequence)
	case len(sequence) == 3 && bytes.IndexByte([]byte(designates), sequence[1]) >= 0:
		_, _ = s.emulator().Write(sequence)
	}
}

// moved notes that the cursor may be somewhere else.
func (s *screen) moved() { s.full, s.pending, s.printed = false, false, false }

// csi handles a sequence that begins with CSI.
func (s *screen) csi(sequence []byte, last byte) {
	parameters := sequence[2 : len(sequence)-1]
	prefix := byte(0)
	if len(parameters) > 0 && parameters[0] >= '<' && parameters[0] <= '?' {
		prefix, parameters = parameters[0], parameters[1:]
	}
	if !numbers(parameters) {
		return // there are intermediate characters
	}
	switch {
	case last == 'm' && prefix == 0: // colors
		_, _ = s.emulator().Write(sequence)
	case last == 'h' || last == 'l':
		for mode := range bytes.SplitSeq(parameters, []byte(";")) {
			if n, err := strconv.Atoi(string(mode)); err == nil {
				s.setMode(prefix, n, last)
			}
		}
	case last == 'b' && prefix == 0:
		s.repeat(parameters)
	case prefix == 0 && bytes.IndexByte([]byte(csi), last) >= 0, prefix == '?' && bytes.IndexByte([]byte(private), last) >= 0:
		s.moved()
		_, _ = s.emulator().Write(sequence)
	}
}

// numbers reports whether p has digits and separators only.
func numbers(p []byte) bool {
	return !bytes.ContainsFunc(p, func(r rune) bool { return (r < '0' || r > '9') && r != ';' && r != ':' })
}

// repeat repeats the last character, at most once for each cell, and no more often than
// programs do that draw something with it.
func (s *screen) repeat(times []byte) {
	n, err := strconv.Atoi(string(times))
	if len(times) == 0 {
		n, err = 1, nil
	}
	cell := s.emulator().CellAt(s.last.X, s.last.Y)
	if err != nil && len(times) > 6 {
		n, err = maxWidth*maxHeight, nil // it is a number too large
	}
	if err != nil || !s.printed || cell == nil || cell.Content == "" {
		return
	}
	content := []byte(cell.Content)
	n = min(n, s.emulator().Width()*s.emulator().Height(), s.credit)
	s.credit -= max(n, 0)
	for range n {
		if len(content) == 1 {
			s.printPlain(content)
		} else {
			s.print(content, cell.Width)
		}
	}
}

// setMode sets or resets a mode.
func (s *screen) setMode(prefix byte, mode int, set byte) {
	if prefix == 0 {
		switch mode {
		case insertMode:
			s.insert = set == 'h'
		case newlineMode:
			s.newlines = set == 'h'
		}
		return
	}
	if prefix != '?' {
		return
	}
	switch mode {
	case 47, 1047, 1049:
		s.moved()
		s.setAlternate(set == 'h')
		return
	case 1048:
		s.moved()
		_, _ = s.emulator().WriteString(map[byte]string{'h': "\x1b7", 'l': "\x1b8"}[set])
		return
	case 7:
		s.noWrap = set == 'l'
	}
	if !slices.Contains(privateModes, mode) {
		return
	}
	if mode != 25 {
		s.moved()
	}
	// They are modes of the terminal, not of one of its screens.
	_, _ = fmt.Fprintf(s.main, "\x1b[?%d%c", mode, set)
	if s.alt != nil {
		_, _ = fmt.Fprintf(s.alt, "\x1b[?%d%c", mode, set)
	}
}

// setAlternate turns the alternate screen on or off.
func (s *screen) setAlternate(on bool) {
	if on == (s.alt != nil) {
		return
	}
	if !on {
		s.alt, s.spare = nil, s.alt
		return
	}
	if s.alt = s.spare; s.alt == nil {
		s.alt = newEmulator(s.main.Width(), s.main.Height())
		s.alt.SetScrollbackSize(1)
	} else {
		_, _ = s.alt.WriteString("\x1bc")
		if s.alt.Width() != s.main.Width() || s.alt.Height() != s.main.Height() {
			s.alt.Resize(s.main.Width(), s.main.Height())
		}
	}
	if s.noWrap {
		_, _ = s.alt.WriteString("\x1b[?7l")
	}
	if s.main.CursorHidden() {
		_, _ = s.alt.WriteString("\x1b[?25l")
	}
}

// line returns a line of the screen.
func (s *screen) line(y int) uv.Line {
	e := s.emulator()
	line := make(uv.Line, e.Width())
	for x := range line {
		if cell := e.CellAt(x, y); cell != nil {
			line[x] = *cell
		}
	}
	return line
}

// text returns the text of a line, without the blanks at its end.
func text(line uv.Line) string {
	b := make([]byte, 0, len(line))
	for i := range line {
		switch cell := &line[i]; {
		case cell.Content != "":
			b = append(b, cell.Content...)
		case i > 0 && line[i-1].Width == 2: // its second half
		default:
			b = append(b, ' ')
		}
	}
	return string(bytes.TrimRight(b, " "))
}
