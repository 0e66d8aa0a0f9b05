// SPDX-License-Identifier: Apache-2.0

// Package apievents records what callers ask of the API server: one event for each
// request, in the format of Tailscale's recorder, sent to the recorders that a
// caller's grants name, or a structured line in the log.
//
// An event is sent before the request is: where it must not be missing and no
// recorder takes it, the API server sees no request. So whatever is in the event
// has to be read first. Of a body that is at most [Site.BodyLimit]; the rest
// streams past. Bodies that the API server does not read are not read here either,
// above all those of a GET: a watch would inherit what reading one does to its
// connection.
package apievents

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Outcome is what has become of an event that was to be sent to a recorder.
type Outcome string

// The outcomes.
const (
	Sent    Outcome = "sent"    // a recorder has it
	Unsent  Outcome = "unsent"  // no recorder has it, and the request went on
	Refused Outcome = "refused" // no recorder has it, and the request was refused
)

// Outcomes are all of them.
var Outcomes = []Outcome{Sent, Unsent, Refused}

// Site records the requests of one handler.
type Site struct {
	// Log is where all requests are logged, nil if they are not.
	Log *zap.Logger
	// BodyLimit is how many bytes of a body go into an event.
	BodyLimit int64
	// SecretBodies is whether bodies that hold secrets do as well.
	SecretBodies bool
	// Logger is for what goes wrong.
	Logger *zap.Logger
	// Count is told what has become of every event.
	Count func(Outcome)

	mu sync.Mutex
	// clients are those of the nodes that callers have come by.
	clients map[*tailnet.Node]*client
}

// Caller is who a request comes from.
type Caller struct {
	Peer     *impersonate.Peer
	Identity *impersonate.Identity
	Remote   netip.AddrPort
	// Node is the node that accepted the caller's connection. It is as this node
	// that recorders are dialled.
	Node *tailnet.Node
}

// Concerns reports whether requests of a caller whose grants say that have to pass
// Record.
func (s *Site) Concerns(r *impersonate.Recording) bool { return s.Log != nil || wanted(r) }

// wanted reports whether there is a recorder to send events to, or would have to be.
func wanted(r *impersonate.Recording) bool { return r.Events && r.Wanted() }

// Record records r, of which part of the body has been read and put back when it
// returns, or returns why r is refused.
func (s *Site) Record(r *http.Request, who Caller) *apierrors.StatusError {
	recorded := wanted(&who.Identity.Recording)
	var info requestinfo.Info
	if recorded {
		info = pin.On(r) // what is recorded has to be what is sent
	} else {
		info = requestinfo.Parse(r)
	}
	body, err := s.read(r, info)
	if err != nil {
		return apistatus.BadRequest(apistatus.Other, "reading the body: %v", err)
	}
	if s.Log != nil {
		s.log(r, info, body, who)
	}
	if !recorded {
		return nil
	}
	if info.Ambiguous {
		s.Count(Refused)
		return pin.Refuse(r)
	}
	pin.Recorded(r, len(body.data) > 0)
	payload, err := json.Marshal(event(r, body, who))
	if err == nil {
		err = s.client(who.Node).send(r.Context(), who.Identity.Recording.Recorders, payload)
	}
	switch {
	case err == nil:
		s.Count(Sent)
		return nil
	case who.Identity.Recording.Enforce:
		s.Count(Refused)
		s.Logger.Error("no recorder takes the event of a request, which is refused", zap.Error(err), zap.String("user", who.Identity.User))
		return apistatus.Forbidden(apistatus.Recording, "the request has to be recorded, and no recorder takes that; the proxy's log says why")
	default:
		s.Count(Unsent)
		s.Logger.Warn("no recorder takes the event of a request, which goes on", zap.Error(err), zap.String("user", who.Identity.User))
		return nil
	}
}

// Close closes connections that nothing uses any more.
func (s *Site) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.clients {
		c.transport.CloseIdleConnections()
	}
}

func (s *Site) client(node *tailnet.Node) *client {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.clients[node]
	if !ok {
		if s.clients == nil {
			s.clients = make(map[*tailnet.Node]*client)
		}
		c = newClient(node.Dial)
		s.clients[node] = c
	}
	return c
}

// body is what an event says about the body of a request.
type body struct {
	data []byte
	// cut is whether there is more of it.
	cut bool
	// leftOut is why there is a body and data is empty all the same.
	leftOut string
}

// read returns what is said about the body of r, from which it reads no more than
// is said, and one byte.
func (s *Site) read(r *http.Request, info requestinfo.Info) (body, error) {
	if r.Body == nil || r.Body == http.NoBody {
		return body{}, nil
	}
	switch r.Method {
	case http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete:
	default:
		return body{leftOut: "the API server does not read it"}, nil
	}
	switch {
	case info.PassesOn():
		return body{leftOut: "it is not for the API server"}, nil
	case holdsSecrets(info) && !s.SecretBodies:
		return body{leftOut: "it may hold secrets"}, nil
	case s.BodyLimit == 0:
		return body{leftOut: "the limit is 0"}, nil
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, s.BodyLimit+1))
	if err != nil {
		return body{}, err
	}
	r.Body = putBack{io.MultiReader(bytes.NewReader(data), r.Body), r.Body}
	if int64(len(data)) > s.BodyLimit {
		return body{data: data[:s.BodyLimit], cut: true}, nil
	}
	return body{data: data}, nil
}

// putBack is a body of which something has been read.
type putBack struct {
	io.Reader
	io.Closer
}

// holdsSecrets reports whether the body of a request that asks for i is made to hold
// what nobody but the API server should see: that of a Secret, or of the question
// whose a token is.
func holdsSecrets(i requestinfo.Info) bool {
	return i.APIGroup == "" && i.Resource == "secrets" || i.APIGroup == "authentication.k8s.io" && i.Resource == "tokenreviews"
}

// forEvent returns the body as an event has it. The format has no place for what is
// missing. That it stands where a client could write the same betrays nothing: what
// was cut is longer than anything that was not.
func (b body) forEvent() []byte {
	switch {
	case b.leftOut != "":
		return fmt.Appendf(nil, "[the body is left out: %s]", b.leftOut)
	case b.cut:
		return fmt.Appendf(bytes.Clone(b.data), "\n[the body is cut off after %d bytes]", len(b.data))
	}
	return b.data
}

// event returns what a recorder is sent about r.
func event(r *http.Request, b body, who Caller) *sessionrecording.Event {
	e := &sessionrecording.Event{
		Type:      sessionrecording.KubernetesAPIEventType,
		Timestamp: time.Now().Unix(),
		UserAgent: r.UserAgent(),
		Request: sessionrecording.Request{
			Method:          r.Method,
			Path:            r.URL.String(),
			Body:            b.forEvent(),
			QueryParameters: r.URL.Query(),
		},
		Kubernetes: kubernetes(r),
		Source:     sessionrecording.Source{Node: who.Peer.Node, NodeID: who.Peer.NodeID},
	}
	if who.Peer.Tagged() {
		e.Source.NodeTags = who.Peer.Tags
	} else {
		e.Source.NodeUser, e.Source.NodeUserID = who.Peer.Login, who.Peer.UserID
	}
	return e
}

// kubernetes returns what r asks for in the words of the format, which are the API
// server's.
func kubernetes(r *http.Request) sessionrecording.KubernetesRequestInfo {
	info := requestinfo.Detailed(r)
	return sessionrecording.KubernetesRequestInfo{
		IsResourceRequest: info.IsResourceRequest,
		Path:              info.Path,
		Verb:              info.Verb,
		APIPrefix:         info.APIPrefix,
		APIGroup:          info.APIGroup,
		APIVersion:        info.APIVersion,
		Namespace:         info.Namespace,
		Resource:          info.Resource,
		Subresource:       info.Subresource,
		Name:              info.Name,
		Parts:             info.Parts,
		FieldSelector:     info.FieldSelector,
		LabelSelector:     info.LabelSelector,
	}
}

// log writes a line about r.
func (s *Site) log(r *http.Request, i requestinfo.Info, b body, who Caller) {
	text, binary := string(b.data), ""
	if !utf8.Valid(b.data) { // kubectl speaks protobuf
		text, binary = "", base64.StdEncoding.EncodeToString(b.data)
	}
	as, asGroups := "", []string(nil)
	if wish := who.Identity.ActAs; wish != nil {
		as, asGroups = wish.Target.User, wish.Target.Groups
	}
	s.Log.Info("API request",
		zap.String("user", who.Identity.User),
		zap.Strings("groups", who.Identity.Groups),
		zap.String("as", as),
		zap.Strings("as_groups", asGroups),
		zap.String("node", who.Identity.Node),
		zap.Stringer("remote_addr", who.Remote),
		zap.String("verb", i.Verb),
		zap.String("group", i.APIGroup),
		zap.String("version", i.APIVersion),
		zap.String("resource", i.Resource),
		zap.String("subresource", i.Subresource),
		zap.String("namespace", i.Namespace),
		zap.String("name", i.Name),
		zap.String("class", string(i.Class())),
		zap.String("method", r.Method),
		zap.String("uri", r.URL.String()),
		zap.String("user_agent", r.UserAgent()),
		zap.String("body", text),
		zap.String("body_base64", binary),
		zap.Bool("body_cut", b.cut),
		zap.String("body_left_out", b.leftOut))
}
