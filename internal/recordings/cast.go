// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"tailscale.com/sessionrecording"
)

// maxLine is the length of the longest line of a recording, in bytes. Recorders write a
// line for each frame of a session, which has at most 1 MiB, six times as much if it is
// escaped.
const maxLine = 8 << 20

// errNoCast says that a file is no recording, or one that is damaged.
var errNoCast = errors.New("this is no recording")

var errLongLine = fmt.Errorf("%w: a line is longer than %d bytes", errNoCast, maxLine)

// event is a line of a recording behind its header.
type event struct {
	at   time.Duration // since the start
	kind byte          // 'o' printed, 'i' typed, 'r' resized, 'm' a marker
	data []byte        // valid until the next event is read
}

// cast reads a recording in the format asciicast v2.
type cast struct {
	header sessionrecording.CastHeader
	// read is how many bytes have been read.
	read int64

	lines *bufio.Reader
	// start is a line whose end has not arrived.
	start []byte
	data  []byte // buffer of events
}

// openCast reads the header of a recording. The error is io.EOF if it has none yet.
func openCast(r io.Reader) (*cast, error) {
	c := &cast{lines: newReader(r)}
	line, err := c.line()
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(line, &c.header); err != nil {
		return nil, fmt.Errorf("%w: its header: %w", errNoCast, err)
	}
	if c.header.Version != 2 {
		return nil, fmt.Errorf("%w: it has version %d of the format, not 2", errNoCast, c.header.Version)
	}
	if c.header.Kubernetes == nil {
		c.header.Kubernetes = new(sessionrecording.Kubernetes)
	}
	return c, nil
}

// line returns the next line. The error is io.EOF if its end has not arrived. It may then
// be called again later, if the recording grows.
func (c *cast) line() ([]byte, error) {
	for {
		part, err := c.lines.ReadSlice('\n')
		c.read += int64(len(part))
		if err == nil && len(c.start) == 0 {
			return part, nil
		}
		if len(c.start)+len(part) > maxLine {
			return nil, errLongLine
		}
		c.start = append(c.start, part...)
		switch {
		case err == nil:
			line := c.start
			c.start = c.start[:0]
			return line, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// next returns the next event. The error is io.EOF at the end of what was recorded, so
// far. Lines that are no events are left out: the writer may have been killed within one,
// and a recorder may append to that.
func (c *cast) next() (event, error) {
	for {
		line, err := c.line()
		if err != nil {
			return event{}, err
		}
		if e, ok := c.parse(line); ok {
			return e, nil
		}
	}
}

// parse parses `[1.234, "o", "text"]`.
func (c *cast) parse(line []byte) (event, bool) {
	line = bytes.TrimSpace(line)
	if len(line) < 2 || line[0] != '[' || line[len(line)-1] != ']' {
		return event{}, false
	}
	at, rest, found := bytes.Cut(line[1:len(line)-1], []byte(","))
	kind, data, also := bytes.Cut(rest, []byte(","))
	seconds, err := strconv.ParseFloat(string(bytes.TrimSpace(at)), 64)
	kind = bytes.Trim(kind, ` "`)
	if !found || !also || err != nil || !(seconds >= 0) || seconds > maxSeconds || len(kind) != 1 {
		return event{}, false
	}
	c.data, err = jsontext.AppendUnquote(c.data[:0], bytes.TrimSpace(data))
	if err != nil {
		return event{}, false
	}
	return event{time.Duration(seconds * float64(time.Second)), kind[0], c.data}, true
}

// maxSeconds is the longest time in a recording that counts: three years.
const maxSeconds = 1e8

// size parses the data of a resize: 80x24.
func (e event) size() (width, height int, ok bool) {
	w, h, _ := strings.Cut(string(e.data), "x")
	width, err := strconv.Atoi(w)
	height, err2 := strconv.Atoi(h)
	return width, height, err == nil && err2 == nil
}

// held returns how many bytes c holds.
func (c *cast) held() int64 { return int64(cap(c.start)+cap(c.data)) + readerSize }

const readerSize = 64 << 10

func newReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, readerSize) }
