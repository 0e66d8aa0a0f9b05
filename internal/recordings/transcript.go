// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"slices"
	"strings"
	"time"

	uv "github.com/charmbracelet/ultraviolet"
	"golang.org/x/text/unicode/norm"
)

// Bounds of a transcript.
const (
	// maxPrinted is how many bytes of a session's output are drawn to find out which text
	// they put on its screen.
	maxPrinted = 16 << 20
	// maxText is how many bytes of text that appeared are kept.
	maxText = 4 << 20
	// lineCost is what a line counts as besides its text, so that short ones are bounded as
	// well.
	lineCost = 64
	// maxJoined is how long a line gets that goes on in further lines of the screen.
	maxJoined = 16 << 10
	// maxDistinct is how many distinct lines of full-screen programs are kept.
	maxDistinct = 1 << 16
	// maxDrawing is how long the text of a recording is looked for. A session that prints
	// 16 MiB takes a few seconds, unless it is made to take long.
	maxDrawing = time.Minute
)

const (
	// glance is how long a line has to be seen to have appeared, unless it scrolls off.
	glance = 250 * time.Millisecond
	// burst is how many bytes are printed at most between two looks at the screen.
	burst = 4 << 10
)

// line is text that appeared on a screen, and when.
type line struct {
	at   time.Duration
	text string
}

// transcript is the text that appeared on the screen of a session.
type transcript struct {
	lines []line
	// cut says that there was more.
	cut bool
	// length is the time of the last event.
	length time.Duration
	size   int
}

// add appends a line. A line that fills the whole width goes on in the next one.
func (t *transcript) add(l line, goesOn bool) {
	l.text = norm.NFC.String(l.text) // so that é is é however it was written
	joined := goesOn && len(t.lines) > 0 && len(t.lines[len(t.lines)-1].text)+len(l.text) <= maxJoined
	cost := len(l.text)
	if !joined {
		cost += lineCost
	}
	if t.size+cost > maxText {
		t.cut = true
		return
	}
	t.size += cost
	if joined {
		t.lines[len(t.lines)-1].text += l.text
		return
	}
	t.lines = append(t.lines, l)
}

// String returns the text.
func (t *transcript) String() string {
	var out strings.Builder
	for _, l := range t.lines {
		out.WriteString(l.text + "\n")
	}
	return out.String()
}

// watcher makes a transcript of what a screen shows.
//
// Text leaves a screen in two ways. It scrolls off, and is then noted with the time at which
// it was seen first. Or something else is drawn in its place, as full-screen programs do: it
// is then noted if it was there for a glance. Such programs draw the same lines again and
// again, which are noted once.
type watcher struct {
	transcript
	screen *screen
	// seen is the text on the screen at the last look, and when each line of it appeared.
	seen map[string]time.Duration
	// order is that of the lines of seen.
	order []string
	// scrolled is what has scrolled off since.
	scrolled []string
	full     bool // the line noted last fills the width
	alt      bool // seen is of the alternate screen
	distinct map[uint64]struct{}
	seed     maphash.Seed
	now      time.Duration
	unseen   int // bytes printed since the last look
	dirty    bool
}

func newWatcher(width, height int) *watcher {
	w := &watcher{screen: newScreen(width, height), distinct: make(map[uint64]struct{}), seed: maphash.MakeSeed()}
	w.screen.onScroll = w.scrolledOff
	return w
}

// scrolledOff notes a line that has scrolled off.
func (w *watcher) scrolledOff(l uv.Line) {
	t := text(l)
	at, ok := w.seen[t]
	if !ok || w.alt {
		at = w.now
	}
	w.add(line{at, t}, w.full)
	w.full = fills(l, w.screen.main.Width())
	if len(w.scrolled) < scrolled {
		w.scrolled = append(w.scrolled, t)
	}
}

// fills reports whether the line is as wide as the screen.
func fills(l uv.Line, width int) bool {
	if len(l) < width {
		return false
	}
	last := &l[width-1]
	return last.Content != " " && (last.Content != "" || width > 1 && l[width-2].Width == 2)
}

// event follows an event of the recording.
func (w *watcher) event(e event) {
	if e.at > w.now+glance && w.dirty {
		w.look()
	}
	w.now = max(w.now, e.at)
	w.length = w.now
	switch e.kind {
	case 'r':
		w.look()
		if width, height, ok := e.size(); ok {
			w.screen.resize(width, height)
		}
	case 'o':
		for p := e.data; len(p) > 0 && w.screen.goOn(); {
			n := min(len(p), burst)
			w.screen.draw(p[:n])
			p = p[n:]
			w.dirty = true
			if w.unseen += n; w.unseen >= burst || (w.screen.alt != nil) != w.alt {
				w.look()
			}
		}
	}
}

// look notes what has left the screen since the last look.
func (w *watcher) look() {
	w.dirty, w.unseen = false, 0
	now := make(map[string]time.Duration)
	var order []string
	for y := range w.screen.emulator().Height() {
		t := text(w.screen.line(y))
		if _, twice := now[t]; t == "" || twice {
			continue
		}
		at, ok := w.seen[t]
		if !ok {
			at = w.now
		}
		now[t] = at
		order = append(order, t)
	}
	// What was typed makes lines longer, and what scrolls off is noted already.
	isIn := func(lines []string, t string) bool {
		return slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, t) })
	}
	alt := w.screen.alt != nil
	if alt && !w.alt {
		// The main screen comes back as it is.
		w.seen, w.order = nil, nil
	}
	for _, t := range w.order {
		if !isIn(order, t) && !isIn(w.scrolled, t) {
			w.once(line{w.seen[t], t})
		}
	}
	w.seen, w.order, w.scrolled, w.alt = now, order, w.scrolled[:0], alt
}

// once notes a line that may have been noted before.
func (w *watcher) once(l line) {
	sum := maphash.String(w.seed, l.text)
	if _, known := w.distinct[sum]; known {
		return
	}
	if len(w.distinct) >= maxDistinct {
		w.cut = true
		return
	}
	w.distinct[sum] = struct{}{}
	w.add(l, false)
}

// finish notes what is on the screens at the end.
func (w *watcher) finish() {
	w.look()
	if w.alt { // a full-screen program is running, in front of what was printed before
		main := w.screen.alt
		w.screen.alt = nil
		w.lastScreen(nil)
		w.screen.alt = main
	}
	w.lastScreen(w.seen)
}

func (w *watcher) lastScreen(seen map[string]time.Duration) {
	w.full = w.full && w.screen.alt == nil
	for y := range w.screen.emulator().Height() {
		l := w.screen.line(y)
		t := text(l)
		if t == "" {
			w.full = false
			continue
		}
		at, ok := seen[t]
		if !ok {
			at = w.now
		}
		w.add(line{at, t}, w.full)
		w.full = fills(l, len(l))
	}
}

// maxExamined is how many bytes of a recording are read to know its length.
const maxExamined = 256 << 20

// transcribe reads the rest of a recording and returns the text that appeared on its
// screen. Of a long one, and of one that takes long to draw, it is that of the start.
func transcribe(ctx context.Context, c *cast) (*transcript, error) {
	return transcribeFor(ctx, c, bounds{maxDrawing, func(int64) error { return nil }})
}

// bounds are those of making a transcript.
type bounds struct {
	// most is how long it may draw.
	most time.Duration
	// grow counts what it holds, in all. The error ends it.
	grow func(bytes int64) error
}

// transcriptMemory is what a transcript holds at most besides its screen and the lines of the
// recording: its text, and what it has seen already.
const transcriptMemory = 3 * maxText

// transcribeFor is transcribe within bounds.
func transcribeFor(ctx context.Context, c *cast, within bounds) (*transcript, error) {
	screen := memoryOf(c.header.Width, c.header.Height)
	if err := within.grow(transcriptMemory + screen + c.held()); err != nil {
		return nil, err
	}
	w := newWatcher(c.header.Width, c.header.Height)
	work := worker{ctx: ctx, most: within.most}
	w.screen.goOn = work.goOn
	printed, first, slow := 0, true, false
	for ctx.Err() == nil {
		e, err := c.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("reading the recording: %w", err)
		}
		if c.read > maxExamined {
			w.cut = true
			break
		}
		if printed > maxPrinted || slow {
			w.cut = true
			w.length = max(w.length, e.at)
			continue
		}
		if width, height, ok := e.size(); ok && e.kind == 'r' {
			screen = max(screen, memoryOf(width, height))
		}
		if err := within.grow(transcriptMemory + screen + c.held()); err != nil {
			return nil, err
		}
		if e.kind == 'o' {
			printed += len(e.data)
			if first {
				w.screen.newlines, first = withoutTerminal(e.data), false
			}
		}
		slow = errors.Is(work.do(func() { w.event(e) }), errTooSlow)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	length := w.length
	w.finish()
	w.length = length
	return &w.transcript, nil
}

// withoutTerminal reports whether output is that of a program that has no terminal, judged
// by its start: a terminal in the pod puts a carriage return before each line feed.
func withoutTerminal(output []byte) bool {
	return slices.Contains(output, '\n') && !slices.Contains(output, '\r') && !slices.Contains(output, 0x1b)
}
