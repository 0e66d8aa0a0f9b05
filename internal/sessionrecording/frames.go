// SPDX-License-Identifier: Apache-2.0

package sessionrecording

// maxFrame is how long a frame may be. It is what fits into SPDY's 24 bits and its
// header; the API server and kubectl write frames of 32 KiB.
const maxFrame = 1<<24 + 8

// protocol is a way of sending several streams over one connection.
type protocol interface {
	// fromClient looks at the frame at the start of b, which the client has sent.
	// It returns the frame's length, 0 if b does not hold all of it. An error ends
	// the session.
	fromClient(b []byte) (int, error)
	// fromServer is fromClient for what the API server has sent.
	fromServer(b []byte) (int, error)
	// farewell returns frames that tell the client why its session ends.
	farewell(reason string) []byte
}

// observer is told what is in the frames of a session. Its errors end the session.
type observer interface {
	// opened returns what a stream with the given headers carries. Only SPDY's
	// streams have headers; those of a WebSocket have fixed numbers.
	opened(h streamHeader) (stream, error)
	// fromClient and fromServer are given what is sent on a stream. They must not
	// keep p.
	fromClient(s stream, p []byte) error
	fromServer(s stream, p []byte) error
}

// streamHeader finds the values of a stream's headers.
type streamHeader interface{ Get(name string) string }

// stream says what a stream carries, in the words of a SPDY stream's header.
type stream string

// filter lets whole frames pass, one direction of a connection.
type filter struct {
	// next looks at the first frame of b and returns its length, 0 if b does not
	// hold all of it.
	next func(b []byte) (int, error)
	// held is the start of a frame whose end has not arrived. It and spare take
	// turns, since what was let pass may still be in use.
	held, spare []byte
}

// push adds b to what has arrived. It returns the whole frames that may pass, up to
// the first that may not. They are valid until the next call.
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
		return nil, err // and what is held is not copied for every byte that arrives
	}
	f.held, f.spare = append(f.spare[:0], b[end:]...), f.held
	return b[:end], err
}
