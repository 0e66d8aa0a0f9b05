// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/upgrade"
)

// WrapUnrecorded returns w for the handlers that follow, where r asks for an upgrade that is not
// recorded. If it becomes an exec or an attach, its client is told why when ctx is
// cancelled with a cause. Over SPDY, a connection that just ends means to kubectl that the
// command has succeeded.
func WrapUnrecorded(ctx context.Context, w http.ResponseWriter, r *http.Request, client *tailnet.Conn) http.ResponseWriter {
	w = upgrade.Client(w)
	switch requestinfo.KindOf(r) {
	case requestinfo.Exec, requestinfo.Attach:
		return &unrecorded{w, ctx, isTrue(r.URL.Query()["tty"]), client}
	default:
		return w
	}
}

type unrecorded struct {
	http.ResponseWriter
	ctx    context.Context
	tty    bool
	client *tailnet.Conn
}

// Unwrap is for [http.ResponseController].
func (w *unrecorded) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Hijack implements [http.Hijacker].
func (w *unrecorded) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	controller := http.NewResponseController(w.ResponseWriter)
	upgraded := strings.ToLower(w.Header().Get("Upgrade"))
	version := strings.Join(versionsIn(w.Header(), upgraded), ",")
	if upgraded != spdyUpgrade && upgraded != websocketUpgrade || !known(version, upgraded, exec) {
		return controller.Hijack()
	}
	p, err := terminalProtocol(unobserved{}, w.tty, upgraded, version)
	if err != nil {
		return controller.Hijack()
	}
	c, buffered, err := hijack(controller, &lenient{protocol: p}, func() {})
	if err != nil {
		return nil, nil, err
	}
	w.client.AllowFarewell()
	c.endWith(w.ctx)
	return c, buffered, nil
}

// unobserved is the observer of a session that is not recorded.
type unobserved struct{}

func (unobserved) streamOpened(h streamHeader) (stream, error) { return terminalStream(h) }
func (unobserved) fromClient(stream, []byte) error             { return nil }
func (unobserved) fromServer(stream, []byte) error             { return nil }

// lenient is a protocol that passes what it does not understand. From then on it does not
// know where frames begin, so there is no farewell.
type lenient struct {
	protocol
	lost atomic.Bool // passed something that it did not understand
}

// maxHeld is how much of a frame is held until the rest arrives. The API server and
// kubectl write frames of 32 KiB.
const maxHeld = 64 << 10

func (l *lenient) fromClient(b []byte) (int, error) { return l.pass(b, l.protocol.fromClient) }
func (l *lenient) fromServer(b []byte) (int, error) { return l.pass(b, l.protocol.fromServer) }

func (l *lenient) pass(b []byte, next func([]byte) (int, error)) (int, error) {
	if l.lost.Load() {
		return len(b), nil
	}
	n, err := next(b)
	if err != nil || n == 0 && len(b) > maxHeld {
		l.lost.Store(true)
		return len(b), nil
	}
	return n, nil
}

func (l *lenient) farewell(reason string) []byte {
	if l.lost.Load() {
		return nil
	}
	return l.protocol.farewell(reason)
}
