// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

// Conn is a connection that arrived over a tailnet.
type Conn struct {
	// Remote is the address and port of the peer.
	Remote netip.AddrPort
	// Local is the address that the peer dialled: one of the accepting node's.
	Local netip.Addr
	// Port is the port that it dialled.
	Port uint16
	// Accepted is when the connection was accepted. An answer about Remote from before
	// that may be about another peer.
	Accepted time.Time
	// Note caches what was decided about requests on the connection. It only ever holds
	// values of one type.
	Note atomic.Value

	// end implements End.
	end func(cause error)
	// farewell is set by AllowFarewell.
	farewell atomic.Bool
	// jitter, between 0 and 1, is different for each connection: see IsOlderThan.
	jitter float64
}

// farewellTimeout is how long a connection may stay open after its end.
const farewellTimeout = 10 * time.Second

// AllowFarewell makes End close the connection only after ten seconds. Who calls it has
// taken the connection over, passes nothing on once the context is cancelled, and closes
// the connection when the client has been told why.
func (c *Conn) AllowFarewell() { c.farewell.Store(true) }

// Dialled returns the address and the port that the peer dialled.
func (c *Conn) Dialled() netip.AddrPort { return netip.AddrPortFrom(c.Local, c.Port) }

// IsOlderThan reports whether the connection was accepted longer ago than maxAge, or than
// up to a tenth less. Connections that clients opened together do not end together.
func (c *Conn) IsOlderThan(maxAge time.Duration) bool {
	return time.Since(c.Accepted) > maxAge-time.Duration(c.jitter*float64(maxAge)/10)
}

// End cancels the contexts of all requests on the connection, with cause, and closes the
// connection. It does not wait.
func (c *Conn) End(cause error) {
	if c.end != nil {
		c.end(cause)
	}
}

type connKey struct{}

// connOrError is what [ConnContext] leaves in a connection's context.
type connOrError struct {
	conn *Conn
	// err says why the connection is not a tsnet node's. conn is then nil, or the
	// socket of the host at the bottom of the connection.
	err error
}

// ConnContext records in ctx what kind of connection c is. It has the shape of
// [net/http.Server.ConnContext], which sees a connection before anything is read
// from it, so nothing that a client sends can change the result.
func ConnContext(ctx context.Context, c net.Conn) context.Context {
	if _, done := ctx.Value(connKey{}).(connOrError); done {
		return ctx // by another handler of the same server
	}
	conn, err := accepted(c)
	if conn == nil {
		return context.WithValue(ctx, connKey{}, connOrError{err: err})
	}
	conn.Accepted, conn.jitter = time.Now(), rand.Float64() //nolint:gosec // no secret
	// A connection that ends by itself does not call cancel. That leaks nothing: the
	// server's context, the parent, is never done and keeps no list of its children.
	ctx, cancel := context.WithCancelCause(ctx)
	conn.end = func(cause error) {
		cancel(cause)
		wait := time.Duration(0)
		if conn.farewell.Load() {
			wait = farewellTimeout
		}
		// Closing TLS writes to the peer, which may not be reading.
		time.AfterFunc(wait, func() { _ = c.Close() })
	}
	return context.WithValue(ctx, connKey{}, connOrError{conn, err})
}

// WithConn returns a copy of ctx with a connection from remote to local that is accepted
// now. The connection's End cancels it.
func WithConn(ctx context.Context, remote netip.AddrPort, local netip.Addr) context.Context {
	conn := &Conn{Remote: remote, Local: local, Accepted: time.Now()}
	ctx, conn.end = context.WithCancelCause(ctx)
	return context.WithValue(ctx, connKey{}, connOrError{conn: conn})
}

// ConnFrom returns the tailnet connection that a request with this context came on. It is
// an error if the request came in any other way.
func ConnFrom(ctx context.Context) (*Conn, error) {
	v, ok := ctx.Value(connKey{}).(connOrError)
	if !ok {
		return nil, errNotRecorded
	}
	if v.err != nil {
		return nil, v.err
	}
	return v.conn, nil
}

// HostConnFrom returns the socket of the host that a request with this context
// came on, for a server that listens on the tailnet address of the host, which the host's
// own Tailscale daemon manages. It is an error if the connection is a tsnet node's, or
// came through a wrapper that may have rewritten addresses.
func HostConnFrom(ctx context.Context) (*Conn, error) {
	v, ok := ctx.Value(connKey{}).(connOrError)
	switch {
	case !ok:
		return nil, errNotRecorded
	case v.conn == nil:
		return nil, v.err
	case v.err == nil:
		return nil, errors.New("the connection was accepted by a tailnet node of its own, and the host's Tailscale daemon knows nothing about it")
	}
	return v.conn, nil
}

// AnyConnFrom returns the connection that a request with this context came on, whatever
// accepted it, to count what its peer holds. It is nil where not even that is certain.
func AnyConnFrom(ctx context.Context) *Conn {
	v, _ := ctx.Value(connKey{}).(connOrError)
	return v.conn
}

var errNotRecorded = errors.New("the connection was accepted by a server that does not record where connections come from")

// accepted returns the tailnet connection at the bottom of c. If that is a socket of the
// host, it returns the socket together with an error.
//
// It removes the layers of crypto/tls and of Caddy, which do not change addresses. Any
// other layer may: that of the PROXY protocol reports the remote address that the client
// wrote. Such a connection is refused, as is one that ends in a socket of the host.
func accepted(c net.Conn) (*Conn, error) {
	for {
		switch layer := c.(type) {
		case *gonet.TCPConn:
			return tailnetConn(layer)
		case *net.TCPConn:
			conn, err := tailnetConn(layer)
			if err != nil {
				return nil, err
			}
			return conn, fmt.Errorf("the connection from %v was not accepted by a tailnet node (it is a %T)", c.RemoteAddr(), c)
		case *tls.Conn:
			c = layer.NetConn()
		default:
			var inner net.Conn
			if isCaddys(c) {
				inner, _ = embedded(c, "Conn").(net.Conn)
			}
			if inner == nil {
				// Do not ask for its address either: the PROXY protocol's layer
				// waits until the client sends one, and the server accepts no
				// other connection meanwhile.
				return nil, fmt.Errorf("the connection was not accepted by a tailnet node (it is a %T)", c)
			}
			c = inner
		}
	}
}

func tailnetConn(c net.Conn) (*Conn, error) {
	remote, err := addrPort(c.RemoteAddr())
	if err != nil {
		return nil, fmt.Errorf("remote address of a tailnet connection: %w", err)
	}
	local, err := addrPort(c.LocalAddr())
	if err != nil {
		return nil, fmt.Errorf("local address of a tailnet connection: %w", err)
	}
	// Nodes and WhoIs know an IPv4-mapped IPv6 address only as IPv4.
	return &Conn{
		Remote: netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port()),
		Local:  local.Addr().Unmap(),
		Port:   local.Port(),
	}, nil
}

// addrPort parses a. It is an error if a is nil: a connection that its peer has reset
// has no remote address any more. A panic here, in the server's accept loop, would end
// Caddy.
func addrPort(a net.Addr) (netip.AddrPort, error) {
	if a == nil {
		return netip.AddrPort{}, errors.New("the connection has ended already")
	}
	if tcp, ok := a.(*net.TCPAddr); ok { // spares writing and parsing it
		if addr := tcp.AddrPort(); addr.IsValid() {
			return addr, nil
		}
	}
	return netip.ParseAddrPort(a.String())
}

// isCaddys reports whether v's type is one that Caddy's HTTP server wraps
// connections in.
func isCaddys(v any) bool {
	t := reflect.TypeOf(v)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.PkgPath() == "github.com/caddyserver/caddy/v2/modules/caddyhttp"
}

// embedded returns the value of v's embedded field of that name, or nil.
func embedded(v any, name string) any { return field(v, name, true) }

// field returns the value of v's field of that name, or nil. It unwraps what has no
// Unwrap method. Besides upgrade.CloseWrite, it is the only function that looks into types
// of other packages.
func field(v any, name string, embedded bool) any {
	s := reflect.Indirect(reflect.ValueOf(v))
	if s.Kind() != reflect.Struct {
		return nil
	}
	f, ok := s.Type().FieldByName(name)
	if !ok || embedded && !f.Anonymous {
		return nil
	}
	return s.FieldByIndex(f.Index).Interface()
}
