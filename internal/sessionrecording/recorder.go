// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"context"
	"crypto/rand"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recorder"
)

// Outcome is what became of the recording of a session.
type Outcome string

// The outcomes.
const (
	Recorded   Outcome = "recorded"   // from its beginning to its end
	Refused    Outcome = "refused"    // the session did not begin
	Ended      Outcome = "ended"      // the session was ended because it could not be recorded any more
	Unrecorded Outcome = "unrecorded" // the whole session was not recorded
	Lost       Outcome = "lost"       // the session continued unrecorded, or the end of the recording is missing
)

var outcomes = metrics.NewCounter("recordings_total",
	"Sessions that were to be recorded, by what has become of that.",
	"outcome", Recorded, Refused, Ended, Unrecorded, Lost)

// Recorder records the sessions of one handler.
type Recorder struct {
	// Dir is the directory for recordings, nil if none are kept locally.
	Dir *Dir
	// Waits returns how long a recording has waited to be stored. It is nil if none is
	// stored elsewhere.
	Waits func() time.Duration
	// StoreWithin is how long recordings may wait before sessions that have to be recorded
	// are refused, 0 for any time.
	StoreWithin time.Duration
	// Required says that the sessions of all callers have to be recorded into Dir.
	Required bool
	// MaxSize is how many bytes all recordings in Dir may take, 0 for no limit.
	MaxSize int64
	// Retention is how long recordings are kept, 0 for ever.
	Retention time.Duration
	// Allowed are the kinds of sessions that may take place where recording is enforced,
	// of [Kinds]. Nil allows all.
	Allowed []string
	// Input says that what is typed is recorded as well, even if the terminal does not
	// show it.
	Input bool
	// Hold adds n bytes, fewer if n is negative, to what the connection of a request with
	// the context ctx counts as, and reports whether its caller may hold so much. If it is
	// nil, nobody counts.
	Hold func(ctx context.Context, n int64) bool
	// Client uploads recordings.
	Client *recorder.Client
	Logger *zap.Logger
}

// Begin returns the session that r becomes, to be closed when r has been handled. It
// returns nil if r does not become a session, or one that is not recorded, and an error
// if r has to be refused. If a recorder is required, it has answered.
func (rec *Recorder) Begin(r *http.Request, caller authn.Caller) (*Session, error) {
	if rec.Dir == nil && !caller.Identity.Recording.Wanted() {
		return nil, nil
	}
	session, err := rec.begin(r, caller)
	if err != nil {
		outcomes.With(Refused).Inc()
	}
	return session, err
}

func (rec *Recorder) begin(r *http.Request, caller authn.Caller) (*Session, error) {
	d := decide(r)
	if !pin.Require(r, d.holds) {
		return nil, apistatus.Forbidden(apistatus.Rewritten, "whether to record the session cannot be decided: the config sets a variable of tailscale_impersonate")
	}
	switch d.kind {
	case ambiguous:
		return nil, apistatus.BadRequest(apistatus.Recording, "the path %q can be understood in several ways, and whether the session has to be recorded depends on it", clip.String(r.URL.EscapedPath()))
	case unrecordable:
		if rec.required(caller) {
			return nil, apistatus.Forbidden(apistatus.Recording, "the sessions of %s have to be recorded, and what goes through %s cannot be", caller.Peer, clip.String(r.URL.Path))
		}
		rec.Logger.Warn("a session that cannot be recorded goes on without",
			zap.Stringer("user", caller.Peer), zap.String("method", clip.String(r.Method)), zap.String("path", clip.String(r.URL.Path)))
		outcomes.With(Unrecorded).Inc()
		return nil, nil
	case exec, attach, forward:
		if rec.required(caller) && rec.Allowed != nil && !slices.Contains(rec.Allowed, string(d.kind)) {
			return nil, apistatus.Forbidden(apistatus.Recording, "the sessions of %s have to be recorded, and enforced_sessions does not allow %s", caller.Peer, d.kind)
		}
	default:
		return nil, nil
	}

	protocol, err := upgradeOf(r, d.kind)
	if err != nil {
		return nil, err
	}
	// The API server uses no extension that it is not offered.
	removeField(r.Header, "Sec-Websocket-Extensions")
	session := rec.newSession(r, caller, d, protocol)
	if d.kind != forward {
		if err := session.prepare(r.Context(), caller); err != nil {
			return nil, err
		}
		if len(session.sinks) == 0 {
			session.log.Warn("the session goes on without a recording")
			outcomes.With(Unrecorded).Inc()
			return nil, nil
		}
	}
	return session, nil
}

// required reports whether the sessions of caller have to be recorded, by a recorder or
// into files.
func (rec *Recorder) required(caller authn.Caller) bool {
	return rec.Required || caller.Identity.Recording.Enforce
}

// overdue reports whether a recording has waited to be stored for too long.
func (rec *Recorder) overdue() bool {
	return rec.StoreWithin > 0 && rec.Waits != nil && rec.Waits() > rec.StoreWithin
}

// newSession returns the session that r becomes.
func (rec *Recorder) newSession(r *http.Request, caller authn.Caller, d decision, upgrade string) *Session {
	query := r.URL.Query()
	command, container := strings.Join(query["command"], " "), clip.String(query.Get("container"))
	now := time.Now()
	session := &Session{
		recorder: rec,
		kind:     d.kind,
		upgrade:  upgrade,
		id:       now.UTC().Format("20060102T150405Z") + "-" + strings.ToLower(rand.Text()),
		enforce:  caller.Identity.Recording.Enforce,
		started:  now,
		over:     make(chan struct{}),
		begun:    make(chan struct{}),
		cancel:   func() {},
		client:   caller.Conn,
		header: sessionrecording.CastHeader{
			Command:       clip.String(command),
			SrcNode:       caller.Peer.Node,
			SrcNodeID:     caller.Peer.NodeID,
			SrcNodeTags:   caller.Peer.Tags,
			SrcNodeUserID: caller.Peer.UserID,
			SrcNodeUser:   caller.Peer.Login,
			Kubernetes: &sessionrecording.Kubernetes{
				PodName:     clip.String(d.name),
				Namespace:   clip.String(d.namespace),
				Container:   container,
				SessionType: string(d.kind),
			},
		},
	}
	if d.kind == forward {
		session.forwarding = &forwarding{query: query}
	} else {
		session.terminal = newTerminal(isTrue(query["tty"]), session.over)
		session.terminal.input = rec.Input
		if session.header.Command != command {
			session.command = command
		}
	}
	session.log = rec.Logger.With(
		zap.String("session", session.id),
		zap.String("type", string(d.kind)),
		zap.Stringer("user", caller.Peer),
		zap.String("node", caller.Peer.Node),
		zap.Stringer("remote_addr", caller.Conn.Remote),
		zap.String("namespace", session.header.Kubernetes.Namespace),
		zap.String("pod", session.header.Kubernetes.PodName),
		zap.String("container", container),
	)
	return session
}

// isTrue reads a query parameter as the API server does.
func isTrue(values []string) bool {
	return len(values) > 0 && !strings.EqualFold(values[0], "false") && values[0] != "0"
}

// prepare opens what s is recorded to. It returns an error if s must not begin.
func (s *Session) prepare(ctx context.Context, caller authn.Caller) error {
	if caller.Identity.Recording.Wanted() {
		if err := s.reach(ctx, caller); err != nil {
			return err
		}
	}
	if s.recorder.Dir == nil {
		return nil
	}
	required := s.recorder.required(caller)
	if required && s.recorder.overdue() {
		s.abandon()
		return apistatus.Unavailable(apistatus.Recording, "the session has to be recorded, and the recordings of the proxy have not been stored within record_store_within")
	}
	var err error
	s.file, err = s.recorder.Dir.create(s.id, s.recorder.MaxSize)
	switch {
	case err == nil:
	case errors.Is(err, errQuota) && required:
		s.abandon()
		return apistatus.Unavailable(apistatus.Recording, "the session has to be recorded, and the recordings of the proxy have reached record_max_size")
	case errors.Is(err, errQuota):
		s.log.Error("the session has no file, as the recordings have reached record_max_size")
		return nil
	default:
		s.log.Error("the session cannot be recorded", zap.Error(err))
		s.abandon()
		return apistatus.Unavailable(apistatus.Recording, "the session cannot be recorded, as the proxy cannot write its recordings; its log says why")
	}
	if !required {
		s.file.beyondQuota = s.fileCut
	}
	s.toFile = newSink(s.file, errFileLost, s.fileFailed)
	s.sinks = append(s.sinks, s.toFile)
	return nil
}

// reach connects to a recorder. It returns an error if there is none and s must not
// begin without.
func (s *Session) reach(ctx context.Context, caller authn.Caller) error {
	var err error
	if s.upload, err = s.recorder.Client.Upload(ctx, caller.Node, &caller.Identity.Recording); err != nil {
		s.log.Error("no recorder can be reached", zap.Error(err))
		s.lost = true
		if s.enforce {
			return apistatus.Forbidden(apistatus.Recording, "the session has to be recorded, and no recorder can be reached; the proxy's log says why")
		}
		return nil
	}
	s.log.Info("a recorder has been reached", zap.Stringer("recorder", s.upload.Recorder()))
	var required error
	if s.enforce {
		required = errRecorderLost
	}
	s.sinks = append(s.sinks, newSink(s.upload, required, s.recorderFailed))
	go s.watch()
	return nil
}
