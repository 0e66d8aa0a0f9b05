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
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"tailscale.com/sessionrecording"
)

// Session is a request that becomes an exec, an attach or a port-forward.
type Session struct {
	site    *Site
	kind    kind
	upgrade string
	id      string
	enforce bool
	started time.Time
	header  sessionrecording.CastHeader
	query   url.Values // of the request
	tty     bool
	unsized bool // the protocol has no sizes
	log     *zap.Logger

	sinks  []*sink
	upload *upload // nil if there is no recorder
	file   *file   // nil if there is none
	toFile *sink   // that of file
	cast   *cast   // nil until the connection is switched
	// headerIsDue writes the recording's header if the terminal does not say its size.
	headerIsDue *time.Timer
	sizes       sizes
	over        chan struct{}      // closed by Close
	cancel      context.CancelFunc // of the request that is sent on

	mu       sync.Mutex
	conn     *conn // nil until the connection is switched
	reason   error // why the session has to end, if it has to
	out, in  int   // requests sent on, and answers that have come or begun to come
	answered bool  // the client was told of an answer other than the switch
	lost     bool  // the recorder has been lost
	closing  bool
	ports    []string // that are forwarded to
	sent     int64    // to the pod
	received int64    // from the pod
}

// Watch returns ctx for the request as it is sent on: s notes whether it is sent to
// the API server, and answered, and cancels it when the session has to end. Whatever
// is said to the client by others than the API server, once it has been sent, does not
// say that nothing has run.
func (s *Session) Watch(ctx context.Context) context.Context {
	ctx, s.cancel = context.WithCancel(ctx)
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

// Wrap returns w for the handlers that follow. When one of them takes over the
// connection, it is given one that records.
//
// It shows nothing of what is below it, so that there is no way to the connection
// but this.
func (s *Session) Wrap(w http.ResponseWriter) http.ResponseWriter {
	return &responseWriter{w, s, http.NewResponseController(w)}
}

type responseWriter struct {
	http.ResponseWriter
	session    *Session
	controller *http.ResponseController
}

// clientGone is what reverse_proxy says in the access log of a request whose client
// has gone before the answer.
const clientGone = 499

// WriteHeader writes the header of the answer.
func (w *responseWriter) WriteHeader(code int) {
	if code >= http.StatusOK && code != clientGone {
		w.session.mu.Lock()
		w.session.answered = true
		w.session.mu.Unlock()
	}
	w.ResponseWriter.WriteHeader(code)
}

// FlushError sends what has been written.
func (w *responseWriter) FlushError() error { return w.controller.Flush() }

// SetReadDeadline and SetWriteDeadline are as those of [http.ResponseController].
func (w *responseWriter) SetReadDeadline(t time.Time) error  { return w.controller.SetReadDeadline(t) }
func (w *responseWriter) SetWriteDeadline(t time.Time) error { return w.controller.SetWriteDeadline(t) }

// EnableFullDuplex is as that of [http.ResponseController].
func (w *responseWriter) EnableFullDuplex() error { return w.controller.EnableFullDuplex() }

// Hijack takes over the connection.
func (w *responseWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	protocol, err := w.session.protocol(w.Header())
	if err != nil {
		w.session.end(err)
		return nil, nil, err
	}
	nc, buffered, err := w.controller.Hijack()
	if err != nil {
		return nil, nil, err
	}
	// The answer, which says that the protocol is switched, is still here.
	if err := buffered.Flush(); err != nil {
		return nil, nil, errors.Join(err, nc.Close())
	}
	// What the client has sent behind its request, without waiting for the answer.
	early := make([]byte, buffered.Reader.Buffered())
	if _, err := io.ReadFull(buffered, early); err != nil {
		return nil, nil, errors.Join(err, nc.Close())
	}
	c := newConn(nc, early, protocol, w.session.cancel)
	w.session.begin(c)
	return c, bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c)), nil
}

// protocol returns the protocol that the API server has chosen in the headers h of
// its answer.
func (s *Session) protocol(h http.Header) (protocol, error) {
	if upgraded := field(h, "Upgrade"); len(upgraded) != 1 || !strings.EqualFold(upgraded[0], s.upgrade) {
		return nil, fmt.Errorf("the API server switched to %q, not to %q", upgraded, s.upgrade)
	}
	if extensions := field(h, "Sec-Websocket-Extensions"); len(extensions) > 0 {
		return nil, fmt.Errorf("the API server uses WebSocket extensions that it was not offered: %q", extensions)
	}
	chosen := versionsIn(h, s.upgrade)
	version := strings.Join(chosen, ",")
	if !known(version, s.upgrade, s.kind) {
		return nil, fmt.Errorf("the API server chose the protocol %q, which cannot be recorded", version)
	}
	status := slices.Contains([]string{remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name, v4Base64Channels}, version)
	if s.kind == forward {
		return s.forwardProtocol(version)
	}
	out := stderr
	if s.tty {
		out = stdout
	}
	if s.upgrade == spdyUpgrade {
		protocol, err := newSPDY((*terminal)(s))
		if err != nil {
			return nil, err
		}
		protocol.status, protocol.out = status, out
		s.unsized = !slices.Contains([]string{remotecommand.StreamProtocolV3Name, remotecommand.StreamProtocolV4Name, remotecommand.StreamProtocolV5Name}, version)
		return protocol, nil
	}
	protocol := &webSocket{
		observer: (*terminal)(s),
		base64:   strings.HasSuffix(version, base64Channels),
		closes:   version == remotecommand.StreamProtocolV5Name,
		status:   status,
		channel:  sessionChannels,
		out:      remotecommand.StreamStdErr,
		errors:   remotecommand.StreamErr,
	}
	if out == stdout {
		protocol.out = remotecommand.StreamStdOut
	}
	return protocol, nil
}

// begin starts the session on c, whose connection has been switched.
func (s *Session) begin(c *conn) {
	s.mu.Lock()
	s.conn = c
	s.started = time.Now()
	if s.kind != forward {
		s.cast = newCast(s.header, s.sinks...)
	}
	reason := s.reason
	s.mu.Unlock()
	if s.kind == forward {
		s.log.Info("port-forward begins", zap.Strings("ports", s.ports))
	} else {
		s.log.Info("the session is recorded", zap.String("command", s.header.Command))
		// Who runs what is on record before anything is printed, as nothing may ever be.
		if s.tty {
			s.headerIsDue = time.AfterFunc(sizeTimeout, s.writeHeader)
		} else {
			s.writeHeader()
		}
	}
	if reason != nil {
		c.end(reason)
	}
}

// writeHeader writes the recording's header, unless that has been done.
func (s *Session) writeHeader() {
	if err := s.cast.open(); err != nil {
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

// watch waits for the end of the upload, which is not to come before that of the
// session.
func (s *Session) watch() {
	select {
	case <-s.upload.ended:
		err := s.upload.err
		if err == nil {
			err = errors.New("it has ended the recording")
		}
		s.recorderFailed(err)
	case <-s.over:
	}
}

// errUnanswered is why a session ended that had been sent to the API server, and to
// which its answer has not come: its client has gone away, or the API server has.
var errUnanswered = errors.New("no answer of the API server has come; whether the command ran is not known")

// Why a session ends, to its user.
var (
	errRecorderLost = errors.New("this session has to be recorded, and its recorder was lost")
	errFileLost     = errors.New("this session has to be recorded, and the proxy cannot write its recording")
)

// recorderFailed is called when the recorder takes nothing any more.
func (s *Session) recorderFailed(err error) {
	s.mu.Lock()
	late := s.lost || s.closing
	s.lost = true
	s.mu.Unlock()
	if late {
		return
	}
	s.upload.discard()
	if s.enforce {
		s.log.Error("the recorder was lost, and the session ends", zap.Stringer("recorder", s.upload.recorder), zap.Error(err))
		s.end(errRecorderLost)
		return
	}
	s.log.Error("the recorder was lost, and the session goes on without", zap.Stringer("recorder", s.upload.recorder), zap.Error(err))
}

// fileFailed is called when the file cannot be written any more.
func (s *Session) fileFailed(err error) {
	s.log.Error("the recording cannot be written, and the session ends", zap.String("file", s.file.Name()), zap.Error(err))
	s.end(errFileLost)
}

// Close ends what Begin began, when the session is over or none has come of the
// request.
func (s *Session) Close() {
	s.cancel()
	s.mu.Lock()
	c, reason, lost := s.conn, s.reason, s.lost
	ports, sent, received := s.ports, s.sent, s.received
	nothingRan := s.out == 0 || s.answered && s.in == s.out
	s.mu.Unlock()
	if c == nil && (nothingRan || s.kind == forward) {
		s.abandon()
		if reason != nil {
			s.log.Warn("the session was ended before it began", zap.NamedError("reason", reason))
			s.site.Count(Ended)
		}
		return
	}
	s.stopWatching()
	switch {
	case c == nil:
		// The command may have run: who asked for it must not be lost.
		s.cast = newCast(s.header, s.sinks...)
		if reason == nil {
			reason = errUnanswered
		}
	case reason == nil:
		reason = c.failed()
	}
	if s.kind == forward {
		s.log.Info("port-forward has ended", zap.Strings("ports", ports), zap.Duration("duration", time.Since(s.started)),
			zap.Int64("bytes_sent", sent), zap.Int64("bytes_received", received))
		return
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
		outcome = Ended
	}
	fields := []zap.Field{zap.String("outcome", string(outcome)), zap.Duration("duration", time.Since(s.started))}
	if s.file != nil {
		fields = append(fields, zap.String("file", s.file.path))
	}
	s.log.Info("the session is over", fields...)
	s.site.Count(outcome)
}

// stopWatching makes the end of the recorder's connection nothing to report.
func (s *Session) stopWatching() {
	if s.headerIsDue != nil {
		s.headerIsDue.Stop()
	}
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	close(s.over)
}

// complete has everything written that belongs into the recording.
func (s *Session) complete(lost bool) error {
	errs := []error{s.cast.finish()}
	for _, sink := range s.sinks {
		// The recorder's may have failed, which has been reported.
		if err := sink.close(); sink == s.toFile {
			errs = append(errs, s.file.complete(err))
		}
	}
	switch {
	case s.upload == nil:
	case lost:
		s.upload.discard()
	default:
		errs = append(errs, s.upload.complete())
	}
	return errors.Join(errs...)
}

// abandon leaves nothing of a recording that has not begun.
func (s *Session) abandon() {
	s.stopWatching()
	for _, sink := range s.sinks {
		_ = sink.close() // nothing was written
	}
	if s.upload != nil {
		s.upload.discard()
	}
	if s.file != nil {
		if err := s.file.discard(); err != nil {
			s.log.Error("the file of a session that did not begin is left", zap.Error(err))
		}
	}
}
