// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// terminal is a session as an observer of exec and attach.
type terminal Session

// opened implements observer.
func (t *terminal) opened(h streamHeader) (stream, error) {
	what := stream(h.Get(corev1.StreamType))
	if !slices.Contains([]stream{stdin, stdout, stderr, errs, resize}, what) {
		return "", fmt.Errorf("a stream of the unknown type %q", what)
	}
	return what, nil
}

// fromClient implements observer.
func (t *terminal) fromClient(s stream, p []byte) error {
	// Without a terminal nothing has a size, whatever the client says.
	if s != resize || !t.tty || t.unsized {
		return nil
	}
	return t.sizes.add(p, t.cast.resize)
}

// fromServer implements observer.
func (t *terminal) fromServer(s stream, p []byte) error {
	switch {
	case len(p) == 0, s == errs:
		return nil
	case s != stdout && s != stderr:
		return fmt.Errorf("data from the API server on stream %q", s)
	}
	if t.tty {
		t.sizes.wait(t.over)
	}
	return t.cast.output(s, p)
}

// sizeTimeout is how long a terminal that has not said its size keeps back what is
// printed on it. kubectl says it at once; the recording begins with it.
const sizeTimeout = time.Second

// sizes reads the sizes that a client's terminal takes on.
type sizes struct {
	pending []byte
	known   chan struct{} // closed with the first
	once    sync.Once
	waited  bool
}

// maxSize is how long a size may be, written as JSON.
const maxSize = 1 << 10

// add reads p, which may hold several sizes or a part of one, and calls f for each.
func (s *sizes) add(p []byte, f func(width, height uint16) error) error {
	s.pending = append(s.pending, p...)
	decoder := json.NewDecoder(bytes.NewReader(s.pending))
	read := int64(0)
	for {
		var size struct{ Width, Height uint16 }
		err := decoder.Decode(&size)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("the size of a terminal: %w", err)
		}
		read = decoder.InputOffset()
		// A terminal that is none says 0.
		if size.Width == 0 || size.Height == 0 {
			continue
		}
		if err := f(size.Width, size.Height); err != nil {
			return err
		}
		s.once.Do(func() { close(s.known) })
	}
	s.pending = append(s.pending[:0], s.pending[read:]...)
	if len(s.pending) > maxSize {
		return errors.New("the size of a terminal is too long")
	}
	return nil
}

// wait returns when a size is known, or none is to be expected.
func (s *sizes) wait(over <-chan struct{}) {
	if s.waited {
		return
	}
	s.waited = true
	timer := time.NewTimer(sizeTimeout)
	defer timer.Stop()
	select {
	case <-s.known:
	case <-timer.C:
	case <-over:
	}
}
