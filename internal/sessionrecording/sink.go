// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"io"
	"sync"
	"time"
)

const (
	// maxPending is how many bytes a sink buffers. With more, the session waits.
	maxPending = 128 << 10
	// chunk is how many bytes are written at once.
	chunk = 16 << 10
	// stall is how long writing a chunk may take.
	stall = 5 * time.Second
)

var errStalled = errors.New("it has taken nothing for 5s")

// sink writes a recording in the background, as soon as possible.
type sink struct {
	to io.Writer
	// required is why the session ends if the sink fails, nil if the session goes on
	// without it.
	required error
	// failed is called once, in a goroutine of its own, when writing has failed.
	failed func(error)

	mu      sync.Mutex
	pending []byte
	err     error
	closing bool

	work chan struct{} // capacity 1: pending grew, or closing was set
	room chan struct{} // capacity 1: pending shrank
	dead chan struct{} // closed when err is set
	done chan struct{} // closed when run returns
}

func newSink(to io.Writer, required error, failed func(error)) *sink {
	s := &sink{
		to: to, required: required, failed: failed,
		work: make(chan struct{}, 1), room: make(chan struct{}, 1),
		dead: make(chan struct{}), done: make(chan struct{}),
	}
	go s.run()
	return s
}

// write appends b to what is pending, and waits while too much is pending. It returns an
// error if the sink has failed.
func (s *sink) write(b []byte) error {
	for {
		s.mu.Lock()
		if s.err != nil {
			s.mu.Unlock()
			return s.err
		}
		if len(s.pending) == 0 || len(s.pending)+len(b) <= maxPending {
			s.pending = append(s.pending, b...)
			s.mu.Unlock()
			signal(s.work)
			return nil
		}
		s.mu.Unlock()
		select {
		case <-s.room:
		case <-s.dead:
		}
	}
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run writes what is pending until the sink is closed or fails.
func (s *sink) run() {
	defer close(s.done)
	watchdog := time.AfterFunc(stall, func() { s.fail(errStalled) })
	watchdog.Stop()
	defer watchdog.Stop()
	var batch []byte
	for {
		s.mu.Lock()
		batch, s.pending = s.pending, batch[:0]
		closing, err := s.closing, s.err
		s.mu.Unlock()
		switch {
		case err != nil:
			return
		case len(batch) == 0 && closing:
			return
		case len(batch) == 0:
			select {
			case <-s.work:
			case <-s.dead:
			}
			continue
		}
		signal(s.room)
		for rest := batch; len(rest) > 0; {
			n := min(len(rest), chunk)
			watchdog.Reset(stall)
			_, err := s.to.Write(rest[:n])
			watchdog.Stop()
			if err != nil {
				s.fail(err)
				return
			}
			rest = rest[n:]
		}
	}
}

// fail stops the sink.
func (s *sink) fail(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	close(s.dead)
	s.mu.Unlock()
	go s.failed(err)
}

// close waits until everything pending is written. It returns an error if the sink has
// failed.
func (s *sink) close() error {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	signal(s.work)
	select {
	case <-s.done:
	case <-s.dead: // run may hang in a write
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}
