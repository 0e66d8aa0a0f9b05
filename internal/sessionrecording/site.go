// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"context"
	"crypto/rand"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

// Outcome is what has become of the recording of a session.
type Outcome string

// The outcomes.
const (
	Recorded   Outcome = "recorded"   // from its beginning to its end
	Refused    Outcome = "refused"    // the session did not begin
	Ended      Outcome = "ended"      // the session was ended, as it could not be recorded any more
	Unrecorded Outcome = "unrecorded" // the session went on without, from its beginning
	Lost       Outcome = "lost"       // the session went on without, or its end is missing
)

// Outcomes are all of them.
var Outcomes = []Outcome{Recorded, Refused, Ended, Unrecorded, Lost}

// Site records the sessions of one handler.
type Site struct {
	// Dir is the directory for recordings, empty if none are kept locally.
	Dir    string
	Logger *zap.Logger
	// Count is told how every recording has ended.
	Count func(Outcome)

	// failures remembers when a caller was refused as no recorder could be reached.
	// kubectl tries a session that was refused again over another protocol, and
	// its user is not to wait twice.
	mu       sync.Mutex
	failures map[netip.Addr]time.Time
}

// Caller is who a request comes from.
type Caller struct {
	Peer      *impersonate.Peer
	Recording *impersonate.Recording
	// Remote is the caller's address.
	Remote netip.AddrPort
	// Dial connects to recorders, as the node that accepted the caller's
	// connection.
	Dial DialFunc
}

// Concerns reports whether requests of a caller whose grants say that have to pass
// Begin.
func (s *Site) Concerns(r *impersonate.Recording) bool { return s.Dir != "" || r.Wanted() }

// Begin decides what r is to whoever records sessions. It returns r as it is to be
// sent on, and a session if r becomes one, or why r is refused. When it returns a
// session, the recorder that has to be reached has been reached. Close must be
// called on it.
func (s *Site) Begin(r *http.Request, who Caller) (*http.Request, *Session, *apierrors.StatusError) {
	d := decide(r)
	switch d.kind {
	case ambiguous:
		return s.refuse(r, apistatus.BadRequest(apistatus.Recording, "the path %q can be understood in several ways, and whether the session has to be recorded depends on it", r.URL.EscapedPath()))
	case door:
		if who.Recording.Enforce {
			return s.refuse(r, apistatus.Forbidden(apistatus.Recording, "the sessions of %s have to be recorded, and what goes through %s cannot be", who.Peer, r.URL.Path))
		}
		s.Logger.Warn("a session that cannot be recorded goes on without",
			zap.Stringer("user", who.Peer), zap.String("method", r.Method), zap.String("path", r.URL.Path))
		s.Count(Unrecorded)
		return withDecision(r, d), nil, nil
	case exec, attach, forward:
	default:
		return withDecision(r, d), nil, nil
	}

	upgrade, refused := upgradeOf(r, d.kind)
	if refused != nil {
		return s.refuse(r, refused)
	}
	// What the API server is not offered, it does not use.
	removeField(r.Header, "Sec-Websocket-Extensions")
	session := newSession(s, r, who, d, upgrade)
	if d.kind != forward {
		if refused := session.prepare(r.Context(), who); refused != nil {
			return s.refuse(r, refused)
		}
		if len(session.sinks) == 0 {
			session.log.Warn("the session goes on without a recording")
			s.Count(Unrecorded)
			return withDecision(r, d), nil, nil
		}
	}
	return withDecision(r, d), session, nil
}

func (s *Site) refuse(r *http.Request, refused *apierrors.StatusError) (*http.Request, *Session, *apierrors.StatusError) {
	s.Count(Refused)
	return r, nil, refused
}

// newSession returns the session that r becomes.
func newSession(s *Site, r *http.Request, who Caller, d decision, upgrade string) *Session {
	query := r.URL.Query()
	now := time.Now()
	session := &Session{
		site:    s,
		kind:    d.kind,
		upgrade: upgrade,
		id:      now.UTC().Format("20060102T150405Z") + "-" + strings.ToLower(rand.Text()),
		enforce: who.Recording.Enforce,
		started: now,
		over:    make(chan struct{}),
		cancel:  func() {},
		sizes:   sizes{known: make(chan struct{})},
		header: sessionrecording.CastHeader{
			Command:       strings.Join(query["command"], " "),
			SrcNode:       who.Peer.Node,
			SrcNodeID:     who.Peer.NodeID,
			SrcNodeTags:   who.Peer.Tags,
			SrcNodeUserID: who.Peer.UserID,
			SrcNodeUser:   who.Peer.Login,
			Kubernetes: &sessionrecording.Kubernetes{
				PodName:     d.name,
				Namespace:   d.namespace,
				Container:   query.Get("container"),
				SessionType: string(d.kind),
			},
		},
		tty:   isTrue(query["tty"]),
		query: query,
	}
	session.log = s.Logger.With(
		zap.String("session", session.id),
		zap.String("type", string(d.kind)),
		zap.Stringer("user", who.Peer),
		zap.String("node", who.Peer.Node),
		zap.Stringer("remote_addr", who.Remote),
		zap.String("namespace", d.namespace),
		zap.String("pod", d.name),
		zap.String("container", query.Get("container")),
	)
	return session
}

// isTrue reads a query parameter as the API server does.
func isTrue(values []string) bool {
	return len(values) > 0 && !strings.EqualFold(values[0], "false") && values[0] != "0"
}

// prepare makes s ready to be recorded, or returns why it must not begin.
func (s *Session) prepare(ctx context.Context, who Caller) *apierrors.StatusError {
	if who.Recording.Wanted() {
		if refused := s.reach(ctx, who); refused != nil {
			return refused
		}
	}
	if s.site.Dir == "" {
		return nil
	}
	var err error
	if s.file, err = createFile(s.site.Dir, s.id); err != nil {
		s.log.Error("the session cannot be recorded", zap.Error(err))
		s.abandon()
		return apistatus.Unavailable(apistatus.Recording, "the session cannot be recorded, as the proxy cannot write its recordings; its log says why")
	}
	s.toFile = newSink(s.file, errFileLost, s.fileFailed)
	s.sinks = append(s.sinks, s.toFile)
	return nil
}

// reach connects to a recorder, or returns why the session must not begin.
func (s *Session) reach(ctx context.Context, who Caller) *apierrors.StatusError {
	caller := who.Remote.Addr()
	var err error
	switch {
	case len(who.Recording.Recorders) == 0:
		s.log.Error("the caller's grants name no address of a recorder; a control server that knows recorders' tags puts it there")
	case s.enforce && s.site.failedBefore(caller):
		s.log.Error("no recorder could be reached a moment ago")
	default:
		if s.upload, err = connect(ctx, who.Recording.Recorders, who.Dial, connectTimeout); err != nil {
			s.log.Error("no recorder can be reached", zap.Error(err))
			// A caller that goes away says nothing about recorders.
			if s.enforce && ctx.Err() == nil {
				s.site.noteFailure(caller)
			}
		}
	}
	if s.upload == nil {
		s.lost = true
		if s.enforce {
			return apistatus.Forbidden(apistatus.Recording, "the session has to be recorded, and no recorder can be reached; the proxy's log says why")
		}
		return nil
	}
	s.log.Info("a recorder has been reached", zap.Stringer("recorder", s.upload.recorder))
	var required error
	if s.enforce {
		required = errRecorderLost
	}
	s.sinks = append(s.sinks, newSink(s.upload, required, s.recorderFailed))
	go s.watch()
	return nil
}

// failedBefore reports whether the caller was refused for that a moment ago.
func (s *Site) failedBefore(caller netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.failures[caller]
	return ok && time.Since(at) < connectTimeout
}

func (s *Site) noteFailure(caller netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failures == nil {
		s.failures = make(map[netip.Addr]time.Time)
	}
	for other, at := range s.failures {
		if time.Since(at) >= connectTimeout {
			delete(s.failures, other)
		}
	}
	s.failures[caller] = time.Now()
}

// known reports whether the API server has chosen a protocol that is understood.
func known(version, upgrade string, k kind) bool {
	return version == "" && upgrade == spdyUpgrade || slices.Contains(versions(upgrade, k), version)
}
