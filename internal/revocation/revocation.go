// SPDX-License-Identifier: Apache-2.0

// Package revocation ends requests whose caller has lost access since they began.
//
// A watch, a followed log or a shell stays open for hours, and nothing on a tailnet
// ends it when a grant is withdrawn. So the package asks about everyone with an open
// request again, once per interval however many requests they have. A caller who is
// now another user, has lost a group or is refused loses its connections; one who has
// gained a group keeps them. While no answer comes, it keeps them for a grace period.
//
// Requests outlive the config under which they began. A [Tracker] goes on checking
// until its last request has ended, and follows the policy of the tracker that
// replaces it: see [Generation.Run].
package revocation

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// lookups is how many callers are looked up at a time, so that a few without an
// answer do not delay the others.
const lookups = 16

// actAsTimeout bounds the reviews of whether a caller may still act as other users,
// for all its requests together.
const actAsTimeout = 5 * time.Second

// Reason says in one word why requests were ended.
type Reason string

// The reasons.
const (
	LostGroup   Reason = "lost_group"  // the caller is no longer in a group
	LostTag     Reason = "lost_tag"    // the caller's device no longer has a tag
	OtherUser   Reason = "other_user"  // the caller is now another user
	Refused     Reason = "refused"     // a new request of the caller would be refused
	Unconfirmed Reason = "unconfirmed" // no answer has come for longer than the grace period
	Enforced    Reason = "enforced"    // recording is now enforced and the session is not recorded
	Dropped     Reason = "dropped"     // an operator dropped the caller
)

// Reasons lists every reason.
var Reasons = []Reason{LostGroup, LostTag, OtherUser, Refused, Unconfirmed, Enforced, Dropped}

var revocations = metrics.NewCounter("revoked_requests_total",
	"Open requests that were ended because their caller lost access, by reason.",
	"reason", Reasons...)

// Revoked is the cancellation cause of requests whose caller lost access.
type Revoked struct {
	Reason Reason
	// Detail is the reason in full.
	Detail string
	// Remote is the caller's address, User who the caller was.
	Remote netip.Addr
	User   string
	// Requests is how many requests were revoked. Others on the same connection end
	// with them.
	Requests int
}

// Error returns the reason in full.
func (e *Revoked) Error() string { return "access was withdrawn: " + e.Detail }

// Is makes e a [context.Canceled]. Otherwise reverse_proxy would treat the end of a
// request as a failure of the API server, retry it, and count it in health checks.
func (e *Revoked) Is(target error) bool { return target == context.Canceled }

// Policy decides which of a tracker's requests may go on.
type Policy struct {
	// Interval is the time between two checks. A caller who cannot be checked may go
	// on for Grace after the last check that succeeded.
	Interval, Grace time.Duration
	// Identify returns the identity of the peer at remote that dialled dialled, from an
	// answer that was asked for at since or later. An error that is forbidden
	// ([apierrors.IsForbidden]) says that the peer has no access; any other, that the
	// question has no answer.
	Identify func(ctx context.Context, remote netip.Addr, dialled netip.AddrPort, since time.Time) (*impersonate.Identity, error)
	// MustRecord reports whether the session of request has to be recorded, if now is
	// what Identify returns. Nil means what the grants say.
	MustRecord func(request, now *impersonate.Identity) bool
	// CheckTarget returns an error, which is forbidden, if nobody may act as target.
	// Nil allows every target.
	CheckTarget func(target *impersonate.Target) error
	// MayRead returns an error if a caller may not read recordings. Nil lets nobody.
	MayRead func(now *impersonate.Identity) error
	// Revoked is called for every caller who loses access.
	Revoked func(*Revoked)
}

// Request is an open request and its context, in one allocation, as every request
// needs both.
type Request struct {
	impersonate.Context

	registry *Registry
	conn     *tailnet.Conn
	kind     requestinfo.Kind
	// cancel cancels the context. Nil for a short request, to which it would add an
	// allocation.
	cancel context.CancelCauseFunc

	// The registry's mutex guards what follows.

	tracker *Tracker
	// The tracker's requests are a linked list: adding and removing one is all that
	// happens to most of them.
	previous, next *Request
	// confirmed is when the caller was last known to have access.
	confirmed time.Time
	ended     bool
	// stillAllowed asks whether the caller may still act as another user. Nil if it
	// acts as itself, or has not been let through yet.
	stillAllowed impersonate.StillAllowed
	// unrecorded is set for what may be a session and need not be recorded.
	unrecorded bool
	// reads is set for a request for recordings.
	reads bool
}

// Close records that the request has ended.
func (r *Request) Close() {
	if r.cancel != nil {
		r.cancel(nil)
	}
	r.registry.mu.Lock()
	defer r.registry.mu.Unlock()
	r.registry.open[r.kind]--
	r.tracker.remove(r)
}

// require ends the request as soon as its caller may no longer act as the user that
// the request is forwarded as.
func (r *Request) require(stillAllowed impersonate.StillAllowed) {
	r.registry.mu.Lock()
	defer r.registry.mu.Unlock()
	r.stillAllowed = stillAllowed
}

// endWhenEnforced ends the request as soon as its caller's sessions must be recorded.
func (r *Request) endWhenEnforced() {
	r.registry.mu.Lock()
	defer r.registry.mu.Unlock()
	r.unrecorded = true
}

// address identifies a caller in questions to a node: one answer serves all its
// requests.
type address struct {
	remote  netip.Addr
	dialled netip.AddrPort
}

// check asks about every caller that has an open request, ends the requests of those
// who lost access, and schedules itself as long as there are requests.
func (t *Tracker) check() {
	began := time.Now()
	registry := t.generation.registry
	registry.mu.Lock()
	if t.open == nil {
		t.armed = false
		registry.Release()
		registry.mu.Unlock()
		return
	}
	policies := t.policies
	callers := make(map[address][]*Request)
	for r := t.open; r != nil; r = r.next {
		a := address{r.conn.Remote.Addr(), r.conn.Dialled()}
		callers[a] = append(callers[a], r)
	}
	registry.mu.Unlock()

	var lookingUp errgroup.Group
	lookingUp.SetLimit(lookups)
	for a, requests := range callers {
		lookingUp.Go(func() error {
			registry.judge(checking{a, requests, policies, began})
			return nil
		})
	}
	_ = lookingUp.Wait() // never an error
	time.AfterFunc(max(0, policies[0].Interval-time.Since(began)), t.check)
}

// checking is the check of one caller's requests.
type checking struct {
	address
	requests []*Request
	policies []Policy
	began    time.Time
}

// judge ends those of a caller's requests that violate any policy.
func (r *Registry) judge(c checking) {
	verdicts := make([]verdict, len(c.policies))
	for i, policy := range c.policies {
		id, err := policy.Identify(context.Background(), c.remote, c.dialled, c.began)
		verdicts[i] = verdict{id, err, policy}
	}
	acting := make(map[*Request][]verdict)
	ctx, cancel := context.WithTimeout(context.Background(), actAsTimeout)
	defer cancel()
	for req, stillAllowed := range r.actingAs(c.requests) {
		acting[req] = c.onActAs(ctx, req, stillAllowed, verdicts)
	}

	var revoked *Revoked
	conns := make(map[*tailnet.Conn]bool)
	r.mu.Lock()
	for _, req := range c.requests {
		if req.ended {
			continue
		}
		confirmed := true
		judging := verdicts
		if own, ok := acting[req]; ok {
			judging = own
		}
		for _, v := range judging {
			sure, reason, detail := v.on(req, c.began)
			confirmed = confirmed && sure
			if reason == "" {
				continue
			}
			if revoked == nil {
				revoked = &Revoked{Reason: reason, Detail: detail, Remote: c.remote, User: req.ID.User}
			}
			req.ended = true
			revoked.Requests++
			conns[req.conn] = true
			break
		}
		if confirmed {
			req.confirmed = c.began
		}
	}
	r.mu.Unlock()
	if revoked == nil {
		return
	}
	for conn := range conns {
		conn.End(revoked)
	}
	revocations.With(revoked.Reason).Add(float64(revoked.Requests))
	c.policies[0].Revoked(revoked)
}

// actingAs returns those of the requests whose callers act as other users.
func (r *Registry) actingAs(requests []*Request) map[*Request]impersonate.StillAllowed {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make(map[*Request]impersonate.StillAllowed)
	for _, req := range requests {
		if req.stillAllowed != nil && !req.ended {
			out[req] = req.stillAllowed
		}
	}
	return out
}

// onActAs returns the verdicts on a request whose caller acts as another user: those
// on the caller, and where they allow it, those on acting as that user.
func (c checking) onActAs(ctx context.Context, r *Request, stillAllowed impersonate.StillAllowed, verdicts []verdict) []verdict {
	own := slices.Clone(verdicts)
	for i, v := range own {
		if v.err != nil {
			continue
		}
		if checkTarget := c.policies[i].CheckTarget; checkTarget != nil {
			own[i].err = checkTarget(r.ID.ActAs.Target)
		}
		if own[i].err == nil {
			own[i].err = stillAllowed(ctx, v.id, c.began)
		}
	}
	return own
}

// verdict is what one policy says about a caller.
type verdict struct {
	id     *impersonate.Identity
	err    error
	policy Policy
}

// on returns why r must end, with an empty reason if it may go on, and whether that is
// certain.
func (v verdict) on(r *Request, now time.Time) (sure bool, reason Reason, detail string) {
	switch {
	case v.err == nil:
		reason, detail = lost(r.ID, v.id)
		if reason == "" && r.unrecorded && v.policy.mustRecord(r.ID, v.id) {
			reason, detail = Enforced, fmt.Sprintf("recording is now enforced for %s, and this session is not recorded", r.ID.User)
		}
		if reason == "" && r.reads {
			// What r asks for may be held back from others, and lost has found it granted.
			reason, detail = v.policy.lostReading(r.ID)
		}
		return true, reason, detail
	case apierrors.IsForbidden(v.err):
		return true, Refused, v.err.Error()
	case now.Sub(r.confirmed) > v.policy.Grace:
		return false, Unconfirmed, fmt.Sprintf("%s could not be checked for %v: %v", r.ID.User, v.policy.Grace, v.err)
	}
	return false, "", ""
}

// lostReading returns why a caller may no longer read recordings, with an empty reason if it
// may.
func (p *Policy) lostReading(caller *impersonate.Identity) (Reason, string) {
	if p.MayRead == nil {
		return Refused, "recordings are no longer shown"
	}
	if err := p.MayRead(caller); err != nil {
		return Refused, err.Error()
	}
	return "", ""
}

func (p *Policy) mustRecord(request, now *impersonate.Identity) bool {
	if p.MustRecord == nil {
		return now.Recording.Enforce
	}
	return p.MustRecord(request, now)
}

// lost returns what a caller had and no longer has, with an empty reason if it has
// lost nothing.
func lost(had, has *impersonate.Identity) (Reason, string) {
	if has.User != had.User {
		return OtherUser, fmt.Sprintf("%s is now %s", had.User, has.User)
	}
	for _, group := range had.Groups {
		// What a request asks for may be held back from others.
		held := had.Chosen && slices.Contains(has.HeldBack, group)
		if !held && !slices.Contains(has.Groups, group) {
			return LostGroup, fmt.Sprintf("%s is no longer in group %s", had.User, group)
		}
	}
	// An admission policy may have let the request in because of UID or extra fields.
	// A config without audit does not send them, which takes nothing away.
	if had.UID != has.UID && had.UID != "" && has.UID != "" {
		return OtherUser, fmt.Sprintf("%s is now a different user with the same name (UID changed)", had.User)
	}
	if has.Extra == nil {
		return "", ""
	}
	for _, tag := range had.Extra[impersonate.ExtraTags] {
		if !slices.Contains(has.Extra[impersonate.ExtraTags], tag) {
			return LostTag, fmt.Sprintf("the device of %s no longer has the tag %s", had.User, tag)
		}
	}
	return "", ""
}
