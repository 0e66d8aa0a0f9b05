// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
	tskey "tailscale.com/types/key"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Options are the options of an [Authenticator].
type Options struct {
	// Capabilities are the names under which to look for grants, in order.
	Capabilities []tailcfg.PeerCapability
	// Limits are what the operators of the cluster allow, whatever the grants say.
	Limits impersonate.Limits
	// CacheTTL is how long an answer about a peer is used. 0 disables caching.
	CacheTTL time.Duration
	// MaxConnAge is how long requests may come on one connection. 0 is forever.
	MaxConnAge time.Duration
	// Audit adds a UID and extra fields about the caller to every identity.
	Audit bool
	// ActAs is what becomes of requests to act as another user.
	ActAs ActAs
	// AllowOrigins are patterns of the web origins whose pages may send requests,
	// AllowHosts the host names that requests over plain HTTP may be for, besides the
	// node's own.
	AllowOrigins, AllowHosts []string
	// HostSockets reports whether connections are sockets of the host, which its own
	// Tailscale daemon routes to it, rather than a tsnet node's.
	HostSockets bool

	// ReadOnlyGroup, Listen, RecordsFiles and LogsEvents are repeated in explanations:
	// the group for reading only, the addresses of the server, and whether it records
	// sessions to files and logs requests.
	ReadOnlyGroup string
	Listen        []string
	RecordsFiles  bool
	LogsEvents    bool

	Logger *zap.Logger
}

// Authenticator finds out who sent a request, and which identity that is. Requests
// wait until [Authenticator.Start] is called.
type Authenticator struct {
	Options

	// peers caches what nodes have said about peers, and what follows from it.
	peers *cache[*resolution]
	// notices are what the log says about the grants of peers.
	notices *notices

	// nodes are the tailnet nodes that may have accepted a connection. They may be read
	// once ready is closed.
	nodes tailnet.Nodes
	ready chan struct{}
	start sync.Once
	// retired is when Retire was called, nil if it was not.
	retired atomic.Pointer[time.Time]
}

// New returns an authenticator that has not been started.
func New(options Options) (*Authenticator, error) {
	a := &Authenticator{Options: options, ready: make(chan struct{})}
	var err error
	if a.notices, err = newNotices(); err != nil {
		return nil, err
	}
	a.peers, err = newCache(options.CacheTTL, func(ctx context.Context, key peerKey) (*resolution, error) {
		res := a.resolve(ctx, key)
		if _, refused := apistatus.From(res.err); res.err != nil && !refused {
			return nil, res.err // the node has not answered
		}
		return res, nil
	})
	return a, err
}

// Start lets requests through to be judged by nodes. Only the first call counts.
func (a *Authenticator) Start(nodes tailnet.Nodes) {
	a.start.Do(func() {
		a.nodes = nodes
		close(a.ready)
	})
}

// Nodes returns the nodes that judge requests, none before Start.
func (a *Authenticator) Nodes() tailnet.Nodes {
	select {
	case <-a.ready:
		return a.nodes
	default:
		return nil
	}
}

// Retire refuses requests on connections that are accepted from now on, because another
// config decides about those. An authenticator that was never started refuses all.
func (a *Authenticator) Retire() {
	now := time.Now()
	a.retired.CompareAndSwap(nil, &now)
	a.Start(nil)
}

// Retired reports whether [Authenticator.Retire] has been called.
func (a *Authenticator) Retired() bool { return a.retired.Load() != nil }

// IsLast reports whether r has to be the last request on its connection.
func (a *Authenticator) IsLast(r *http.Request) bool {
	if a.Retired() && r.ProtoMajor == 2 {
		// The server has told its connections to go away. One whose handshake ended
		// later has missed that, and would use this config for as long as it is open.
		return true
	}
	if a.MaxConnAge == 0 {
		return false
	}
	// The tailnet decides who may open a connection, and may decide otherwise now. Not
	// every node can be asked about that.
	conn, err := a.connFrom(r.Context())
	return err == nil && conn.IsOlderThan(a.MaxConnAge)
}

// Authenticate returns who sent r, whose headers claimed claims until they were
// stripped, or why r is refused. A caller that is refused may be known: it is then
// returned along with the error, for the log.
func (a *Authenticator) Authenticate(r *http.Request, claims Claims) (Caller, error) {
	return a.authenticate(r, claims, func(r *http.Request) error { return a.checkOrigin(r, isPodApp) })
}

// AuthenticateReader is Authenticate for a request for a page of ours that other pages must
// not read, not even those of this site. isFromPage reports whether the page itself proves
// to have sent it.
func (a *Authenticator) AuthenticateReader(r *http.Request, claims Claims, isFromPage func(*http.Request) bool) (Caller, error) {
	return a.authenticate(r, claims, func(r *http.Request) error {
		if isFromPage(r) {
			return nil
		}
		return a.checkOrigin(r, isNavigation)
	})
}

func (a *Authenticator) authenticate(r *http.Request, claims Claims, checkOrigin func(*http.Request) error) (Caller, error) {
	// Is it a request that the checks below can judge?
	if err := checkProtocol(r); err != nil {
		return Caller{}, err
	}
	// Did the caller send it, or a web page in its browser?
	if err := checkOrigin(r); err != nil {
		return Caller{}, err
	}
	// Which node accepted the connection, and is the request for it?
	arrived, err := a.accepted(r)
	if err != nil {
		return Caller{}, err
	}
	// Who is the peer, and which identity is that?
	res, err := a.who(r.Context(), arrived)
	if err != nil {
		return Caller{}, err
	}
	if res.err != nil {
		return Caller{}, res.refusal(a.CacheTTL)
	}
	caller := *res.caller
	caller.Conn = arrived.conn
	// May it say about itself what it said? Which of its groups does it use?
	claimed, actAs, err := a.claimed(r, res.caller, claims)
	if err != nil {
		return caller, err
	}
	if err := a.Limits.CheckUse(claimed.Identity); err != nil {
		return caller, apistatus.Forbidden(apistatus.NoGroups, "%s may not use this server without a group: %v", caller.Peer.Describe(), err)
	}
	caller = *claimed
	caller.Conn = arrived.conn
	caller.Identity = a.forRequest(r, claimed.Identity, actAs)
	return caller, nil
}

// arrival is how a request arrived.
type arrival struct {
	conn *tailnet.Conn
	// node is the node that accepted conn.
	node *tailnet.Node
	// known is what the node said about the peer a short while ago, nil if it has to be
	// asked.
	known *resolution
}

// key returns how the node knows the peer.
func (arrived arrival) key() peerKey {
	return peerKey{arrived.node, arrived.conn.Remote.Addr(), arrived.conn.Dialled()}
}

// accepted returns how r arrived at a node that it is meant for.
func (a *Authenticator) accepted(r *http.Request) (arrived arrival, err error) {
	if err := a.waitUntilStarted(r.Context()); err != nil {
		return arrival{}, err
	}
	if arrived.conn, err = a.connFrom(r.Context()); err != nil {
		return arrival{}, apistatus.Because(err, apistatus.Forbidden(apistatus.NotFromTailnet, "the connection was not accepted by a tailnet node of this site; the proxy's log says how it came"))
	}
	if retired := a.retired.Load(); retired != nil && (a.nodes == nil || arrived.conn.Accepted.After(*retired)) {
		return arrival{}, apistatus.TryAgain(apistatus.Replaced, "the connection was accepted for a config that is no longer in use; a new connection uses the current one")
	}
	if known, ok := a.peers.on(arrived.conn); ok {
		arrived.node, arrived.known = known.key.node, known
	} else if arrived.node, err = a.owner(arrived.conn.Local); err != nil {
		return arrival{}, err
	}
	return arrived, a.checkHost(r, arrived.node)
}

// connFrom returns the connection that a request with this context came on.
func (a *Authenticator) connFrom(ctx context.Context) (*tailnet.Conn, error) {
	if a.HostSockets {
		return tailnet.HostConnFrom(ctx)
	}
	return tailnet.ConnFrom(ctx)
}

func (a *Authenticator) waitUntilStarted(ctx context.Context) error {
	select {
	case <-a.ready:
		return nil
	default:
	}
	select {
	case <-a.ready:
		return nil
	case <-ctx.Done():
		return apistatus.TryAgain(apistatus.Starting, "the server is starting")
	}
}

// owner returns the node that owns the address local.
func (a *Authenticator) owner(local netip.Addr) (*tailnet.Node, error) {
	node, err := a.nodes.Accepting(local)
	switch {
	case errors.Is(err, tailnet.ErrNotConnected):
		return nil, apistatus.TryAgain(apistatus.Starting, "%v", err)
	case err != nil:
		return nil, apistatus.Forbidden(apistatus.AmbiguousNode, "%v", err)
	}
	return node, nil
}

// who returns what the node says about the peer. It asks, unless it did so a short while
// ago.
func (a *Authenticator) who(ctx context.Context, arrived arrival) (*resolution, error) {
	if arrived.known != nil {
		return arrived.known, nil
	}
	key := arrived.key()
	res, err := a.peers.get(ctx, key, arrived.conn)
	if err != nil {
		return nil, key.noAnswer(err)
	}
	return res, nil
}

// noAnswer returns err, which says why the node has not answered, as a refusal.
func (k peerKey) noAnswer(err error) error {
	return apistatus.Because(err, apistatus.TryAgain(apistatus.NoAnswer, "tailnet node %q does not say who %v is; the proxy's log says why", k.node.Name, k.remote))
}

// Identify returns the identity of the peer at remote that dialled dialled, from an
// answer that was asked for at since or later.
func (a *Authenticator) Identify(ctx context.Context, remote netip.Addr, dialled netip.AddrPort, since time.Time) (*impersonate.Identity, error) {
	<-a.ready
	node, err := a.owner(dialled.Addr())
	if err != nil {
		return nil, err
	}
	key := peerKey{node, remote, dialled}
	answer, err := a.peers.since(ctx, key, since)
	if err != nil {
		return nil, key.noAnswer(err)
	}
	if res := answer.value; res.err != nil {
		return nil, res.err
	}
	return answer.value.caller.Identity, nil
}

// Forget makes the next request of the peer at remote, on local, ask about it again.
func (a *Authenticator) Forget(remote, local netip.Addr) {
	a.peers.forget(remote, local)
}

// Cached calls f with the address of every peer that is cached and not refused, the
// address that it dialled, and the caller that it is.
func (a *Authenticator) Cached(f func(remote, local netip.Addr, caller *Caller)) {
	a.peers.all(func(key peerKey, res *resolution) {
		if res.caller != nil {
			f(key.remote, key.dialled.Addr(), res.caller)
		}
	})
}

// resolution is what a node says about a peer, and what follows from it. It is cached,
// and does not change.
type resolution struct {
	key   peerKey
	asked time.Time
	// peer is the zero Peer if the node knows none, and device its node key.
	peer        impersonate.Peer
	device      tskey.NodePublic
	explanation impersonate.Explanation
	// identity is the zero Identity, and caller nil, if err is why there is none.
	identity impersonate.Identity
	caller   *Caller
	// removed are the groups that the limits removed.
	removed []string
	err     error
}

// noticeable is the age from which on a refusal says how old it is. Someone who was given
// access may wonder.
const noticeable = 5 * time.Second

// refusal returns why the peer's requests are refused. ttl is how long that counts.
func (res *resolution) refusal(ttl time.Duration) error {
	age := time.Since(res.asked)
	if age < noticeable {
		return res.err
	}
	return apistatus.Append(res.err, "; that was the answer %v ago, and it counts for %v (cache_ttl), or until there is a new connection", age.Round(time.Second), ttl)
}

// resolve asks the node of key who the peer is, and decides its identity. It records
// how, also where it ends in a refusal.
func (a *Authenticator) resolve(ctx context.Context, key peerKey) *resolution {
	res := &resolution{key: key, asked: time.Now()}
	who, err := key.node.WhoIs(ctx, key.remote, key.dialled.Addr())
	countQuestion(res.asked, err)
	switch {
	case errors.Is(err, tailnet.ErrPeerNotFound):
		return res.refuse(apistatus.Forbidden(apistatus.UnknownPeer, "tailnet node %q knows no peer with the address %v: the device is not on the tailnet, or its traffic comes through a subnet router", key.node.Name, key.remote))
	case errors.Is(err, tailnet.ErrSelf):
		return res.refuse(apistatus.Forbidden(apistatus.Self, "the request comes from tailnet node %q itself, which is no caller", key.node.Name))
	case err != nil:
		return res.refuse(err)
	}
	if res.peer, err = impersonate.PeerFrom(who); err != nil {
		return res.refuse(apistatus.Forbidden(apistatus.NoIdentity, "no identity for %v: %v", key.remote, err))
	}
	peer := res.peer
	res.device = who.Node.Key
	admitted, err := key.admitted(who)
	switch {
	case err != nil:
		return res.refuse(err)
	case !admitted:
		return res.refuse(apistatus.Forbidden(apistatus.NotAdmitted, "%s may no longer connect to this server: the tailnet policy file does not let it open a connection to %v", peer.Describe(), key.dialled))
	}
	// Most new connections are of peers about which nothing has changed. To read grants is
	// what a question costs most.
	if last, ok := a.peers.last(key); ok && last.err == nil && last.peer.Equal(peer) {
		return res.decidedAs(last)
	}
	granted, explanation, err := peer.Identity(a.Capabilities)
	res.explanation = explanation
	problems := explanation.Problems()
	if a.notices.isNew(subject{key, "problems"}, peer, problems) {
		a.Logger.Warn("grants have unknown or repeated keys",
			zap.Stringer("peer", peer), zap.String("capability", string(explanation.Capability)),
			zap.Strings("problems", problems), zap.Bool("tags_left_out", explanation.TagsLeftOut))
	}
	if err != nil {
		return res.refuse(apistatus.Forbidden(apistatus.NoIdentity, "no identity for %s: %v", peer.Describe(), err))
	}
	if err := a.Limits.CheckPeer(peer); err != nil {
		return res.refuse(apistatus.Forbidden(apistatus.Guard, "%s may not use this server: %v", peer.Describe(), err))
	}
	id, removed, err := a.Limits.Apply(peer, granted)
	res.removed = removed
	if a.notices.isNew(subject{key, "removed groups"}, peer, removed) {
		a.Logger.Warn("granted groups are left out, as allow_groups and deny_groups say",
			zap.Stringer("peer", peer), zap.Strings("groups", removed))
	}
	switch {
	case errors.Is(err, impersonate.ErrNoGroup):
		return res.refuse(apistatus.Forbidden(apistatus.NoGroups, "%s may not use this server: %v: the tailnet policy file has no grant that gives it groups under %q%s", peer.Describe(), err, a.Capabilities[0], inAddition(problems)))
	case err != nil:
		return res.refuse(apistatus.Forbidden(apistatus.Guard, "%s may not use this server: %v", peer.Describe(), err))
	}
	if a.Audit {
		if id, err = peer.Audited(id, key.remote); err != nil {
			return res.refuse(apistatus.Forbidden(apistatus.NoIdentity, "no identity for %s: %v", peer.Describe(), err))
		}
	}
	res.identity = id
	res.caller = newCaller(key.node, peer, id, res.asked)
	return res
}

// decidedAs completes res with what follows from last, an answer that says the same of the
// peer and is no refusal. What the node has just said, such as the device's key, stays.
func (res *resolution) decidedAs(last *resolution) *resolution {
	caller := *last.caller
	caller.Asked = res.asked
	res.explanation, res.removed, res.identity, res.caller = last.explanation, last.removed, last.identity, &caller
	return res
}

// inAddition returns problems as the end of a message.
func inAddition(problems []string) string {
	if len(problems) == 0 {
		return ""
	}
	return "; " + strings.Join(problems, "; ")
}

// admitted reports whether the peer, which is who, may still open the connection that it
// has. It is true if that cannot be told.
func (k peerKey) admitted(who *apitype.WhoIsResponse) (bool, error) {
	if k.node.Admits == nil || k.dialled.Port() == 0 {
		return true, nil
	}
	if who.Node.IsJailed {
		return false, nil // whatever the packet filter says
	}
	return k.node.Admits(k.remote, k.dialled)
}

// refuse records why the peer's requests are refused.
func (res *resolution) refuse(err error) *resolution {
	if res.peer.Node != "" || res.peer.Login != "" {
		err = apistatus.About(res.peer.Node, res.peer.String(), err)
	}
	res.err = err
	return res
}

// answered says how a node answered who a peer is.
type answered string

const (
	known   answered = "known"   // the node knows the peer
	unknown answered = "unknown" // the node knows no such peer
	failed  answered = "failed"  // the node did not answer
)

// Most answers take microseconds, or a tenth of a millisecond if the node is a daemon; none
// takes longer than the last bucket.
var questions = metrics.NewHistogram(prometheus.HistogramOpts{
	Name:    "whois_duration_seconds",
	Help:    "How long tailnet nodes took to say who a peer is, by outcome.",
	Buckets: []float64{.00005, .0001, .0002, .0005, .001, .0025, .005, .01, .025, .05, .1, .25},
}, "outcome", known, unknown, failed)

// countQuestion counts a question that was asked at asked, and answered with err.
func countQuestion(asked time.Time, err error) {
	outcome := known
	switch {
	case errors.Is(err, tailnet.ErrSelf):
		return // the node was not asked
	case errors.Is(err, tailnet.ErrPeerNotFound):
		outcome = unknown
	case err != nil:
		outcome = failed
	}
	questions.WithLabelValues(string(outcome)).Observe(time.Since(asked).Seconds())
}
