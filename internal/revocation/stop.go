// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"bytes"
	"context"
	"errors"
	"io"
	"mime"
	"net/http"
	"net/netip"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Stopping is the cancellation cause of streams that end because a tailnet node closes. It
// is also what their clients read.
type Stopping string

// The reasons.
const (
	Exiting Stopping = "the proxy is stopping"
	Leaving Stopping = "the proxy leaves this tailnet node"
)

// Error implements error.
func (s Stopping) Error() string { return string(s) }

// Is makes it a [context.Canceled]: see [Revoked.Is].
func (Stopping) Is(target error) bool { return target == context.Canceled }

// DeliveryTime is how long what was sent last may take to reach the clients.
const DeliveryTime = 500 * time.Millisecond

// Stop ends all streams of the process, as [Registry.EndOn] does, and from then on every
// new one.
func (r *Registry) Stop(limit time.Duration) (ended map[requestinfo.Kind]int) {
	r.mu.Lock()
	r.stopping = true
	r.mu.Unlock()
	return r.EndOn(func(netip.AddrPort) bool { return true }, Exiting, limit)
}

// EndOn ends the streams of clients that dialled what closing reports true for,
// and returns how many, by kind. It waits until no request to these addresses is open, and
// closes the connections of the streams: otherwise clients would send their next requests to
// a node that no longer answers. All of that takes limit at most.
func (r *Registry) EndOn(closing func(dialled netip.AddrPort) bool, why Stopping, limit time.Duration) (ended map[requestinfo.Kind]int) {
	deadline := time.Now().Add(limit - DeliveryTime)
	ended = make(map[requestinfo.Kind]int)
	conns := make(map[*tailnet.Conn]bool)
	open := r.on(closing, func(req *Request) {
		if req.cancel != nil {
			req.cancel(why)
			ended[req.kind]++
			conns[req.conn] = true
		}
	})
	if open == 0 {
		return nil
	}
	for open > 0 && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
		open = r.on(closing, func(*Request) {})
	}
	time.Sleep(DeliveryTime)
	for conn := range conns {
		conn.End(why)
	}
	return ended
}

// on calls f for each open request to what dialled reports true for, and returns how many
// there are.
func (r *Registry) on(dialled func(netip.AddrPort) bool, f func(*Request)) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.trackers {
		for req := t.open; req != nil; req = req.next {
			if dialled(req.conn.Dialled()) {
				n++
				f(req)
			}
		}
	}
	return n
}

// Open returns how many requests are open, by kind.
func (r *Registry) Open() map[requestinfo.Kind]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	open := make(map[requestinfo.Kind]int)
	for kind, n := range r.open {
		if n > 0 {
			open[requestinfo.Kind(kind)] = n
		}
	}
	return open
}

// StoppingError returns why a request with the context ctx, which was not answered yet, never
// will be, nil if it may be: the node closes.
func StoppingError(ctx context.Context) error {
	why := stopped(ctx)
	if why == "" {
		return nil
	}
	return apistatus.TryAgain(apistatus.Stopping, "%v, and opens no more streams", why)
}

// stopped returns why a request with the context ctx has ended, if that is because the node
// closes.
func stopped(ctx context.Context) Stopping {
	if ctx.Err() == nil {
		return "" // and keep why off the heap
	}
	var why Stopping
	errors.As(context.Cause(ctx), &why)
	return why
}

// EndWhenStopping makes the body of resp, the answer to r, end properly when r is ended by
// [Registry.EndOn]. A watch ends as when the API server ends it: kubectl exits, and informers
// watch again from where they were. A log must not look complete, so it ends with the
// reason, and then with an error.
func EndWhenStopping(r *http.Request, resp *http.Response) {
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return // it is written to as well
	}
	switch requestinfo.KindOf(r) {
	case requestinfo.Watch:
		resp.Body = &body{ReadCloser: resp.Body, ctx: r.Context(), end: io.EOF}
	case requestinfo.Log:
		media, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		resp.Body = &body{ReadCloser: resp.Body, ctx: r.Context(), text: media == "text/plain", end: context.Canceled}
	}
}

// body is the body of an answer to a stream.
type body struct {
	io.ReadCloser
	ctx  context.Context
	text bool          // whether the client can read why the stream ends
	rest *bytes.Reader // what it reads then, nil until then
	end  error         // how the body ends then
}

// Read implements [io.Reader].
func (b *body) Read(p []byte) (int, error) {
	if b.rest == nil {
		n, err := b.ReadCloser.Read(p)
		why := stopped(b.ctx)
		if err == nil || errors.Is(err, io.EOF) || why == "" {
			return n, err
		}
		b.rest = new(bytes.Reader)
		if b.text {
			b.rest.Reset([]byte("\nThe log goes on, but " + why + ".\n"))
		}
		if n > 0 {
			return n, nil
		}
	}
	n, err := b.rest.Read(p)
	if err != nil {
		err = b.end
	}
	return n, err
}
