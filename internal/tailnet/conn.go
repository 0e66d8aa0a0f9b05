// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
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
	// Accepted is when the connection was accepted. What was known about Remote
	// before may be about another peer.
	Accepted time.Time
	// Note is for whoever decides about the requests on the connection, to find
	// again what it decided. It always holds values of one type.
	Note atomic.Value

	// end is what End does.
	end func(cause error)
}

// End ends every request on the connection, whose contexts say cause, and closes
// it. It does not wait.
func (c *Conn) End(cause error) {
	if c.end != nil {
		c.end(cause)
	}
}

type connKey struct{}

// connOrError is what [ConnContext] leaves in a connection's context.
type connOrError struct {
	conn *Conn
	// err is why the connection is no tsnet node's, nil if it is. conn is then
	// nil, or the socket of the host that the connection ends in.
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
	conn.Accepted = time.Now()
	// Nobody has to call cancel for a connection that ends by itself: the
	// server's context, which ctx comes from, is never done and so keeps no list
	// of those that wait for it.
	ctx, cancel := context.WithCancelCause(ctx)
	conn.end = func(cause error) {
		cancel(cause)
		// TLS takes leave of its peer, who may not be reading.
		go func() { _ = c.Close() }()
	}
	return context.WithValue(ctx, connKey{}, connOrError{conn, err})
}

// WithConn returns a copy of ctx in which a connection was accepted now, from remote
// to local. It is ended by the connection's End.
func WithConn(ctx context.Context, remote netip.AddrPort, local netip.Addr) context.Context {
	conn := &Conn{Remote: remote, Local: local, Accepted: time.Now()}
	ctx, conn.end = context.WithCancelCause(ctx)
	return context.WithValue(ctx, connKey{}, connOrError{conn: conn})
}

// ConnFrom returns the tailnet connection that a request with this context came
// on. It is an error if the connection came in any other way.
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
// came on, for a server that listens on the tailnet address which the host's own
// Tailscale daemon has given to the host. It is an error if the connection is a
// tsnet node's, or came through a wrapper that may have rewritten addresses.
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

var errNotRecorded = errors.New("the connection was accepted by a server that does not record where connections come from")

// accepted returns the tailnet connection at the bottom of c. If that is a socket
// of the host, it returns that together with an error.
//
// The layers that it takes off are crypto/tls's and Caddy's own, which pass the
// addresses on as they are. Any other layer might not: the PROXY protocol's
// reports the remote address that its client wrote. Such a connection is
// refused, as is one that ends in a socket of the host.
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
				// Not even its address is asked for: with the PROXY protocol, the
				// answer waits for the client, and the server accepts nobody else
				// meanwhile.
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
	// An IPv4-mapped IPv6 address is the IPv4 address: nodes and WhoIs know
	// only that form.
	return &Conn{
		Remote: netip.AddrPortFrom(remote.Addr().Unmap(), remote.Port()),
		Local:  local.Addr().Unmap(),
	}, nil
}

// addrPort returns the address and port that a is. It is an error if there is
// none: a connection that its peer has reset by now no longer has a remote
// address, and a panic here, in the server's accept loop, would end Caddy.
func addrPort(a net.Addr) (netip.AddrPort, error) {
	if a == nil {
		return netip.AddrPort{}, errors.New("the connection has ended already")
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

// embedded returns the value of v's embedded field of that name, or nil. It is
// how a wrapper without an Unwrap method is looked into, and the only place
// that looks into other packages' types.
func embedded(v any, name string) any {
	s := reflect.Indirect(reflect.ValueOf(v))
	if s.Kind() != reflect.Struct {
		return nil
	}
	f, ok := s.Type().FieldByName(name)
	if !ok || !f.Anonymous {
		return nil
	}
	return s.FieldByIndex(f.Index).Interface()
}
