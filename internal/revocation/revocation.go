// SPDX-License-Identifier: Apache-2.0

// Package recheck ends requests whose caller has lost access since they began.
//
// A watch, a followed log or a shell stays open for hours, and nothing on a
// tailnet ends it when a grant is withdrawn. So everybody with an open request is
// asked about again, once per interval however many requests there are. A caller
// that is somebody else by now, has lost a group or is unknown loses its
// connections; one that has gained something keeps them. As long as nobody can
// tell, it keeps them for a while (grace).
//
// Requests outlive the config under which they began. A [Site] goes on checking
// until the last of them has ended, by the rules of the site that has taken its
// place if there is one: see [Config.Run].
package revocation

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// lookups is how many callers are asked about at a time, so that a few for whom no
// answer comes do not keep the others waiting.
const lookups = 16

// actingTimeout is how long it may take to find out whether a caller may still act
// as somebody else, for all its requests together: longer than that, nobody could
// tell.
const actingTimeout = 5 * time.Second

// Reason says in a word why requests were ended.
type Reason string

// The reasons.
const (
	LostGroup   Reason = "lost_group"  // the caller is no longer in a group
	LostTag     Reason = "lost_tag"    // the caller's device no longer has a tag
	OtherUser   Reason = "other_user"  // the caller is another user by now
	Refused     Reason = "refused"     // the caller would be refused by now
	Unconfirmed Reason = "unconfirmed" // for too long, nobody could tell
	Enforced    Reason = "enforced"    // sessions have to be recorded by now, and it is not
	Dropped     Reason = "dropped"     // operators have ended them
)

// Reasons are all of them.
var Reasons = []Reason{LostGroup, LostTag, OtherUser, Refused, Unconfirmed, Enforced, Dropped}

// Ended says that requests of a caller were ended. It is the cause that their
// contexts have.
type Ended struct {
	Reason Reason
	// Detail is the reason in full.
	Detail string
	// Remote is the address of the caller, User is who it was.
	Remote netip.Addr
	User   string
	// Requests is how many requests have lost their right. Others that share a
	// connection with one of them end with it.
	Requests int
}

// Error returns the reason in full.
func (e *Ended) Error() string { return "access was withdrawn: " + e.Detail }

// Is makes e a [context.Canceled], or reverse_proxy would take the end of a request
// for a failure of the API server, try again, and count it against that.
func (e *Ended) Is(target error) bool { return target == context.Canceled }

// Rules are by what a site's requests are judged.
type Rules struct {
	// Interval is the time between two checks. A caller that cannot be checked
	// may go on for Grace after the last check that succeeded.
	Interval, Grace time.Duration
	// Identify returns who the peer at remote is that dialled local, as found
	// out at since or later. An error that is forbidden ([apierrors.IsForbidden])
	// says that the peer has no access, any other that nobody could tell.
	Identify func(ctx context.Context, remote, local netip.Addr, since time.Time) (*impersonate.Identity, error)
	// MayBe returns an error if nobody may act as target, which is then forbidden.
	// Nil if anybody may.
	MayBe func(target *impersonate.Target) error
	// Ended is told of every caller that has lost access.
	Ended func(*Ended)
}

// Request is an open request, and the context that it is made in. They are one, as
// there is one of each for every request that is ever made.
type Request struct {
	impersonate.Context

	conn *tailnet.Conn
	kind Kind

	// What follows is guarded by mu.

	site *Site
	// The site's requests are a list, since adding and removing one is all that
	// most of them ever see of it.
	previous, next *Request
	// confirmed is when the caller was last known to have the right to it.
	confirmed time.Time
	ended     bool
	// mayAct is how to find out whether the caller may still act as it does, nil
	// if it acts as itself, or has not been let through yet.
	mayAct impersonate.StillAllowed
	// unrecorded is whether it may be a session that did not have to be recorded.
	unrecorded bool
}

// Open records a request on conn that is made as id, which was found out at asked.
// The request's context is ctx, and carries id. Close must be called when it has
// ended.
func (s *Site) Open(ctx context.Context, conn *tailnet.Conn, id *impersonate.Identity, asked time.Time, kind Kind) *Request {
	r := &Request{Context: impersonate.Context{Context: ctx, ID: id}, conn: conn, kind: kind, confirmed: asked}
	mu.Lock()
	defer mu.Unlock()
	open[kind]++
	for s.next != nil {
		s = s.next
	}
	s.add(r)
	return r
}

// Close records that the request has ended.
func (r *Request) Close() {
	mu.Lock()
	defer mu.Unlock()
	open[r.kind]--
	r.site.remove(r)
}

// Require has the request end as soon as its caller may no longer act as somebody
// else, as it does in this request.
func (r *Request) Require(mayAct impersonate.StillAllowed) {
	mu.Lock()
	defer mu.Unlock()
	r.mayAct = mayAct
}

// Unrecorded has the request end as soon as its caller's sessions have to be recorded.
func (r *Request) Unrecorded() {
	mu.Lock()
	defer mu.Unlock()
	r.unrecorded = true
}

// caller is who is asked about, once for all its requests.
type caller struct{ remote, local netip.Addr }

// check asks about every caller that has a request open, ends what has to end, and
// has itself called again as long as there are requests.
func (s *Site) check() {
	began := time.Now()
	mu.Lock()
	if s.open == nil {
		s.armed = false
		mu.Unlock()
		return
	}
	rules := s.rules
	callers := make(map[caller][]*Request)
	for r := s.open; r != nil; r = r.next {
		c := caller{r.conn.Remote.Addr(), r.conn.Local}
		callers[c] = append(callers[c], r)
	}
	mu.Unlock()

	var asking errgroup.Group
	asking.SetLimit(lookups)
	for c, requests := range callers {
		asking.Go(func() error {
			judge(c, requests, rules, began)
			return nil
		})
	}
	_ = asking.Wait() // no error to be had
	time.AfterFunc(max(0, rules[0].Interval-time.Since(began)), s.check)
}

// judge ends those of a caller's requests that do not pass all the rules.
func judge(c caller, requests []*Request, rules []Rules, began time.Time) {
	verdicts := make([]verdict, len(rules))
	for i, rule := range rules {
		id, err := rule.Identify(context.Background(), c.remote, c.local, began)
		verdicts[i] = verdict{id, err, rule.Grace}
	}
	acting := make(map[*Request][]verdict)
	ctx, cancel := context.WithTimeout(context.Background(), actingTimeout)
	defer cancel()
	for r, mayAct := range actors(requests) {
		acting[r] = onActing(ctx, r, mayAct, verdicts, rules, began)
	}

	var ended *Ended
	conns := make(map[*tailnet.Conn]bool)
	mu.Lock()
	for _, r := range requests {
		if r.ended {
			continue
		}
		confirmed := true
		judging := verdicts
		if own, ok := acting[r]; ok {
			judging = own
		}
		for _, v := range judging {
			sure, reason, detail := v.on(r, began)
			confirmed = confirmed && sure
			if reason == "" {
				continue
			}
			if ended == nil {
				ended = &Ended{Reason: reason, Detail: detail, Remote: c.remote, User: r.ID.User}
			}
			r.ended = true
			ended.Requests++
			conns[r.conn] = true
			break
		}
		if confirmed {
			r.confirmed = began
		}
	}
	mu.Unlock()
	if ended == nil {
		return
	}
	for conn := range conns {
		conn.End(ended)
	}
	rules[0].Ended(ended)
}

// actors returns those of the requests whose callers act as somebody else.
func actors(requests []*Request) map[*Request]impersonate.StillAllowed {
	mu.Lock()
	defer mu.Unlock()
	out := make(map[*Request]impersonate.StillAllowed)
	for _, r := range requests {
		if r.mayAct != nil && !r.ended {
			out[r] = r.mayAct
		}
	}
	return out
}

// onActing returns the verdicts on a request whose caller acts as somebody else:
// those on the caller, and where there is nothing against it, those on that.
func onActing(ctx context.Context, r *Request, mayAct impersonate.StillAllowed, verdicts []verdict, rules []Rules, began time.Time) []verdict {
	own := slices.Clone(verdicts)
	for i, v := range own {
		if v.err != nil {
			continue
		}
		if mayBe := rules[i].MayBe; mayBe != nil {
			own[i].err = mayBe(r.ID.ActAs.Target)
		}
		if own[i].err == nil {
			own[i].err = mayAct(ctx, v.id, began)
		}
	}
	return own
}

// verdict is what one site's rules say about a caller.
type verdict struct {
	id    *impersonate.Identity
	err   error
	grace time.Duration
}

// on says why r has to end, with no reason if it may go on, and whether that is
// sure.
func (v verdict) on(r *Request, now time.Time) (sure bool, reason Reason, detail string) {
	switch {
	case v.err == nil:
		reason, detail = lost(r.ID, v.id)
		if reason == "" && r.unrecorded && v.id.Recording.Enforce {
			reason, detail = Enforced, fmt.Sprintf("the sessions of %s have to be recorded by now", r.ID.User)
		}
		return true, reason, detail
	case apierrors.IsForbidden(v.err):
		return true, Refused, v.err.Error()
	case now.Sub(r.confirmed) > v.grace:
		return false, Unconfirmed, fmt.Sprintf("%s could not be checked for %v: %v", r.ID.User, v.grace, v.err)
	}
	return false, "", ""
}

// lost says what a caller no longer has that it had, with no reason if nothing.
func lost(had, has *impersonate.Identity) (Reason, string) {
	if has.User != had.User {
		return OtherUser, fmt.Sprintf("%s is %s by now", had.User, has.User)
	}
	for _, group := range had.Groups {
		if !slices.Contains(has.Groups, group) {
			return LostGroup, fmt.Sprintf("%s is no longer in group %s", had.User, group)
		}
	}
	// What the API server was told beyond that may have let the request in as well,
	// by an admission policy. A config that no longer tells it has no say in that.
	if had.UID != has.UID && had.UID != "" && has.UID != "" {
		return OtherUser, fmt.Sprintf("%s is another one of that name by now", had.User)
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

// mu guards all that changes in sites and requests, which refer to one another.
var mu sync.Mutex
