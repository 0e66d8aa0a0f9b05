// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

const (
	// frameTime is the time between two frames. Most screens show 60 a second.
	frameTime = time.Second / 30
	// pollInterval is how often a running recording is read again at its end.
	pollInterval = 300 * time.Millisecond
	// silence is how long a player that follows a session is sent nothing. A connection
	// whose client is gone is noticed then.
	silence = 10 * time.Second
	// progressEvery is how many bytes are skipped between two messages about that.
	progressEvery = 1 << 20
	// abandoned is the age from which on a recording that is not complete is one that was
	// cut off: whoever writes one marks it every ten minutes.
	abandoned = 12 * time.Minute
)

// toEnd is the position of a player that follows a running session.
const toEnd = time.Duration(math.MaxInt64)

// running reports whether the session of a recording goes on.
func running(e recstore.Entry) bool { return !e.Complete && time.Since(e.Modified) < abandoned }

// player sends what the screen of a recording showed, as lines of JSON:
//
//	{"size":[80,24]}                             the size of the terminal, before anything else
//	{"t":1.5,"rows":{"0":[["text"]]},"cursor":…} a frame: the rows that have changed
//	{"t":1.5,"note":"text"}                      a marker of the recording
//	{"progress":0.5}                             the part that was skipped to get to the start
//	{"live":1.5}                                 all that a running session has printed was sent
//	{"end":1.5}                                  the recording is over
type player struct {
	store recstore.Store
	id    string
	// out is flushed after each frame.
	out   io.Writer
	flush func() error
	// grow counts what the player holds, in all. The error ends it.
	grow func(bytes int64) error

	work   worker
	cast   *cast
	entry  recstore.Entry
	screen *screen
	at     time.Duration
	rows   [][]byte // as sent
	cursor string   // as sent
	buffer []byte
	// pending says that the screen has changed since the frame at framed.
	pending bool
	framed  time.Duration
	// memory is what the largest screen takes.
	memory int64
	first  bool // nothing has been printed
}

// play plays the recording from start on, until its end or until ctx is done.
func (p *player) play(ctx context.Context, start time.Duration) error {
	r, entry, err := p.store.Open(ctx, p.id)
	if err != nil {
		return err
	}
	defer r.Close()
	p.entry, p.first, p.work = entry, true, worker{ctx: ctx}
	for {
		if p.cast, err = openCast(r); !errors.Is(err, io.EOF) || !running(p.entry) {
			break
		}
		// The header of a session comes with the size of its terminal.
		if err := p.wait(ctx); err != nil {
			return err
		}
	}
	if err != nil {
		return err
	}
	if err := p.resizeTo(p.cast.header.Width, p.cast.header.Height); err != nil {
		return err
	}
	p.screen = newScreen(p.cast.header.Width, p.cast.header.Height)
	p.screen.goOn = p.work.goOn
	if err := p.skip(ctx, start); err != nil {
		return err
	}
	sent := time.Now()
	for ctx.Err() == nil {
		e, err := p.cast.next()
		switch {
		case err == nil:
			if err := p.event(e); err != nil {
				return err
			}
			sent = time.Now()
			continue
		case !errors.Is(err, io.EOF):
			return err
		}
		if p.pending {
			if err := p.frame(); err != nil {
				return err
			}
		}
		if !running(p.entry) {
			return p.say(`{"end":%s}`, seconds(p.at))
		}
		if err := p.wait(ctx); err != nil {
			return err
		}
		if time.Since(sent) > silence {
			sent = time.Now()
			if err := p.say(`{"live":%s}`, seconds(p.at)); err != nil {
				return err
			}
		}
	}
	return context.Cause(ctx)
}

// playerMemory is what a player takes besides its screen and the lines of the recording.
const playerMemory = 1 << 20

// resizeTo counts a screen of that size.
func (p *player) resizeTo(width, height int) error {
	p.memory = max(p.memory, memoryOf(width, height))
	return p.count()
}

// count counts what the player holds.
func (p *player) count() error { return p.grow(playerMemory + p.memory + p.cast.held()) }

// wait waits until the recording may have grown, and notes whether it has ended.
func (p *player) wait(ctx context.Context) error {
	timer := time.NewTimer(pollInterval)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
	}
	// What is read after this is all of it, if it is complete now.
	r, entry, err := p.store.Open(ctx, p.id)
	if err != nil {
		return err
	}
	p.entry = entry
	return r.Close()
}

// skip draws what comes before start, and sends the screen.
func (p *player) skip(ctx context.Context, start time.Duration) error {
	reported := int64(0)
	for start > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		e, err := p.cast.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if e.at > start {
			if err := p.sendScreen(start); err != nil {
				return err
			}
			return p.event(e)
		}
		if _, _, err := p.apply(e); err != nil {
			return err
		}
		if p.cast.read-reported > progressEvery {
			reported = p.cast.read
			if err := p.say(`{"progress":%.3f}`, float64(reported)/float64(max(p.entry.Size, reported))); err != nil {
				return err
			}
		}
	}
	return p.sendScreen(min(start, p.at))
}

// sendScreen sends the whole screen.
func (p *player) sendScreen(at time.Duration) error {
	p.at = at
	if err := p.sendSize(); err != nil {
		return err
	}
	return p.frame()
}

func (p *player) sendSize() error {
	e := p.screen.emulator()
	p.rows, p.cursor = make([][]byte, e.Height()), ""
	for i := range p.rows {
		p.rows[i] = []byte("[]")
	}
	return p.say(`{"size":[%d,%d]}`, e.Width(), e.Height())
}

// apply draws an event.
func (p *player) apply(e event) (changed, resized bool, err error) {
	p.at = max(p.at, e.at)
	if err := p.count(); err != nil {
		return false, false, err
	}
	switch e.kind {
	case 'o':
		if p.first {
			p.screen.newlines, p.first = withoutTerminal(e.data), false
		}
		return true, false, p.work.do(func() { p.screen.draw(e.data) })
	case 'r':
		if w, h, ok := e.size(); ok {
			if err := p.resizeTo(w, h); err != nil {
				return false, false, err
			}
			return true, true, p.work.do(func() { p.screen.resize(w, h) })
		}
	}
	return false, false, nil
}

// event draws an event, and sends a frame unless there was one just before.
func (p *player) event(e event) error {
	if p.pending && e.at >= p.framed+frameTime {
		if err := p.frame(); err != nil {
			return err
		}
	}
	changed, resized, err := p.apply(e)
	if err != nil {
		return err
	}
	if resized {
		if err := p.sendSize(); err != nil {
			return err
		}
	}
	if e.kind == 'm' {
		note, _ := jsontext.AppendQuote(nil, clipBytes(e.data, maxNote)) // invalid UTF-8 is replaced
		return p.say(`{"t":%s,"note":%s}`, seconds(p.at), note)
	}
	if changed && !p.pending {
		p.pending, p.framed = true, p.at
	}
	return nil
}

// maxNote is how many bytes of a marker are sent.
const maxNote = 1 << 10

func clipBytes(b []byte, n int) []byte { return b[:min(len(b), n)] }

// frame sends the rows that have changed.
func (p *player) frame() error {
	p.pending = false
	changed := false
	if err := p.work.do(func() { changed = p.appendFrame() }); err != nil || !changed {
		return err
	}
	if _, err := p.out.Write(p.buffer); err != nil {
		return err
	}
	return p.flush()
}

// appendFrame makes buffer the frame, and reports whether anything has changed.
func (p *player) appendFrame() bool {
	e := p.screen.emulator()
	b := fmt.Appendf(p.buffer[:0], `{"t":%s,"rows":{`, seconds(p.at))
	empty := len(b)
	for y := range min(len(p.rows), e.Height()) {
		row := appendRow(nil, p.screen.line(y))
		if bytes.Equal(row, p.rows[y]) {
			continue
		}
		p.rows[y] = row
		if len(b) > empty {
			b = append(b, ',')
		}
		b = fmt.Appendf(b, `"%d":%s`, y, row)
	}
	at := e.CursorPosition()
	visible := 1
	if e.CursorHidden() {
		visible = 0
	}
	cursor := fmt.Sprintf("[%d,%d,%d]", at.X, at.Y, visible)
	p.buffer = b
	if len(b) == empty && cursor == p.cursor {
		return false
	}
	p.cursor = cursor
	p.buffer = fmt.Appendf(b, "},\"cursor\":%s}\n", cursor)
	return true
}

// say sends a line.
func (p *player) say(format string, args ...any) error {
	if _, err := fmt.Fprintf(p.out, format+"\n", args...); err != nil {
		return err
	}
	return p.flush()
}

// seconds returns d as a number of JSON.
func seconds(d time.Duration) string { return strconv.FormatFloat(d.Seconds(), 'f', 3, 64) }
