// SPDX-License-Identifier: Apache-2.0

// Package recordertest is a session recorder for tests. It speaks both versions of the
// protocol of Tailscale's recorder, keeps what it receives, and can fail in the ways in
// which a recorder fails.
package recordertest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"tailscale.com/sessionrecording"
)

// Mode is how a recorder treats requests.
type Mode int

// The modes.
const (
	// V2 speaks both versions of the protocol.
	V2 Mode = iota
	// V1 speaks only the first version, which has no events.
	V1
	// Silent accepts connections and never answers.
	Silent
	// Stalling begins recordings and then reads nothing.
	Stalling
	// Slow reads at most 64 KiB in a tenth of a second.
	Slow
	// Failing answers with an error.
	Failing
	// Ending ends recordings at once, without an error.
	Ending
)

// Recorder is a session recorder.
type Recorder struct {
	server *http.Server
	memory *memoryListener // of Start
	closed chan struct{}

	mu         sync.Mutex
	mode       Mode
	recordings []*Recording
	events     []*sessionrecording.Event
	conns      map[*conn]bool
}

// Recording is what a recorder has received in one upload.
type Recording struct {
	// Version is the version of the protocol.
	Version int

	mu    sync.Mutex
	data  bytes.Buffer
	ended chan struct{}
	err   error
}

// Bytes returns what has arrived.
func (r *Recording) Bytes() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return bytes.Clone(r.data.Bytes())
}

// Ended is closed when the upload has ended.
func (r *Recording) Ended() <-chan struct{} { return r.ended }

// Err returns why the upload was cut off, nil if it is complete. It must not be called
// before Ended is closed.
func (r *Recording) Err() error { return r.err }

// New returns a recorder.
func New() *Recorder {
	r := &Recorder{closed: make(chan struct{}), conns: make(map[*conn]bool)}
	mux := http.NewServeMux()
	mux.HandleFunc("HEAD /v2/record", r.probe)
	mux.HandleFunc("POST /v2/record", r.record2)
	mux.HandleFunc("POST /record", r.record1)
	mux.HandleFunc("HEAD /v2/event", r.probe)
	mux.HandleFunc("POST /v2/event", r.event)
	r.server = &http.Server{Handler: mux, Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	r.server.Protocols.SetHTTP1(true)
	r.server.Protocols.SetUnencryptedHTTP2(true)
	return r
}

// Serve serves ln until Close.
func (r *Recorder) Serve(ln net.Listener) error {
	if err := r.server.Serve(listener{ln, r}); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close stops the recorder.
func (r *Recorder) Close() error {
	close(r.closed)
	err := r.server.Close()
	r.Cut()
	return err
}

// SetMode changes how the recorder treats later requests.
func (r *Recorder) SetMode(m Mode) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mode = m
}

// Cut closes all connections, as if the recorder had died.
func (r *Recorder) Cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		_ = c.Conn.Close()
	}
	clear(r.conns)
}

// Take returns the recordings that have begun since the last call.
func (r *Recorder) Take() []*Recording {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken := r.recordings
	r.recordings = nil
	return taken
}

// Peek returns what Take would.
func (r *Recorder) Peek() []*Recording {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.recordings)
}

// Conns returns how many connections are open.
func (r *Recorder) Conns() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.conns)
}

// listener accepts connections for a recorder, which keeps track of them. The hooks of
// http.Server do not see connections that switch to HTTP/2.
type listener struct {
	net.Listener
	recorder *Recorder
}

// Accept implements [net.Listener].
func (l listener) Accept() (net.Conn, error) {
	nc, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &conn{nc, l.recorder}
	l.recorder.mu.Lock()
	defer l.recorder.mu.Unlock()
	l.recorder.conns[c] = true
	return c, nil
}

// conn is a connection that tells its recorder when it is closed.
type conn struct {
	net.Conn
	recorder *Recorder
}

// Close implements [net.Conn].
func (c *conn) Close() error {
	c.recorder.mu.Lock()
	defer c.recorder.mu.Unlock()
	delete(c.recorder.conns, c)
	return c.Conn.Close()
}

// treat returns the mode, and whether the request goes on. It does not return while a
// Silent recorder keeps the client waiting.
func (r *Recorder) treat(w http.ResponseWriter, req *http.Request) (Mode, bool) {
	r.mu.Lock()
	mode := r.mode
	r.mu.Unlock()
	switch mode {
	case Silent:
		select {
		case <-req.Context().Done():
		case <-r.closed:
		}
		return mode, false
	case Failing:
		http.Error(w, "the recorder fails", http.StatusInternalServerError)
		return mode, false
	}
	return mode, true
}

func (r *Recorder) probe(w http.ResponseWriter, req *http.Request) {
	if mode, ok := r.treat(w, req); ok && mode == V1 {
		w.WriteHeader(http.StatusNotFound)
	}
}

func (r *Recorder) begin(version int) *Recording {
	recording := &Recording{Version: version, ended: make(chan struct{})}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recordings = append(r.recordings, recording)
	return recording
}

// record1 speaks version 1: the upload is answered at its end.
func (r *Recorder) record1(w http.ResponseWriter, req *http.Request) {
	mode, ok := r.treat(w, req)
	if !ok {
		return
	}
	r.receive(r.begin(1), mode, req, func(int64) error { return nil })
}

// record2 speaks version 2: every part of the upload is confirmed.
func (r *Recorder) record2(w http.ResponseWriter, req *http.Request) {
	mode, ok := r.treat(w, req)
	if !ok {
		return
	}
	if mode == V1 {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	controller := http.NewResponseController(w)
	if err := controller.Flush(); err != nil {
		return
	}
	acks := json.NewEncoder(w)
	r.receive(r.begin(2), mode, req, func(n int64) error {
		if err := acks.Encode(map[string]int64{"ack": n}); err != nil {
			return err
		}
		return controller.Flush()
	})
}

// receive reads the upload to its end, and calls ack with the number of bytes after each
// part.
func (r *Recorder) receive(recording *Recording, mode Mode, req *http.Request, ack func(int64) error) {
	defer close(recording.ended)
	if mode == Ending {
		return
	}
	buffer := make([]byte, 64<<10)
	total := int64(0)
	for first := true; ; first = false {
		if mode == Stalling && !first {
			select {
			case <-req.Context().Done():
			case <-r.closed:
			}
			recording.err = errors.New("stalled")
			return
		}
		if mode == Slow {
			select {
			case <-time.After(100 * time.Millisecond):
			case <-r.closed:
			}
		}
		n, err := req.Body.Read(buffer)
		total += int64(n)
		recording.mu.Lock()
		recording.data.Write(buffer[:n])
		recording.mu.Unlock()
		if ackErr := ack(total); err == nil && ackErr != nil {
			err = ackErr
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				recording.err = err
			}
			return
		}
	}
}
