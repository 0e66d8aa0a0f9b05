// SPDX-License-Identifier: Apache-2.0

// Package apievents records what callers ask of the API server: one event for each
// request, in the format of Tailscale's recorder, sent to the recorders that a
// caller's grants name, or a structured line in the log.
//
// An event is sent before its request: if recording is enforced and no recorder
// accepts the event, the API server never sees the request. So the body has to be read
// first, but only up to [Recorder.BodyLimit]. The rest streams through. Bodies that the
// API server does not read are not read here either, above all the body of a GET:
// reading it would change how the connection of a watch behaves.
//
// A request that was recorded is sent as the recorder was told, or not at all: see
// package pin.
package apievents

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"time"
	"unicode/utf8"

	"go.uber.org/zap"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/pin"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recorder"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// Outcome is what became of an event that was to be sent to a recorder.
type Outcome string

// The outcomes.
const (
	Sent    Outcome = "sent"    // a recorder has the event
	Unsent  Outcome = "unsent"  // no recorder has the event, and the request was forwarded
	Refused Outcome = "refused" // no recorder has the event, and the request was refused
)

var events = metrics.NewCounter("events_total",
	"Requests that were to be sent to a recorder as events, by what has become of that.",
	"outcome", Sent, Unsent, Refused)

// Recorder records the requests of one handler.
type Recorder struct {
	// Log logs every request. It may be nil.
	Log *zap.Logger
	// BodyLimit is how many bytes of a body go into an event.
	BodyLimit int64
	// RefuseCut says that a request with a longer body is refused where recording is
	// enforced.
	RefuseCut bool
	// SecretBodies is whether bodies that may hold secrets go into events as well.
	SecretBodies bool
	// Client sends events.
	Client *recorder.Client
	// Logger logs failures.
	Logger *zap.Logger
}

// wanted reports whether events are to be sent, by a recorder that may not be known.
func wanted(recording *impersonate.Recording) bool { return recording.Events && recording.Wanted() }

// Record records r, if caller's grants or the config say so. It may read a part of the
// body, and puts that back. It returns an error if r has to be refused.
func (rec *Recorder) Record(r *http.Request, caller authn.Caller) error {
	recording := &caller.Identity.Recording
	recorded := wanted(recording)
	if rec.Log == nil && !recorded {
		return nil
	}
	var info requestinfo.Info
	if recorded {
		info = pin.On(r) // what is recorded has to be what is sent
	} else {
		info = requestinfo.Parse(r)
	}
	body, err := rec.read(r, info)
	if err != nil {
		return apistatus.Because(err, apistatus.BadRequest(apistatus.Other, "the body of the request cannot be read; the proxy's log says why"))
	}
	if rec.Log != nil {
		rec.log(r, info, body, caller)
	}
	if !recorded {
		return nil
	}
	if info.Ambiguous {
		events.With(Refused).Inc()
		return pin.Refuse(r)
	}
	if recording.Enforce {
		if err := rec.checkWhole(r, body); err != nil {
			events.With(Refused).Inc()
			return err
		}
	}
	pin.Recorded(r, len(body.data) > 0)
	payload, err := json.Marshal(event(r, body, caller))
	if err == nil {
		err = rec.Client.Send(r.Context(), caller.Node, recording.Recorders, payload)
	}
	switch {
	case err == nil:
		events.With(Sent).Inc()
		return nil
	case recording.Enforce:
		events.With(Refused).Inc()
		rec.Logger.Error("no recorder takes the event of a request, which is refused", zap.Error(err), zap.String("user", caller.Identity.User))
		return apistatus.Forbidden(apistatus.Recording, "the request has to be recorded, and no recorder takes that; the proxy's log says why")
	default:
		events.With(Unsent).Inc()
		rec.Logger.Warn("no recorder takes the event of a request, which goes on", zap.Error(err), zap.String("user", caller.Identity.User))
		return nil
	}
}

// maxTarget is how many bytes of a request's method and URL an event contains. It bounds
// what an event takes, as parts of the URL are in it several times.
const maxTarget = 16 << 10

// long reports whether an event does not contain all of r's URL.
func long(r *http.Request) bool { return len(r.Method)+len(r.URL.String()) > maxTarget }

// checkWhole returns an error if the event of r does not say all of what r asks for, and
// therefore could hide it.
func (rec *Recorder) checkWhole(r *http.Request, b body) error {
	if long(r) {
		return apistatus.BadRequest(apistatus.Recording, "the request has to be recorded, and its path and query are longer than %d bytes", maxTarget)
	}
	if b.cut && rec.RefuseCut {
		return apistatus.Forbidden(apistatus.Recording, "the request has to be recorded, and its body is longer than the %d bytes of event_body_limit", rec.BodyLimit)
	}
	return nil
}

// body is what an event says about the body of a request.
type body struct {
	data []byte
	// cut is whether the body is longer than data.
	cut bool
	// leftOut is why data is empty although there is a body.
	leftOut string
}

// read returns what an event says about the body of r. It reads at most one byte more
// than that.
func (rec *Recorder) read(r *http.Request, info requestinfo.Info) (body, error) {
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
	case holdsSecrets(info) && !rec.SecretBodies:
		return body{leftOut: "it may hold secrets"}, nil
	case rec.BodyLimit == 0:
		return body{leftOut: "the limit is 0"}, nil
	}
	data, err := io.ReadAll(io.LimitReader(r.Body, rec.BodyLimit+1))
	if err != nil {
		return body{}, err
	}
	r.Body = putBack{io.MultiReader(bytes.NewReader(data), r.Body), r.Body}
	if int64(len(data)) > rec.BodyLimit {
		return body{data: data[:rec.BodyLimit], cut: true}, nil
	}
	return body{data: data}, nil
}

// putBack is a body whose start was read and is put back.
type putBack struct {
	io.Reader
	io.Closer
}

// holdsSecrets reports whether the body of a request that asks for i may hold what only
// the API server should see: it is a Secret, or a TokenReview, which holds a token.
func holdsSecrets(i requestinfo.Info) bool {
	return i.APIGroup == "" && i.Resource == "secrets" || i.APIGroup == "authentication.k8s.io" && i.Resource == "tokenreviews"
}

// forEvent returns the body for an event. The format has no field that says what is
// missing, so a note takes its place. A client that writes such a note itself gains
// nothing: a body that was cut is longer than any that was not.
func (b body) forEvent() []byte {
	switch {
	case b.leftOut != "":
		return fmt.Appendf(nil, "[the body is left out: %s]", b.leftOut)
	case b.cut:
		return fmt.Appendf(bytes.Clone(b.data), "\n[the body is cut off after %d bytes]", len(b.data))
	}
	return b.data
}

// event returns the event of r.
func event(r *http.Request, b body, caller authn.Caller) *sessionrecording.Event {
	e := &sessionrecording.Event{
		Type:      sessionrecording.KubernetesAPIEventType,
		Timestamp: time.Now().Unix(),
		UserAgent: clip.String(r.UserAgent()),
		Request: sessionrecording.Request{
			Method:          clip.String(r.Method),
			Path:            clip.String(r.URL.String()),
			Body:            b.forEvent(),
			QueryParameters: clipQuery(r.URL.Query()),
		},
		Source:     sessionrecording.Source{Node: caller.Peer.Node, NodeID: caller.Peer.NodeID},
		Kubernetes: kubernetes(r),
	}
	if caller.Peer.Tagged() {
		e.Source.NodeTags = caller.Peer.Tags
	} else {
		e.Source.NodeUser, e.Source.NodeUserID = caller.Peer.Login, caller.Peer.UserID
	}
	return e
}

// kubernetes returns what r asks for, in the terms of the API server, which the format
// uses.
func kubernetes(r *http.Request) sessionrecording.KubernetesRequestInfo {
	info := requestinfo.Detailed(r)
	return sessionrecording.KubernetesRequestInfo{
		IsResourceRequest: info.IsResourceRequest,
		Path:              clip.String(info.Path),
		Verb:              clip.String(info.Verb),
		APIPrefix:         clip.String(info.APIPrefix),
		APIGroup:          clip.String(info.APIGroup),
		APIVersion:        clip.String(info.APIVersion),
		Namespace:         clip.String(info.Namespace),
		Resource:          clip.String(info.Resource),
		Subresource:       clip.String(info.Subresource),
		Name:              clip.String(info.Name),
		Parts:             clip.Strings(info.Parts, maxValues),
		FieldSelector:     clip.String(info.FieldSelector),
		LabelSelector:     clip.String(info.LabelSelector),
	}
}

// maxValues is how many values of one kind an event has: parameters of the query, parts of
// the path, groups to act as.
const maxValues = 128

// clipQuery returns query, cut to what an event may have of it, all its values together.
func clipQuery(query url.Values) url.Values {
	out, left := make(url.Values, min(len(query), maxValues)), maxValues
	for _, name := range slices.Sorted(maps.Keys(query)) {
		if left <= 0 {
			out["[cut]"] = []string{fmt.Sprintf("%d parameters", len(query))}
			break
		}
		out[clip.String(name)] = clip.Strings(query[name], left)
		left -= len(query[name])
	}
	return out
}

// log logs r.
func (rec *Recorder) log(r *http.Request, i requestinfo.Info, b body, caller authn.Caller) {
	text, binary := string(b.data), ""
	if !utf8.Valid(b.data) { // kubectl speaks protobuf
		text, binary = "", base64.StdEncoding.EncodeToString(b.data)
	}
	as, asGroups := "", []string(nil)
	if actAs := caller.Identity.ActAs; actAs != nil {
		as, asGroups = clip.String(actAs.Target.User), clip.Strings(actAs.Target.Groups, maxValues)
	}
	rec.Log.Info("API request",
		zap.String("user", caller.Identity.User),
		zap.Strings("groups", caller.Identity.Groups),
		zap.Strings("held_back", caller.Identity.HeldBack),
		zap.String("as", as),
		zap.Strings("as_groups", asGroups),
		zap.String("node", caller.Identity.Node),
		zap.Stringer("remote_addr", caller.Conn.Remote),
		zap.String("verb", clip.String(i.Verb)),
		zap.String("group", clip.String(i.APIGroup)),
		zap.String("version", clip.String(i.APIVersion)),
		zap.String("resource", clip.String(i.Resource)),
		zap.String("subresource", clip.String(i.Subresource)),
		zap.String("namespace", clip.String(i.Namespace)),
		zap.String("name", clip.String(i.Name)),
		zap.String("class", string(i.Class())),
		zap.String("method", clip.String(r.Method)),
		zap.String("uri", clip.String(r.URL.String())),
		zap.String("user_agent", clip.String(r.UserAgent())),
		zap.String("body", text),
		zap.String("body_base64", binary),
		zap.Bool("body_cut", b.cut),
		zap.String("body_left_out", b.leftOut))
}
