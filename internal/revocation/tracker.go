// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"context"
	"net/http"
	"reflect"
	"slices"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// Generation is the set of trackers of one Caddy config.
type Generation struct {
	registry *Registry
	trackers []*Tracker
}

// Tracker tracks the open requests of one handler.
type Tracker struct {
	generation *Generation
	listeners  []string
	settings   any

	// The registry's mutex guards what follows.

	// policies are the tracker's own policy, or those of the trackers that replaced
	// it. A request must satisfy all of them.
	policies []Policy
	// next is the tracker that replaced this one, nil if there is none.
	next *Tracker
	// open is the first of the tracker's open requests, nil if there is none.
	open *Request
	// armed reports whether a check is scheduled.
	armed bool
}

// NewTracker adds a tracker to the generation. listeners are the addresses of its
// server, as configured. The policy follows from settings: trackers whose settings are
// deeply equal have the same policy.
func (g *Generation) NewTracker(listeners []string, settings any, policy Policy) *Tracker {
	t := &Tracker{generation: g, listeners: listeners, settings: settings, policies: []Policy{policy}}
	g.trackers = append(g.trackers, t)
	return t
}

// Run makes g the generation that runs in this process. From then on g's policies
// apply to requests that began under an earlier config: the policy of the tracker with
// the same listener and settings; if there is none, that of the tracker with the same
// listener that is new in g, or all of them if there are several. Without any tracker
// on the same listener, the old policy stays. Further calls do nothing.
func (g *Generation) Run() {
	r := g.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	if slices.ContainsFunc(r.trackers, func(t *Tracker) bool { return t.generation == g }) {
		return
	}
	before := r.trackers
	r.trackers = slices.Clone(g.trackers)
	for _, old := range before {
		replacements := g.replacements(old, before)
		switch len(replacements) {
		case 0:
		case 1:
			old.moveTo(replacements[0])
			continue
		default:
			old.policies = nil
			for _, t := range replacements {
				old.policies = append(old.policies, t.policies...)
			}
		}
		if old.armed { // it has requests, or its next one would be unknown
			r.trackers = append(r.trackers, old)
		}
	}
}

// replacements returns the trackers of g whose policies apply to old's requests.
func (g *Generation) replacements(old *Tracker, before []*Tracker) (changed []*Tracker) {
	for _, t := range g.trackers {
		switch {
		case !t.shares(old):
		case t.equal(old):
			return []*Tracker{t}
		case !slices.ContainsFunc(before, func(b *Tracker) bool { return t.shares(b) && t.equal(b) }):
			changed = append(changed, t)
		}
	}
	return changed
}

func (t *Tracker) shares(other *Tracker) bool {
	return slices.ContainsFunc(t.listeners, func(l string) bool { return slices.Contains(other.listeners, l) })
}

func (t *Tracker) equal(other *Tracker) bool { return reflect.DeepEqual(t.settings, other.settings) }

// moveTo hands t's requests over to next, including those that are still to come.
func (t *Tracker) moveTo(next *Tracker) {
	t.next = next
	for t.open != nil {
		r := t.open
		t.remove(r)
		next.add(r)
	}
}

// Track tracks r, a request of caller, until [Request.Close]. The result is the
// context to forward r with: it carries the caller's identity, and ends when the
// caller loses access.
func (t *Tracker) Track(r *http.Request, caller authn.Caller) *Request {
	tracked := t.track(r.Context(), caller, requestinfo.KindOf(r))
	// Connection says nothing else once the client's headers are stripped.
	if upgrade := r.Header["Connection"] != nil; upgrade && !caller.Identity.Recording.Enforce {
		tracked.endWhenEnforced()
	}
	if caller.Identity.ActAs != nil {
		caller.Identity.ActAs.Granted = tracked.require
	}
	return tracked
}

// TrackReader tracks r, a request of caller for recordings, as [Tracker.Track] does. It ends
// as well when the caller may no longer read recordings.
func (t *Tracker) TrackReader(r *http.Request, caller authn.Caller) *Request {
	tracked := t.track(r.Context(), caller, requestinfo.Reading)
	tracked.registry.mu.Lock()
	defer tracked.registry.mu.Unlock()
	tracked.reads = true
	return tracked
}

func (t *Tracker) track(ctx context.Context, caller authn.Caller, kind requestinfo.Kind) *Request {
	registry := t.generation.registry
	r := &Request{registry: registry, conn: caller.Conn, kind: kind, confirmed: caller.Asked}
	if kind != requestinfo.Short {
		ctx, r.cancel = context.WithCancelCause(ctx)
	}
	r.Context = impersonate.Context{Context: ctx, ID: caller.Identity}
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if registry.stopping && r.cancel != nil {
		r.cancel(Exiting)
	}
	registry.open[kind]++
	for t.next != nil {
		t = t.next
	}
	t.add(r)
	return r
}

// add makes r one of t's open requests.
func (t *Tracker) add(r *Request) {
	r.tracker, r.previous, r.next = t, nil, t.open
	if r.next != nil {
		r.next.previous = r
	}
	t.open = r
	if t.armed {
		return
	}
	t.armed = true
	registry := t.generation.registry
	registry.Hold()
	if !slices.Contains(registry.trackers, t) {
		// Its config is gone: the config after next must still know it.
		registry.trackers = append(registry.trackers, t)
	}
	time.AfterFunc(t.policies[0].Interval, t.check)
}

// remove makes r none of t's open requests.
func (t *Tracker) remove(r *Request) {
	if r.previous != nil {
		r.previous.next = r.next
	} else {
		t.open = r.next
	}
	if r.next != nil {
		r.next.previous = r.previous
	}
	r.previous, r.next = nil, nil
}
