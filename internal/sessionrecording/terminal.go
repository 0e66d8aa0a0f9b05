// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
)

// terminal is the observer of an exec or an attach. It records what is printed, and what is
// typed if input is set.
type terminal struct {
	tty     bool            // the session has a terminal
	unsized bool            // the protocol does not transmit its size
	over    <-chan struct{} // closed when the session is over
	sizes   sizes
	cast    *cast // nil until the connection is upgraded

	input bool // what is typed is recorded
	typed int  // how many bytes were, of a session without a terminal
}

func newTerminal(tty bool, over <-chan struct{}) *terminal {
	return &terminal{tty: tty, over: over, sizes: sizes{known: make(chan struct{})}}
}

// protocol returns the protocol with the given version over upgrade.
func (t *terminal) protocol(upgrade, version string) (protocol, error) {
	t.unsized = upgrade == spdyUpgrade &&
		!slices.Contains([]string{remotecommand.StreamProtocolV3Name, remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name}, version)
	p, err := terminalProtocol(t, t.tty, upgrade, version)
	if ws, ok := p.(*webSocket); ok {
		ws.input = t.input
	}
	return p, err
}

// terminalProtocol returns the protocol of an exec or an attach, with the given version
// over upgrade.
func terminalProtocol(o observer, tty bool, upgrade, version string) (protocol, error) {
	status := slices.Contains([]string{remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name, v4Base64Channels}, version)
	if upgrade == spdyUpgrade {
		p, err := newSPDY(o)
		if err != nil {
			return nil, err
		}
		p.status, p.out = status, stderr
		if tty {
			p.out = stdout
		}
		return p, nil
	}
	p := &webSocket{
		observer: o,
		base64:   strings.HasSuffix(version, base64Channels),
		closes:   version == remotecommand.StreamProtocolV5Name,
		status:   status,
		channel:  sessionChannels,
		out:      remotecommand.StreamStdErr,
		errors:   remotecommand.StreamErr,
	}
	if tty {
		p.out = remotecommand.StreamStdOut
	}
	return p, nil
}

// streamOpened implements observer.
func (*terminal) streamOpened(h streamHeader) (stream, error) { return terminalStream(h) }

// terminalStream returns what a stream of an exec or an attach carries.
func terminalStream(h streamHeader) (stream, error) {
	what := stream(h.Get(corev1.StreamType))
	if !slices.Contains([]stream{stdin, stdout, stderr, errs, resize}, what) {
		return "", fmt.Errorf("a stream of the unknown type %q", clip.String(string(what)))
	}
	return what, nil
}

// maxInput is how many bytes of the input are recorded if there is no terminal: programs
// such as kubectl cp write any amount.
const maxInput = 1 << 20

// recordInput records what was typed.
func (t *terminal) recordInput(p []byte) error {
	if !t.input || len(p) == 0 {
		return nil
	}
	if t.tty {
		return t.cast.input(p)
	}
	left := maxInput - t.typed
	t.typed = min(t.typed+len(p), maxInput+1)
	switch {
	case len(p) <= left:
		return t.cast.input(p)
	case left < 0:
		return nil
	}
	if err := t.cast.input(p[:left]); err != nil {
		return err
	}
	return t.cast.mark(fmt.Sprintf("the input is not recorded after %d bytes", maxInput))
}

// fromClient implements observer.
func (t *terminal) fromClient(s stream, p []byte) error {
	if s == stdin {
		return t.recordInput(p)
	}
	// The API server ignores sizes unless there is a terminal.
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

// sizeTimeout is how long the output of a terminal is held back until the client sends
// the terminal's size, with which the recording begins. kubectl sends it at once.
const sizeTimeout = time.Second

// sizes reads the sizes of a client's terminal.
type sizes struct {
	pending []byte
	known   chan struct{} // closed with the first size
	once    sync.Once
	waited  bool
}

// maxSize is the maximum length of a size, as JSON.
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
		// A client without a terminal sends 0.
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

// wait waits, once, for the first size, for sizeTimeout, or until over is closed.
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
