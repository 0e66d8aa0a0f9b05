// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"tailscale.com/sessionrecording"
)

const (
	asciicastVersion = 2
	// The size of a terminal unless the client sends it.
	defaultWidth, defaultHeight = 80, 24
)

// cast writes the recording of a session as asciicast v2: a header, then one line for
// each event.
type cast struct {
	sinks []*sink

	mu     sync.Mutex
	header sessionrecording.CastHeader
	start  time.Time
	begun  bool // the header is written
	// command is written after the header if it is not empty: the whole command.
	command string
	// tails are the starts of characters whose ends have not arrived.
	tails map[stream][]byte
	line  []byte // buffer of event
}

// newCast returns a cast that starts now.
func newCast(header sessionrecording.CastHeader, sinks ...*sink) *cast {
	now := time.Now()
	header.Version = asciicastVersion
	header.Timestamp = now.Unix()
	header.Width, header.Height = defaultWidth, defaultHeight
	if header.Env == nil {
		header.Env = map[string]string{} // readers expect an object
	}
	return &cast{sinks: sinks, header: header, start: now, tails: make(map[stream][]byte)}
}

// resize records a size of the terminal.
func (c *cast) resize(width, height uint16) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.begun {
		c.header.Width, c.header.Height = int(width), int(height)
		return c.begin()
	}
	return c.event("r", fmt.Appendf(nil, "%dx%d", width, height))
}

// output records what was printed on a stream.
func (c *cast) output(s stream, p []byte) error { return c.record(s, p) }

// input records what was typed.
func (c *cast) input(p []byte) error { return c.record(stdin, p) }

// mark records a note.
func (c *cast) mark(note string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.begin(); err != nil {
		return err
	}
	return c.event("m", []byte(note))
}

// kindOfEvent returns the kind of the events of a stream.
func kindOfEvent(s stream) string {
	if s == stdin {
		return "i"
	}
	return "o"
}

// record records the data of a stream.
func (c *cast) record(s stream, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.begin(); err != nil {
		return err
	}
	if tail := c.tails[s]; len(tail) > 0 {
		p = append(tail, p...)
		c.tails[s] = nil
	}
	if whole := wholeRunes(p); whole < len(p) {
		c.tails[s] = bytes.Clone(p[whole:])
		p = p[:whole]
	}
	if len(p) == 0 {
		return nil
	}
	return c.event(kindOfEvent(s), p)
}

// wholeRunes returns the length of p without the start of a character at its end.
func wholeRunes(p []byte) int {
	for i := len(p) - 1; i >= 0 && i > len(p)-utf8.UTFMax; i-- {
		if utf8.RuneStart(p[i]) {
			if !utf8.FullRune(p[i:]) {
				return i
			}
			break
		}
	}
	return len(p)
}

// open writes the header, unless it is written.
func (c *cast) open() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.begin()
}

// begin is open with c.mu held.
func (c *cast) begin() error {
	if c.begun {
		return nil
	}
	c.begun = true
	var header bytes.Buffer
	encoder := json.NewEncoder(&header)
	encoder.SetEscapeHTML(false) // a caller writes the command
	if err := encoder.Encode(c.header); err != nil {
		return err
	}
	if err := c.write(header.Bytes()); err != nil {
		return err
	}
	command := c.command
	c.command = ""
	for at := 0; at < len(command); {
		piece := command[at:min(at+chunk, len(command))]
		if whole := wholeRunes([]byte(piece)); whole > 0 {
			piece = piece[:whole]
		}
		if err := c.event("m", fmt.Appendf(nil, "the command from byte %d on: %s", at, piece)); err != nil {
			return err
		}
		at += len(piece)
	}
	return nil
}

// event writes an event with the current time.
func (c *cast) event(kind string, data []byte) error {
	c.line = append(c.line[:0], '[')
	c.line = strconv.AppendFloat(c.line, time.Since(c.start).Seconds(), 'f', 6, 64)
	c.line = append(c.line, `, "`+kind+`", `...)
	// The error says that data is not valid UTF-8. AppendQuote replaces such bytes.
	c.line, _ = jsontext.AppendQuote(c.line, data)
	c.line = append(c.line, "]\n"...)
	return c.write(c.line)
}

// write hands a line to the sinks. It returns the error of a required sink that has failed.
// Other sinks have reported their failure themselves.
func (c *cast) write(line []byte) error {
	for _, s := range c.sinks {
		err := s.write(line)
		switch {
		case err == nil || s.required == nil:
		case errors.Is(err, errQuota):
			return errFull
		default:
			return s.required
		}
	}
	return nil
}

// finish writes the starts of characters whose ends never arrived.
func (c *cast) finish() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.begin(); err != nil {
		return err
	}
	for s, tail := range c.tails {
		if len(tail) > 0 {
			c.tails[s] = nil
			if err := c.event(kindOfEvent(s), tail); err != nil {
				return err
			}
		}
	}
	return nil
}
