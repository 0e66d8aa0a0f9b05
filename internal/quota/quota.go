// SPDX-License-Identifier: Apache-2.0

// Package quota bounds what callers make the process hold in memory.
//
// Each connection and each open request counts as what it may come to hold if its client
// sends slowly and reads nothing. All callers share a budget. Once it is used up, whoever
// holds most loses a connection to whoever holds less, or is refused if it is the one
// that asks for more. So a hundred callers that take all they can get leave each caller
// as much as they have themselves, and nobody has to be found out to be an attacker.
package quota

import (
	"context"
	"math"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// What one of each counts as, in bytes. docs/limits.md has them too.
const (
	// connection is TLS, HTTP/2 and the network stack of the tailnet node.
	connection = 256 << 10
	// answer is a request whose answer is read into a buffer of transport kubernetes
	// ([AnswerBuffer]) while the client does not read.
	answer = 256 << 10
	// stream is a watch or a followed log, with a smaller buffer ([StreamBuffer]).
	stream = 96 << 10
	// slow is a connection whose next request has not arrived after nextRequest, in
	// addition: a part of its headers may have. Short headers take fifteen times as much
	// memory as on the wire, as entries of a map.
	slow = 512 << 10
	// session is an upgraded connection: buffers for both directions, and the start of a
	// frame.
	session = 256 << 10
	// unread is a connection whose client has taken nothing for readWithin of what is
	// written to it, in addition: what the network stack of the node keeps for the client.
	// Tailscale's begins with 1 MiB and goes up to 6 MiB as a client reads faster.
	unread = 2 << 20
	// field is what a header field takes beside its characters: its entries in maps and
	// lists, each in several copies. HPACK sends it in one byte.
	field = 256
	// copies is how often the characters of a target are held: as they arrived, decoded,
	// and parsed.
	copies = 3
)

// Bounds of what the HTTP/2 connections to the API server buffer for each request.
const (
	AnswerBuffer = 256 << 10
	StreamBuffer = 64 << 10
)

const (
	// maxFields is how many header fields a request may have. kubectl and browsers send
	// up to about 30.
	maxFields = 256
	// nextRequest is how long the next request of a connection may take to arrive.
	nextRequest = 3 * time.Second
	// readWithin is how long a client may take nothing of what is written to it.
	readWithin = 3 * time.Second
	// maxWaiting is how many sessions of a caller may wait for an answer of the API
	// server. Each may have a file and a recorder that are prepared for it.
	maxWaiting = 32
	// maxShare bounds what one caller holds, together with half of the budget.
	maxShare = 128 << 20
	// defaultSize is the budget of a process without a memory limit.
	defaultSize = 1 << 30
	// refusal is what a request counts as that is refused because its caller holds too
	// much, and maxRefusals what all such requests of a caller may come to, in addition to
	// its share. Beyond that, its connection is closed without an answer.
	refusal     = 32 << 10
	maxRefusals = 512 << 10
)

// what says in one word what a caller had no quota left for.
type what string

const (
	ofConnection what = "connection" // a new connection was closed
	ofRequest    what = "request"    // a request was refused
	ofSession    what = "session"    // a session was refused, as too many wait for an answer
	ofFields     what = "fields"     // a request with too many header fields was refused
	ofFrame      what = "frame"      // a session with large frames was ended
	ofEvicted    what = "evicted"    // an open connection was closed in favor of another caller
)

var denied = metrics.NewCounter("over_quota_total",
	"Connections and requests that were closed or refused because their caller made the proxy hold too much, by what it was.",
	"reason", ofConnection, ofRequest, ofSession, ofFields, ofFrame, ofEvicted)

// Budget is what the callers of a process share. It is also a Prometheus collector. The
// zero value is ready for use.
type Budget struct {
	// Size is the budget in bytes. Default: 1 GiB.
	Size int64

	mu      sync.Mutex
	held    int64
	callers map[netip.Addr]*holding
	conns   map[net.Conn]*account
}

// holding is what a caller holds.
type holding struct {
	bytes    int64 // of all accounts
	refusals int64
	waiting  int // sessions without an answer
	accounts map[*account]struct{}
}

// account is what a connection and its requests count as.
type account struct {
	caller netip.Addr
	conn   *tailnet.Conn
	bytes  int64
	// waiting fires when the next request takes long to arrive. slow is set from then
	// until it has.
	waiting       *time.Timer
	slow, arrived bool
	// writing tells whether the client reads. Nil if the connection is not counted.
	writing *writing
	// closed is set once the connection was closed for its caller's quota. What it
	// counted as has been given back.
	closed bool
}

// OfProcess returns the size of the budget of this process: three tenths of its
// memory limit, which Caddy takes from its container, and the default without one.
func OfProcess() int64 { return OfLimit(debug.SetMemoryLimit(-1)) }

// OfLimit returns the size of the budget of a process with a memory limit.
func OfLimit(limit int64) int64 {
	if limit == math.MaxInt64 {
		return defaultSize
	}
	return limit / 10 * 3
}

// of returns what caller holds. b.mu must be held.
func (b *Budget) of(caller netip.Addr) *holding {
	h := b.callers[caller]
	if h == nil {
		h = &holding{accounts: make(map[*account]struct{})}
		if b.callers == nil {
			b.callers = make(map[netip.Addr]*holding)
		}
		b.callers[caller] = h
	}
	return h
}

// forget drops what is known of a caller that holds nothing. b.mu must be held.
func (b *Budget) forget(caller netip.Addr, h *holding) {
	if len(h.accounts) == 0 && h.refusals == 0 && h.waiting == 0 {
		delete(b.callers, caller)
	}
}

// take adds n bytes to a, unless its caller would then hold too much.
func (b *Budget) take(a *account, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.takeLocked(a, n)
}

// takeLocked is take for a caller that holds b.mu.
func (b *Budget) takeLocked(a *account, n int64) bool {
	size := b.Size
	if size == 0 {
		size = defaultSize
	}
	h := b.of(a.caller)
	if a.closed || h.bytes+n > min(maxShare, size/2) {
		b.forget(a.caller, h)
		return false
	}
	for b.held+n > size {
		if !b.evict(h.bytes + n) {
			b.forget(a.caller, h)
			return false
		}
	}
	h.accounts[a] = struct{}{}
	h.bytes += n
	a.bytes += n
	b.held += n
	return true
}

// evict closes a connection of the caller that holds most, if that is more than n bytes.
// b.mu must be held.
func (b *Budget) evict(n int64) bool {
	var most *holding
	for _, h := range b.callers {
		if h.bytes > n && (most == nil || h.bytes > most.bytes) {
			most = h
		}
	}
	if most == nil {
		return false
	}
	var largest *account
	for a := range most.accounts {
		if largest == nil || a.bytes > largest.bytes {
			largest = a
		}
	}
	denied.With(ofEvicted).Inc()
	largest.closed = true
	b.release(largest, largest.bytes)
	largest.conn.End(errTooMuch)
	return true
}

// give takes n bytes from a.
func (b *Budget) give(a *account, n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !a.closed {
		b.release(a, n)
	}
}

// release takes n bytes from a. b.mu must be held.
func (b *Budget) release(a *account, n int64) {
	h := b.of(a.caller)
	h.bytes -= n
	a.bytes -= n
	b.held -= n
	if a.bytes == 0 {
		delete(h.accounts, a)
	}
	b.forget(a.caller, h)
}

// refuse adds n bytes, or takes -n bytes, to what refusals of a caller hold, unless that
// becomes too much.
func (b *Budget) refuse(a *account, n int64) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.of(a.caller)
	defer b.forget(a.caller, h)
	if h.refusals+n > maxRefusals {
		return false
	}
	h.refusals += n
	return true
}

// await adds n to the sessions of a caller that wait for an answer, unless there are too
// many.
func (b *Budget) await(a *account, n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	h := b.of(a.caller)
	defer b.forget(a.caller, h)
	if h.waiting+n > maxWaiting {
		return false
	}
	h.waiting += n
	return true
}

type accountKey struct{}

// ConnContext counts the connection c, or closes it if its caller holds too much. It has
// the shape of [net/http.Server.ConnContext], and must run after [tailnet.ConnContext].
// [Budget.ConnState] must be called as well.
func (b *Budget) ConnContext(ctx context.Context, c net.Conn) context.Context {
	conn := tailnet.AnyConnFrom(ctx)
	if conn == nil || ctx.Value(accountKey{}) != nil { // by another handler of the same server
		return ctx
	}
	a := &account{caller: conn.Remote.Addr(), conn: conn}
	ctx = context.WithValue(ctx, accountKey{}, a)
	if !b.take(a, connection) {
		denied.With(ofConnection).Inc()
		conn.End(errTooMuch)
		return ctx
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conns == nil {
		b.conns = make(map[net.Conn]*account)
	}
	a.waiting = time.AfterFunc(nextRequest, func() { b.takeSlow(a) })
	a.writing = newWriting(b, a)
	b.conns[c] = a
	return ctx
}

// accountOf returns the account of the connection with the context ctx. If that is not
// counted, it is one of its own for the caller, and nil if there is no caller.
func accountOf(ctx context.Context) *account {
	if a, counted := ctx.Value(accountKey{}).(*account); counted {
		return a
	}
	conn := tailnet.AnyConnFrom(ctx)
	if conn == nil {
		return nil
	}
	return &account{caller: conn.Remote.Addr(), conn: conn}
}

// Connections returns how many connections are open, except for upgraded ones.
func (b *Budget) Connections() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.conns)
}

// ConnState has the shape of [net/http.Server.ConnState]. A connection that is upgraded
// counts as a session from then on.
func (b *Budget) ConnState(c net.Conn, state http.ConnState) {
	if state == http.StateNew {
		return
	}
	b.mu.Lock()
	a := b.conns[c]
	over := state == http.StateClosed || state == http.StateHijacked
	if over {
		delete(b.conns, c)
	}
	b.mu.Unlock()
	if a == nil {
		return
	}
	if state != http.StateActive {
		a.writing.finished()
	}
	if state == http.StateIdle {
		b.wait(a)
		return
	}
	// net/http reports a request over HTTP/1.1 once its headers have arrived.
	a.waiting.Stop()
	b.arrived(a)
	if over {
		b.give(a, connection)
	}
}

// wait begins to wait for the next request of a.
func (b *Budget) wait(a *account) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a.arrived = false
	a.waiting.Reset(nextRequest)
}

// takeSlow counts the headers that may be arriving on a, or closes it.
func (b *Budget) takeSlow(a *account) {
	b.mu.Lock()
	if a.slow || a.arrived { // meanwhile
		b.mu.Unlock()
		return
	}
	a.slow = b.takeLocked(a, slow)
	closes := !a.slow
	b.mu.Unlock()
	if closes {
		denied.With(ofConnection).Inc()
		a.conn.End(errTooMuch)
	}
}

// arrived records that the next request has arrived on a, or that none will.
func (b *Budget) arrived(a *account) {
	b.mu.Lock()
	defer b.mu.Unlock()
	a.arrived = true
	if a.slow && !a.closed {
		b.release(a, slow)
	}
	a.slow = false
}

var errTooMuch = apistatus.TooManyRequests(apistatus.TooMuch, "this device makes the proxy hold too much at once; close connections, watches or sessions, or try again later")

// Charge is what a request counts as until it is closed.
type Charge struct {
	budget  *Budget
	account *account
	// bytes is what the request counts as, refused what its refusal does.
	bytes, refused int64
	// client is what the request is answered to.
	client *client
}

// Admit counts r, a request whose headers have been stripped, until it has ended and
// [Charge.Close] has been called. The error is the refusal of r, if its caller would make
// the process hold too much. Admit returns w for the handlers that follow.
//
// A caller with too many refusals loses its connection: even a refusal is held until the
// client has read it. Admit then panics with [http.ErrAbortHandler].
func (b *Budget) Admit(w http.ResponseWriter, r *http.Request) (http.ResponseWriter, Charge, error) {
	a := accountOf(r.Context())
	if a == nil {
		return w, Charge{}, nil // and is refused
	}
	kind := requestinfo.KindOf(r)
	fields, size := measure(r)
	c := Charge{budget: b, account: a, bytes: weight(kind) + size, client: &client{ResponseWriter: w, budget: b, account: a, endsLater: r.ProtoMajor == 1}}
	err := error(nil)
	switch {
	case fields > maxFields:
		denied.With(ofFields).Inc()
		err = apistatus.HeaderFieldsTooLarge(apistatus.HeaderFields, "the request has %d header fields, where %d are the limit", fields, maxFields)
		c.bytes = 0
	case !b.take(a, c.bytes):
		denied.With(ofRequest).Inc()
		err = errTooMuch
		c.bytes = 0
	case kind <= requestinfo.Log:
	case b.await(a, 1):
		c.client.waits = true
	default:
		denied.With(ofSession).Inc()
		err = apistatus.TooManyRequests(apistatus.Waiting, "%d sessions of this device wait for an answer of the API server already", maxWaiting)
	}
	if err != nil && c.bytes == 0 {
		if !b.refuse(a, refusal+size) {
			a.conn.End(err)
			panic(http.ErrAbortHandler)
		}
		c.refused = refusal + size
	}
	if r.ProtoMajor == 2 {
		// The end of an answer may wait for its client after the handler has returned.
		c.closeAfter(r.Context())
		c.bytes, c.refused = 0, 0
	}
	return c.client, c, err
}

// closeAfter gives back what c counts as when ctx is done.
func (c Charge) closeAfter(ctx context.Context) {
	c.client = nil
	context.AfterFunc(ctx, c.Close)
}

// Close must be called when the request has been handled.
func (c Charge) Close() {
	if c.client != nil {
		c.client.close()
	}
	if c.bytes != 0 {
		c.budget.give(c.account, c.bytes)
	}
	if c.refused != 0 {
		c.budget.refuse(c.account, -c.refused)
	}
}

// Hold adds n bytes, or takes -n bytes, to what the connection with the context ctx counts
// as, and reports whether its caller may hold so much.
func (b *Budget) Hold(ctx context.Context, n int64) bool {
	a, counted := ctx.Value(accountKey{}).(*account)
	if !counted {
		return true
	}
	if n <= 0 {
		b.give(a, -n)
		return true
	}
	if !b.take(a, n) {
		denied.With(ofFrame).Inc()
		return false
	}
	return true
}

// Reserve counts n more bytes for the caller of a request with the context ctx, until release
// is called. The error is the refusal of the request, if its caller would make the process
// hold too much. A nil Budget has no bounds.
func (b *Budget) Reserve(ctx context.Context, n int64) (release func(), err error) {
	if b == nil {
		return func() {}, nil
	}
	a := accountOf(ctx)
	if a == nil {
		return func() {}, nil // and is refused
	}
	if !b.take(a, n) {
		denied.With(ofRequest).Inc()
		return nil, errTooMuch
	}
	return sync.OnceFunc(func() { b.give(a, n) }), nil
}

// weight returns what a request of a kind counts as.
func weight(k requestinfo.Kind) int64 {
	switch k {
	case requestinfo.Short:
		return answer
	case requestinfo.Watch, requestinfo.Log:
		return stream
	}
	return session
}

// measure returns how many header fields r has, and how many bytes they and its target
// come to.
func measure(r *http.Request) (fields int, size int64) {
	size = copies * int64(len(r.RequestURI))
	for name, values := range r.Header {
		fields += len(values)
		size += int64(len(name))
		for _, value := range values {
			size += int64(len(value))
		}
	}
	return fields, size + field*int64(fields)
}

var heldBytes = prometheus.NewDesc(
	prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, "held_bytes"),
	"What connections and open requests count as, of the budget that callers share.", nil, nil)

// Describe implements prometheus.Collector.
func (b *Budget) Describe(to chan<- *prometheus.Desc) { to <- heldBytes }

// Collect implements prometheus.Collector.
func (b *Budget) Collect(to chan<- prometheus.Metric) {
	b.mu.Lock()
	held := b.held
	b.mu.Unlock()
	to <- prometheus.MustNewConstMetric(heldBytes, prometheus.GaugeValue, float64(held))
}

// Interface guards
var _ prometheus.Collector = (*Budget)(nil)
