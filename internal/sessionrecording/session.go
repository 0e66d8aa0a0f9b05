// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recorder"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// Session is a request that becomes an exec, an attach or a port-forward.
type Session struct {
	recorder *Recorder
	kind     kind
	upgrade  string
	id       string
	enforce  bool
	started  time.Time
	header   sessionrecording.CastHeader
	client   *tailnet.Conn
	command  string // the whole command if the header has only the start of it
	log      *zap.Logger

	terminal   *terminal   // nil for a port-forward
	forwarding *forwarding // nil for anything else

	sinks  []*sink
	upload *recorder.Upload // nil if there is no recorder
	file   *file            // nil if recordings are not kept locally
	toFile *sink            // writes to file
	// headerIsDue writes the recording's header if the client does not send the size
	// of its terminal.
	headerIsDue *time.Timer
	holding     holding
	over        chan struct{}      // closed by Close
	ctx         context.Context    // that of Watch
	begun       chan struct{}      // closed by begin
	cancel      context.CancelFunc // of the request to the API server

	mu       sync.Mutex
	conn     *conn // nil until the connection is upgraded
	reason   error // why the session has to end, nil if it does not
	out, in  int   // requests sent to the API server, and answers that have begun to arrive
	answered bool  // the client was sent an answer other than an upgrade
	lost     bool  // the recorder is lost, or there was none
	closing  bool
}

// answerTimeout is how long the answer of the API server is waited for after the client
// has gone away.
const answerTimeout = 5 * time.Second

// Watch returns ctx for the request to the API server. s notes whether that request is
// sent and answered, and cancels it when the session has to end. An answer that others
// than the API server write after the request was sent does not prove that the command
// did not run.
//
// A request that was sent does not end with its client. Otherwise callers that the API
// server refuses could leave a recording for each request, by not waiting for the answer.
func (s *Session) Watch(client context.Context) context.Context {
	s.ctx = client
	s.holding = holding{ctx: client, hold: s.recorder.Hold}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(client))
	stop := context.AfterFunc(client, func() {
		s.awaitAnswer()
		cancel(context.Cause(client))
	})
	s.cancel = func() {
		stop()
		cancel(nil)
	}
	count := func(n *int) {
		s.mu.Lock()
		defer s.mu.Unlock()
		*n++
	}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:              func(httptrace.GotConnInfo) { count(&s.out) },
		GotFirstResponseByte: func() { count(&s.in) },
	})
}

// awaitAnswer waits for the answer to a request that was sent to the API server, until
// answerTimeout has passed.
func (s *Session) awaitAnswer() {
	s.mu.Lock()
	waits := s.kind != forward && s.out > 0 && s.conn == nil
	s.mu.Unlock()
	if !waits {
		return
	}
	timer := time.NewTimer(answerTimeout)
	defer timer.Stop()
	select {
	case <-s.begun:
	case <-s.over:
	case <-timer.C:
	}
}

// Wrap returns w for the handlers that follow. A handler that hijacks the connection
// gets one that records. The result has no Unwrap method, so that no handler can reach
// the client's connection itself.
func (s *Session) Wrap(w http.ResponseWriter) http.ResponseWriter {
	w = upgrade.Client(w)
	return &responseWriter{w, s, http.NewResponseController(w)}
}

type responseWriter struct {
	http.ResponseWriter
	session    *Session
	controller *http.ResponseController
}

// clientGone is the status code that reverse_proxy writes to the access log if the
// client goes away before the answer.
const clientGone = 499

// WriteHeader implements [http.ResponseWriter].
func (w *responseWriter) WriteHeader(code int) {
	if code >= http.StatusOK && code != clientGone {
		w.session.mu.Lock()
		w.session.answered = true
		w.session.mu.Unlock()
	}
	w.ResponseWriter.WriteHeader(code)
}

// FlushError, SetReadDeadline, SetWriteDeadline and EnableFullDuplex are for
// [http.ResponseController].
func (w *responseWriter) FlushError() error                  { return w.controller.Flush() }
func (w *responseWriter) SetReadDeadline(t time.Time) error  { return w.controller.SetReadDeadline(t) }
func (w *responseWriter) SetWriteDeadline(t time.Time) error { return w.controller.SetWriteDeadline(t) }
func (w *responseWriter) EnableFullDuplex() error            { return w.controller.EnableFullDuplex() }

// Hijack implements [http.Hijacker].
func (w *responseWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	protocol, err := w.session.protocol(w.Header())
	if err != nil {
		w.session.end(err)
		return nil, nil, err
	}
	c, buffered, err := hijack(w.controller, protocol, w.session.cancel)
	if err != nil {
		return nil, nil, err
	}
	w.session.client.AllowFarewell()
	c.in.grow, c.out.grow = w.session.holding.grow, w.session.holding.grow
	c.endWith(w.session.ctx)
	w.session.begin(c)
	return c, buffered, nil
}

// hijack returns the client's connection of a session with the given protocol.
func hijack(w *http.ResponseController, p protocol, cancel context.CancelFunc) (*conn, *bufio.ReadWriter, error) {
	nc, buffered, err := w.Hijack()
	if err != nil {
		return nil, nil, err
	}
	// The answer that switches protocols is still in the buffer.
	if err := buffered.Flush(); err != nil {
		return nil, nil, errors.Join(err, nc.Close())
	}
	// The client may have sent data behind its request without waiting for the answer.
	early := make([]byte, buffered.Reader.Buffered())
	if _, err := io.ReadFull(buffered, early); err != nil {
		return nil, nil, errors.Join(err, nc.Close())
	}
	c := newConn(nc, early, p, cancel)
	return c, bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c)), nil
}

// protocol returns the protocol that the API server chose in the headers h of its
// answer.
func (s *Session) protocol(h http.Header) (protocol, error) {
	if upgraded := field(h, "Upgrade"); len(upgraded) != 1 || !strings.EqualFold(upgraded[0], s.upgrade) {
		return nil, fmt.Errorf("the API server switched to %q, not to %q", upgraded, s.upgrade)
	}
	if extensions := field(h, "Sec-Websocket-Extensions"); len(extensions) > 0 {
		return nil, fmt.Errorf("the API server uses WebSocket extensions that it was not offered: %q", extensions)
	}
	version := strings.Join(versionsIn(h, s.upgrade), ",")
	if !known(version, s.upgrade, s.kind) {
		return nil, fmt.Errorf("the API server chose the protocol %q, which cannot be recorded", version)
	}
	if s.kind == forward {
		s.forwarding.grow = s.holding.grow
		return s.forwarding.protocol(s.upgrade, version)
	}
	return s.terminal.protocol(s.upgrade, version)
}

// begin starts the session on c, the upgraded connection.
func (s *Session) begin(c *conn) {
	s.mu.Lock()
	s.conn = c
	s.started = time.Now()
	reason := s.reason
	s.mu.Unlock()
	close(s.begun)
	if s.kind == forward {
		s.log.Info("port-forward begins", zap.Strings("ports", s.forwarding.noted()))
	} else {
		s.terminal.cast = newCast(s.header, s.sinks...)
		s.terminal.cast.command, s.command = s.command, ""
		s.log.Info("the session is recorded", zap.String("command", s.header.Command))
		// The header is written even if nothing is ever printed. It holds the size of
		// the terminal, which the client sends next.
		if s.terminal.tty {
			s.headerIsDue = time.AfterFunc(sizeTimeout, s.writeHeader)
		} else {
			s.writeHeader()
		}
	}
	if reason != nil {
		c.end(reason)
	}
}

// writeHeader writes the recording's header, unless it is written.
func (s *Session) writeHeader() {
	if err := s.terminal.cast.open(); err != nil {
		s.end(err)
	}
}

// end ends the session, and tells the client why.
func (s *Session) end(reason error) {
	s.mu.Lock()
	if s.reason == nil {
		s.reason = reason
	}
	c := s.conn
	s.mu.Unlock()
	if c != nil {
		c.end(reason)
	}
}

// watch waits for the end of the upload. If it comes before the end of the session, the
// recorder is lost.
func (s *Session) watch() {
	select {
	case <-s.upload.Ended():
		err := s.upload.Err()
		if err == nil {
			err = errors.New("it has ended the recording")
		}
		s.recorderFailed(err)
	case <-s.over:
	}
}

// errUnanswered is the reason of a session whose request was sent to the API server and
// not answered: the client has gone away, or the API server has.
var errUnanswered = errors.New("no answer of the API server has come; whether the command ran is not known")

// Reasons for the end of a session. Its user reads them.
var (
	errRecorderLost = errors.New("this session has to be recorded, and its recorder was lost")
	errFileLost     = errors.New("this session has to be recorded, and the proxy cannot write its recording")
	errFull         = errors.New("this session has to be recorded, and the recordings of the proxy have reached record_max_size")
)

// recorderFailed is called when the recorder fails.
func (s *Session) recorderFailed(err error) {
	s.mu.Lock()
	late := s.lost || s.closing
	s.lost = true
	s.mu.Unlock()
	if late {
		return
	}
	s.upload.Discard()
	if s.enforce {
		s.log.Error("the recorder was lost, and the session ends", zap.Stringer("recorder", s.upload.Recorder()), zap.Error(err))
		s.end(errRecorderLost)
		return
	}
	s.log.Error("the recorder was lost, and the session goes on without", zap.Stringer("recorder", s.upload.Recorder()), zap.Error(err))
}

// fileFailed is called when the file cannot be written.
func (s *Session) fileFailed(err error) {
	s.log.Error("the recording cannot be written, and the session ends", zap.String("file", s.file.Name()), zap.Error(err))
	reason := errFileLost
	if errors.Is(err, errQuota) {
		reason = errFull
	}
	s.end(reason)
}

// fileCut is called when the rest of the session is not written to the file.
func (s *Session) fileCut() {
	s.log.Error("the recording is cut off, as the recordings have reached record_max_size, and the session goes on", zap.String("file", s.file.Name()))
}

// Close releases what Begin returned s with. It must be called when the request has
// been handled, whether or not it became a session.
func (s *Session) Close() {
	s.cancel()
	defer s.holding.release()
	s.mu.Lock()
	c, reason, lost := s.conn, s.reason, s.lost
	nothingRan := s.out == 0 || s.answered && s.in == s.out
	s.mu.Unlock()
	if c == nil && (nothingRan || s.kind == forward) {
		s.abandon()
		if reason != nil {
			s.log.Warn("the session was ended before it began", zap.NamedError("reason", reason))
			outcomes.With(Ended).Inc()
		}
		return
	}
	s.stopWatching()
	if s.kind == forward {
		s.log.Info("port-forward has ended", append(s.forwarding.fields(), zap.Duration("duration", time.Since(s.started)))...)
		return
	}
	switch {
	case c == nil:
		// The command may have run, so the recording has to say who asked for it. It is
		// small, as the caller may not even be allowed to ask.
		s.terminal.cast = newCast(s.header, s.sinks...)
		if reason == nil {
			reason = errUnanswered
		}
	case reason == nil:
		reason = c.failed()
	}
	outcome := Recorded
	if lost {
		outcome = Lost
	}
	if err := s.complete(lost); err != nil {
		s.log.Error("the end of the recording may be missing", zap.Error(err))
		outcome = Lost
	}
	if reason != nil {
		s.log.Warn("the session was ended", zap.NamedError("reason", reason))
		if !errors.Is(reason, context.Canceled) { // which is not about its recording
			outcome = Ended
		}
	}
	fields := []zap.Field{zap.String("outcome", string(outcome)), zap.Duration("duration", time.Since(s.started))}
	if s.file != nil {
		fields = append(fields, zap.String("file", s.file.path))
	}
	s.log.Info("the session is over", fields...)
	outcomes.With(outcome).Inc()
}

// stopWatching stops what waits for the end of the session, so that the end of the
// recorder's connection is not reported as its loss.
func (s *Session) stopWatching() {
	if s.headerIsDue != nil {
		s.headerIsDue.Stop()
	}
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	close(s.over)
}

// complete writes the rest of the recording, and ends the file and the upload.
func (s *Session) complete(lost bool) error {
	errs := []error{s.terminal.cast.finish()}
	for _, sink := range s.sinks {
		// An error of the recorder's sink has been reported.
		if err := sink.close(); sink == s.toFile {
			errs = append(errs, s.file.complete(err))
		}
	}
	switch {
	case s.upload == nil:
	case lost:
		s.upload.Discard()
	default:
		errs = append(errs, s.upload.Complete())
	}
	return errors.Join(errs...)
}

// abandon removes a recording that has not begun.
func (s *Session) abandon() {
	s.stopWatching()
	for _, sink := range s.sinks {
		_ = sink.close() // nothing was written
	}
	if s.upload != nil {
		s.upload.Discard()
	}
	if s.file != nil {
		if err := s.file.discard(); err != nil {
			s.log.Error("the file of a session that did not begin cannot be removed", zap.Error(err))
		}
	}
}
