// SPDX-License-Identifier: Apache-2.0

package recording

import (
	"bytes"
	"encoding/json"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"tailscale.com/sessionrecording"
)

const (
	asciicastVersion = 2
	// The size of a terminal that has not said its own.
	defaultWidth, defaultHeight = 80, 24
)

// cast writes a session down as asciicast v2: a header, then one line for each
// event.
type cast struct {
	sinks []*sink

	mu     sync.Mutex
	header sessionrecording.CastHeader
	start  time.Time
	begun  bool // the header has been written
	// tails are the starts of characters whose ends have not been printed yet.
	tails map[stream][]byte
	line  bytes.Buffer
	json  *json.Encoder // into line
}

// newCast returns a cast that starts now.
func newCast(header sessionrecording.CastHeader, sinks ...*sink) *cast {
	now := time.Now()
	header.Version = asciicastVersion
	header.Timestamp = now.Unix()
	header.Width, header.Height = defaultWidth, defaultHeight
	if header.Env == nil {
		header.Env = map[string]string{} // an object, for those who read it
	}
	c := &cast{sinks: sinks, header: header, start: now, tails: make(map[stream][]byte)}
	c.json = json.NewEncoder(&c.line)
	c.json.SetEscapeHTML(false)
	return c
}

// resize notes that the terminal has this size.
func (c *cast) resize(width, height uint16) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.begun {
		c.header.Width, c.header.Height = int(width), int(height)
		return c.begin()
	}
	return c.event("r", strconv.Itoa(int(width))+"x"+strconv.Itoa(int(height)))
}

// output notes what was printed on a stream.
func (c *cast) output(s stream, p []byte) error {
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
	return c.event("o", string(p))
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

// begin writes the header, unless that has been done.
func (c *cast) begin() error {
	if c.begun {
		return nil
	}
	c.begun = true
	c.line.Reset()
	if err := c.json.Encode(c.header); err != nil {
		return err
	}
	return c.write()
}

// event writes an event that happens now.
func (c *cast) event(kind, data string) error {
	c.line.Reset()
	c.line.WriteByte('[')
	c.line.Write(strconv.AppendFloat(c.line.AvailableBuffer(), time.Since(c.start).Seconds(), 'f', 6, 64))
	c.line.WriteString(`, "` + kind + `", `)
	if err := c.json.Encode(data); err != nil {
		return err
	}
	c.line.Truncate(c.line.Len() - 1) // the line's end, of the encoder
	c.line.WriteString("]\n")
	return c.write()
}

// write hands the line to the sinks. One that is not required has said so itself
// when it failed.
func (c *cast) write() error {
	for _, s := range c.sinks {
		if err := s.write(c.line.Bytes()); err != nil && s.required != nil {
			return s.required
		}
	}
	return nil
}

// finish writes down what is left of characters that were never completed.
func (c *cast) finish() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.begin(); err != nil {
		return err
	}
	for s, tail := range c.tails {
		if len(tail) > 0 {
			c.tails[s] = nil
			if err := c.event("o", string(tail)); err != nil {
				return err
			}
		}
	}
	return nil
}
