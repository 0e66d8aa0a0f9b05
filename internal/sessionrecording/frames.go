// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"cmp"
	"fmt"
)

// maxFrame is the maximum size of the data in a frame, which is held until all of it has
// arrived. The API server and kubectl write frames of 32 KiB.
const maxFrame = 1 << 20

// keep is up to which size a buffer for frames is kept for the next ones, and does not
// count.
const keep = 64 << 10

// checkSize returns an error if a frame with so much data is too long.
func checkSize(size uint64) error {
	if size > maxFrame {
		return fmt.Errorf("a frame of %d bytes, where %d are the limit", size, maxFrame)
	}
	return nil
}

// protocol parses the frames of one connection, which carries several streams.
type protocol interface {
	// fromClient parses the frame at the start of b, which the client sent. It returns
	// the length of the frame, 0 if b does not hold all of it. An error ends the session.
	fromClient(b []byte) (int, error)
	// fromServer is like fromClient for what the API server sent.
	fromServer(b []byte) (int, error)
	// farewell returns frames that tell the client why its session ends.
	farewell(reason string) []byte
}

// observer receives the content of a session's frames. Its errors end the session.
type observer interface {
	// streamOpened returns what a stream with the headers h carries. Only the streams of
	// SPDY have headers. Those of a WebSocket have fixed numbers.
	streamOpened(h streamHeader) (stream, error)
	// fromClient and fromServer receive the data of a stream. They must not keep p.
	fromClient(s stream, p []byte) error
	fromServer(s stream, p []byte) error
}

// streamHeader is the headers of a stream.
type streamHeader interface{ Get(name string) string }

// stream is what a stream carries, as the header of a SPDY stream names it.
type stream string

// filter passes whole frames of one direction of a connection.
type filter struct {
	// next parses the first frame of b and returns its length, 0 if b does not hold all
	// of it.
	next func(b []byte) (int, error)
	// held is the start of a frame whose end has not arrived. It and spare take turns,
	// because the caller may still use the frames that push returned from held.
	held, spare []byte
	// grow is told by how many bytes more, or fewer, the buffers exceed what is kept. Its
	// error ends the session. If it is nil, nobody counts.
	grow  func(n int64) error
	grown int64
}

// count tells grow what the buffers have come to.
func (f *filter) count() error {
	n := int64(max(0, cap(f.held)-keep) + max(0, cap(f.spare)-keep))
	if f.grow == nil || n == f.grown {
		return nil
	}
	err := f.grow(n - f.grown)
	if err == nil {
		f.grown = n
	}
	return err
}

// push appends b to what is held. It returns the whole frames up to the first one that
// next rejects. They are valid until the next call.
func (f *filter) push(b []byte) (pass []byte, err error) {
	waited := len(f.held) > 0
	if waited {
		f.held = append(f.held, b...)
		b = f.held
	}
	end := 0
	for end < len(b) {
		var n int
		if n, err = f.next(b[end:]); n == 0 || err != nil {
			break
		}
		end += n
	}
	if end == 0 && waited {
		return nil, cmp.Or(err, f.count()) // without a copy of what is held for every byte that arrives
	}
	if cap(f.spare) > keep {
		f.spare = nil
	}
	f.held, f.spare = append(f.spare[:0], b[end:]...), f.held
	return b[:end], cmp.Or(err, f.count())
}
