// SPDX-License-Identifier: Apache-2.0

package tailnet_test

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
	"github.com/google/go-cmp/cmp"
	"github.com/pires/go-proxyproto"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"tailscale.com/ipn"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

var (
	node4 = netip.MustParseAddr(proxytest.NodeAddr)
	node6 = netip.MustParseAddr(proxytest.NodeAddr6)
	peer4 = netip.MustParseAddr(proxytest.AliceAddr)
	peer6 = netip.MustParseAddr(proxytest.AliceAddr6)

	// All of 127.0.0.0/8 is the host's.
	hostAddr  = netip.MustParseAddr("127.0.0.2")
	guestAddr = netip.MustParseAddr("127.0.0.3")
)

// equateConns compares where connections come from, not when.
var equateConns = cmp.Comparer(func(a, b *tailnet.Conn) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Remote == b.Remote && a.Dialled() == b.Dialled()
})

// refusedConn fails t unless c is refused with an error that mentions mention.
func refusedConn(t *testing.T, c net.Conn, mention string) {
	t.Helper()
	got, err := tailnet.ConnFrom(tailnet.ConnContext(t.Context(), c))
	if diff := cmp.Diff((*tailnet.Conn)(nil), got, equateConns); diff != "" {
		t.Errorf("got a tailnet connection; want the zero one (-want +got):\n%s", diff)
	}
	if err == nil {
		t.Error("got no error; want one")
	} else if !strings.Contains(err.Error(), mention) {
		t.Errorf("got error %q; want one that mentions %q", err, mention)
	}
}

func TestConnFrom_TailnetConnection(t *testing.T) {
	for _, tt := range []struct {
		name       string
		peer, node netip.Addr
	}{
		{"IPv4", peer4, node4},
		{"IPv6", peer6, node6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dialled, accepted := proxytest.Connect(t, tt.peer.String(), tt.node.String())
			want := &tailnet.Conn{
				Remote: netip.MustParseAddrPort(dialled.LocalAddr().String()),
				Local:  tt.node,
				Port:   netip.MustParseAddrPort(dialled.RemoteAddr().String()).Port(),
			}
			if want.Remote.Addr() != tt.peer {
				t.Fatalf("the test dialled from %v; want %v", want.Remote, tt.peer)
			}
			for name, c := range map[string]net.Conn{
				"plain":         accepted,
				"in TLS":        tls.Server(accepted, nil),
				"in TLS in TLS": tls.Server(tls.Server(accepted, nil), nil),
			} {
				got, err := tailnet.ConnFrom(tailnet.ConnContext(t.Context(), c))
				if err != nil {
					t.Errorf("%s: %v", name, err)
				}
				if diff := cmp.Diff(want, got, equateConns); diff != "" {
					t.Errorf("%s: connection (-want +got):\n%s", name, diff)
				}
			}
		})
	}
}

// embedding is a wrapper such as listener wrappers of other Caddy plugins return.
type embedding struct{ net.Conn }

// embeddingNode looks like a tailnet connection.
type embeddingNode struct{ *gonet.TCPConn }

// unwrapping is a wrapper that shows what it wraps, by the usual methods.
type unwrapping struct{ net.Conn }

func (u unwrapping) Unwrap() net.Conn                         { return u.Conn }
func (u unwrapping) NetConn() net.Conn                        { return u.Conn }
func (u unwrapping) ConnectionState() (s tls.ConnectionState) { return s }

// claiming is a wrapper that claims other addresses.
type claiming struct {
	net.Conn
	remote, local string
}

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

func (c claiming) RemoteAddr() net.Addr { return address(c.remote) }
func (c claiming) LocalAddr() net.Addr  { return address(c.local) }

func TestConnFrom_UnknownWrapperIsRefused(t *testing.T) {
	_, accepted := proxytest.Connect(t, proxytest.AliceAddr, proxytest.NodeAddr)
	for name, c := range map[string]net.Conn{
		"embedded":                 embedding{accepted},
		"embedded, by pointer":     &embedding{accepted},
		"embedded twice":           embedding{embedding{accepted}},
		"embedded as what it is":   embeddingNode{accepted},
		"shown by methods":         unwrapping{accepted},
		"with other addresses":     claiming{accepted, "100.64.0.3:1", "100.64.0.1:443"},
		"below TLS":                tls.Server(embedding{accepted}, nil),
		"above TLS":                embedding{tls.Server(accepted, nil)},
		"between TLS":              tls.Server(embedding{tls.Server(accepted, nil)}, nil),
		"anonymous struct":         struct{ net.Conn }{accepted},
		"anonymous struct, by ptr": &struct{ net.Conn }{accepted},
	} {
		t.Run(name, func(t *testing.T) {
			refusedConn(t, c, "was not accepted by a tailnet node")
		})
	}
}

// With the PROXY protocol, the client writes its own address.
func TestConnFrom_ProxyProtocolIsRefused(t *testing.T) {
	dialled, accepted := proxytest.Connect(t, proxytest.AliceAddr, proxytest.NodeAddr)
	if _, err := dialled.Write([]byte("PROXY TCP4 100.64.0.3 100.64.0.1 1 443\r\n")); err != nil {
		t.Fatal(err)
	}
	rewritten := proxyproto.NewConn(accepted)
	if got, want := rewritten.RemoteAddr().String(), "100.64.0.3:1"; got != want {
		t.Fatalf("the client wrote the address %v; want %v", got, want)
	}
	refusedConn(t, rewritten, "proxyproto.Conn")
	refusedConn(t, tls.Server(rewritten, nil), "proxyproto.Conn")
}

// addressless is a connection that must not be asked for its addresses.
type addressless struct {
	net.Conn
	t *testing.T
}

func (c addressless) RemoteAddr() net.Addr {
	c.t.Error("its remote address was asked for")
	return nil
}

func (c addressless) LocalAddr() net.Addr {
	c.t.Error("its local address was asked for")
	return nil
}

// The PROXY protocol's wrapper waits for its client before it returns an address. A call
// would block the loop in which the server accepts all connections.
func TestConnContext_DoesNotAskWrapperForAddresses(t *testing.T) {
	_, accepted := proxytest.Connect(t, proxytest.AliceAddr, proxytest.NodeAddr)
	c := addressless{accepted, t}
	refusedConn(t, c, "addressless")
	refusedConn(t, tls.Server(c, nil), "addressless")
}

// Traffic of Funnel comes from the internet, relayed by a node of Tailscale's.
func TestConnFrom_FunnelIsRefused(t *testing.T) {
	_, accepted := proxytest.Connect(t, proxytest.AliceAddr, proxytest.NodeAddr)
	funnel := &ipn.FunnelConn{Conn: accepted, Src: netip.MustParseAddrPort("192.0.2.1:1")}
	refusedConn(t, funnel, "ipn.FunnelConn")
	refusedConn(t, tls.Server(funnel, nil), "ipn.FunnelConn")
}

func TestConnFrom_HostSocketIsRefused(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	piped, other := net.Pipe()
	defer piped.Close()
	defer other.Close()

	for name, c := range map[string]net.Conn{
		"TCP":                                  accepted,
		"TCP in TLS":                           tls.Server(accepted, nil),
		"pipe":                                 piped,
		"TCP whose addresses are a tailnet's":  claiming{accepted, "100.64.0.2:1", "100.64.0.1:443"},
		"pipe whose addresses are a tailnet's": tls.Server(claiming{piped, "100.64.0.2:1", "100.64.0.1:443"}, nil),
	} {
		t.Run(name, func(t *testing.T) {
			refusedConn(t, c, "was not accepted by a tailnet node")
		})
	}
}

// A peer can reset a connection before the server accepts it. gonet then knows no remote
// address. ConnContext runs in the server's accept loop, where a panic would end Caddy.
func TestConnContext_ResetConnectionIsAnError(t *testing.T) {
	c := proxytest.ResetByPeer(t)
	if addr := c.RemoteAddr(); addr != nil {
		t.Fatalf("the connection still has the remote address %v, so that the test proves nothing", addr)
	}
	refusedConn(t, c, "ended already")
}

func TestConnFrom_UnrecordedConnectionIsRefused(t *testing.T) {
	got, err := tailnet.ConnFrom(t.Context())
	if err == nil {
		t.Error("got no error; want one")
	}
	if diff := cmp.Diff((*tailnet.Conn)(nil), got, equateConns); diff != "" {
		t.Errorf("connection (-want +got):\n%s", diff)
	}
}

// Not all at the same moment, nor later than they may.
func TestConn_IsOlderThan(t *testing.T) {
	_, accepted := proxytest.Connect(t, peer4.String(), node4.String())
	synctest.Test(t, func(t *testing.T) {
		var conns []*tailnet.Conn
		for range 1000 {
			conn, err := tailnet.ConnFrom(tailnet.ConnContext(t.Context(), accepted))
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, conn)
		}
		old := func() (n int) {
			for _, conn := range conns {
				if conn.IsOlderThan(time.Minute) {
					n++
				}
			}
			return n
		}
		time.Sleep(54 * time.Second)
		if n := old(); n > 0 {
			t.Errorf("after 54 s, %d connections are older than a minute", n)
		}
		time.Sleep(3 * time.Second)
		if n := old(); n < 350 || n > 650 {
			t.Errorf("after 57 s, %d of 1000 connections are older than a minute; want about half", n)
		}
		time.Sleep(3*time.Second + time.Nanosecond)
		if n := old(); n != len(conns) {
			t.Errorf("after a minute, %d of 1000 connections are older; want all", n)
		}
	})
}

func TestWithConn(t *testing.T) {
	want := &tailnet.Conn{Remote: netip.MustParseAddrPort("100.64.0.2:1"), Local: node4}
	got, err := tailnet.ConnFrom(tailnet.WithConn(t.Context(), want.Remote, want.Local))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, equateConns); diff != "" {
		t.Errorf("connection (-want +got):\n%s", diff)
	}
}

// WhoIs and the node's own addresses know an IPv4-mapped address only as IPv4.
func TestConn_MappedAddressesAreUnmapped(t *testing.T) {
	for _, remote := range []string{"100.64.0.2:1", "[::ffff:100.64.0.2]:1", "[::ffff:6440:2]:1"} {
		for _, local := range []string{"100.64.0.1:443", "[::ffff:100.64.0.1]:443"} {
			got, err := tailnet.TailnetConn(claiming{nil, remote, local})
			if err != nil {
				t.Fatal(err)
			}
			want := &tailnet.Conn{Remote: netip.AddrPortFrom(peer4, 1), Local: node4, Port: 443}
			if diff := cmp.Diff(want, got, equateConns); diff != "" {
				t.Errorf("from %s to %s: connection (-want +got):\n%s", remote, local, diff)
			}
		}
	}
}

func TestConn_UnusableAddressIsAnError(t *testing.T) {
	for _, c := range []claiming{
		{nil, "", "100.64.0.1:443"},
		{nil, "100.64.0.2", "100.64.0.1:443"},
		{nil, "100.64.0.2:1", ""},
		{nil, "100.64.0.2:1", "pipe"},
	} {
		got, err := tailnet.TailnetConn(c)
		if err == nil {
			t.Errorf("from %q to %q: got no error; want one", c.remote, c.local)
		}
		if diff := cmp.Diff((*tailnet.Conn)(nil), got, equateConns); diff != "" {
			t.Errorf("from %q to %q: connection (-want +got):\n%s", c.remote, c.local, diff)
		}
	}
}

// End also closes connections whose peer does not read.
func TestEnd_ClosesConnectionAndRequests(t *testing.T) {
	for _, layer := range []struct {
		name string
		of   func(net.Conn) net.Conn
	}{
		{"plain", func(c net.Conn) net.Conn { return c }},
		{"TLS", func(c net.Conn) net.Conn { return tls.Server(c, nil) }},
	} {
		t.Run(layer.name, func(t *testing.T) {
			dialled, accepted := proxytest.Connect(t, proxytest.AliceAddr, proxytest.NodeAddr)
			ctx := tailnet.ConnContext(t.Context(), layer.of(accepted))
			if again := tailnet.ConnContext(ctx, layer.of(accepted)); again != ctx {
				t.Error("a second handler of the server records the connection again")
			}
			conn, err := tailnet.ConnFrom(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if since := time.Since(conn.Accepted); since < 0 || since > time.Minute {
				t.Errorf("accepted %v ago", since)
			}
			cause := errors.New("withdrawn")
			conn.End(cause)
			<-ctx.Done()
			if got := context.Cause(ctx); !errors.Is(got, cause) {
				t.Errorf("the cause is %v; want %v", got, cause)
			}
			if err := dialled.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			_, err = io.Copy(io.Discard, dialled)
			if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
				t.Error("the connection is still open")
			}
		})
	}
}

// A session tells its client why it ends. Its requests end at once.
func TestEnd_LeavesTimeForFarewell(t *testing.T) {
	dialled, accepted := proxytest.Connect(t, proxytest.AliceAddr, proxytest.NodeAddr)
	ctx := tailnet.ConnContext(t.Context(), accepted)
	conn, err := tailnet.ConnFrom(ctx)
	if err != nil {
		t.Fatal(err)
	}
	conn.AllowFarewell()
	conn.End(errors.New("withdrawn"))
	<-ctx.Done()
	time.Sleep(100 * time.Millisecond) // long enough to close it
	if _, err := accepted.Write([]byte("goodbye")); err != nil {
		t.Fatal(err)
	}
	if err := dialled.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(dialled)
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		t.Error("the connection is still open")
	}
	if string(got) != "goodbye" {
		t.Errorf("the client reads %q", got)
	}
}

// It must not panic on values that it cannot look into.
func TestEmbedded_FindsNothing(t *testing.T) {
	type named struct{ Conn net.Conn }
	type hidden struct{ conn net.Conn }
	var none *embedding
	for name, v := range map[string]any{
		"nil":             nil,
		"nil pointer":     none,
		"not a struct":    address("x"),
		"field by name":   named{errConn{}},
		"unexported":      hidden{errConn{}},
		"nothing in it":   embedding{},
		"other embedding": struct{ error }{errors.New("x")},
	} {
		if got := tailnet.Embedded(v, "Conn"); got != nil {
			t.Errorf("%s: got %v; want nothing", name, got)
		}
	}
}

type errConn struct{ net.Conn }

// Caddy's HTTP server wraps connections in types that cannot be named here, so that a
// real server has to make them.
func TestConnFrom_CaddysLayers(t *testing.T) {
	for _, tt := range []struct {
		name, protocols string
		layer           string // type of the connection that Caddy hands over
	}{
		{"HTTP/1.1 only", "h1", "*caddyhttp.http2Conn"},
		{"HTTP/2 without TLS only", "h2c", "*caddyhttp.http2Conn"},
		{"HTTP/1.1 and HTTP/2", "h1 h2", "*gonet.TCPConn"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := proxytest.Config{Server: "protocols " + tt.protocols, Body: "watch"}.Start(t)
			dialled := s.Dial(t, proxytest.AliceAddr)
			c := <-watched
			if got := fmt.Sprintf("%T", c); got != tt.layer {
				t.Errorf("Caddy handed over a %s; want a %s", got, tt.layer)
			}
			got, err := tailnet.ConnFrom(tailnet.ConnContext(t.Context(), c))
			if err != nil {
				t.Fatal(err)
			}
			want := &tailnet.Conn{Remote: netip.MustParseAddrPort(dialled.LocalAddr().String()), Local: node4, Port: s.Port}
			if diff := cmp.Diff(want, got, equateConns); diff != "" {
				t.Errorf("connection (-want +got):\n%s", diff)
			}
		})
		t.Run(tt.name+"/socket of the host", func(t *testing.T) {
			s := proxytest.Config{Server: "protocols " + tt.protocols, Bind: "127.0.0.1", Body: "watch"}.Start(t)
			dialled, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", s.Port))
			if err != nil {
				t.Fatal(err)
			}
			defer dialled.Close()
			refusedConn(t, <-watched, "*net.TCPConn")
		})
	}
}

// watch is a handler that hands the connections of its server to watched.
type watch struct{}

var watched = make(chan net.Conn, 1)

func init() {
	caddy.RegisterModule(new(watch))
	httpcaddyfile.RegisterHandlerDirective("watch", func(httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
		return new(watch), nil
	})
	httpcaddyfile.RegisterDirectiveOrder("watch", httpcaddyfile.Before, "tracing")
}

func (*watch) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.watch", New: func() caddy.Module { return new(watch) }}
}

func (*watch) Provision(ctx caddy.Context) error {
	ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server).RegisterConnContext(func(ctx context.Context, c net.Conn) context.Context {
		watched <- c
		return ctx
	})
	return nil
}

func (*watch) ServeHTTP(http.ResponseWriter, *http.Request, caddyhttp.Handler) error { return nil }

// hostConn returns both ends of a connection from guestAddr to hostAddr.
func hostConn(t *testing.T) (server, client net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", netip.AddrPortFrom(hostAddr, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	client, err = (&net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(guestAddr, 0))}).DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	server, err = ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return server, client
}

func TestHostConnFrom_HostSocket(t *testing.T) {
	server, client := hostConn(t)
	ctx := tailnet.ConnContext(t.Context(), server)
	conn, err := tailnet.HostConnFrom(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if conn.Remote.String() != client.LocalAddr().String() || conn.Local != hostAddr || conn.Accepted.IsZero() {
		t.Errorf("got %+v; want a connection from %v to %v", conn, client.LocalAddr(), hostAddr)
	}
	if got, err := tailnet.ConnFrom(ctx); got != nil || err == nil {
		t.Errorf("as a tailnet node's connection: got %v, %v; want an error", got, err)
	}

	conn.End(errors.New("test"))
	<-ctx.Done()
	if _, err := client.Read(make([]byte, 1)); err == nil {
		t.Error("the connection can still be read from after its end")
	}
}

func TestHostConnFrom_WrapperIsRefused(t *testing.T) {
	server, client := hostConn(t)
	if _, err := client.Write([]byte("PROXY TCP4 127.0.0.9 127.0.0.2 1 443\r\n")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]net.Conn{"PROXY protocol": proxyproto.NewConn(server), "unknown": struct{ net.Conn }{server}} {
		if conn, err := tailnet.HostConnFrom(tailnet.ConnContext(t.Context(), c)); conn != nil || err == nil {
			t.Errorf("%s: got %v, %v; want an error", name, conn, err)
		}
	}
	if conn, err := tailnet.HostConnFrom(t.Context()); conn != nil || err == nil {
		t.Errorf("a server that records nothing: got %v, %v; want an error", conn, err)
	}
	ctx := tailnet.WithConn(t.Context(), netip.AddrPortFrom(guestAddr, 1), hostAddr)
	if conn, err := tailnet.HostConnFrom(ctx); conn != nil || err == nil {
		t.Errorf("a tailnet node's connection: got %v, %v; want an error", conn, err)
	}
}
