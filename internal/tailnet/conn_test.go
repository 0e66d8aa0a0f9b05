// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	_ "github.com/caddyserver/caddy/v2/modules/filestorage"
	"github.com/google/go-cmp/cmp"
	"github.com/pires/go-proxyproto"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"tailscale.com/ipn"
)

// equateConns compares where connections come from, not when.
var equateConns = cmp.Comparer(func(a, b *Conn) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Remote == b.Remote && a.Local == b.Local
})

// refusedConn fails t unless c is refused with an error that mentions mention.
func refusedConn(t *testing.T, c net.Conn, mention string) {
	t.Helper()
	got, err := ConnFrom(ConnContext(t.Context(), c))
	if diff := cmp.Diff((*Conn)(nil), got, equateConns); diff != "" {
		t.Errorf("got a tailnet connection; want the zero one (-want +got):\n%s", diff)
	}
	if err == nil {
		t.Error("got no error; want one")
	} else if !strings.Contains(err.Error(), mention) {
		t.Errorf("got error %q; want one that mentions %q", err, mention)
	}
}

func TestTailnetConnectionIsAccepted(t *testing.T) {
	for _, tt := range []struct {
		name       string
		peer, node netip.Addr
	}{
		{"IPv4", peer4, node4},
		{"IPv6", peer6, node6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dialled, accepted := connect(t, tt.peer, tt.node)
			want := &Conn{
				Remote: netip.MustParseAddrPort(dialled.LocalAddr().String()),
				Local:  tt.node,
			}
			if want.Remote.Addr() != tt.peer {
				t.Fatalf("the test dialled from %v; want %v", want.Remote, tt.peer)
			}
			for name, c := range map[string]net.Conn{
				"plain":         accepted,
				"in TLS":        tls.Server(accepted, nil),
				"in TLS in TLS": tls.Server(tls.Server(accepted, nil), nil),
			} {
				got, err := ConnFrom(ConnContext(t.Context(), c))
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

// embedding is a wrapper as listener wrappers of other Caddy plugins return them.
type embedding struct{ net.Conn }

// embeddingNode looks as if it were a tailnet connection.
type embeddingNode struct{ *gonet.TCPConn }

// unwrapping is a wrapper that shows what is in it, by the methods in use.
type unwrapping struct{ net.Conn }

func (u unwrapping) Unwrap() net.Conn                         { return u.Conn }
func (u unwrapping) NetConn() net.Conn                        { return u.Conn }
func (u unwrapping) ConnectionState() (s tls.ConnectionState) { return s }

// claiming says of a connection that its addresses are others.
type claiming struct {
	net.Conn
	remote, local string
}

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

func (c claiming) RemoteAddr() net.Addr { return address(c.remote) }
func (c claiming) LocalAddr() net.Addr  { return address(c.local) }

func TestUnknownWrapperIsRefused(t *testing.T) {
	_, accepted := connect(t, peer4, node4)
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

// A listener wrapper for the PROXY protocol has the client write who it is.
func TestProxyProtocolIsRefused(t *testing.T) {
	dialled, accepted := connect(t, peer4, node4)
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

// The PROXY protocol's wrapper knows no address before its client has sent one, and
// whoever asks waits for that: here, the loop in which the server accepts everybody.
func TestAClientThatSaysNothingDoesNotHoldUpTheServer(t *testing.T) {
	_, accepted := connect(t, peer4, node4)
	c := addressless{accepted, t}
	refusedConn(t, c, "addressless")
	refusedConn(t, tls.Server(c, nil), "addressless")
}

// Funnel's traffic comes from the internet, relayed by a node of Tailscale's.
func TestFunnelIsRefused(t *testing.T) {
	_, accepted := connect(t, peer4, node4)
	funnel := &ipn.FunnelConn{Conn: accepted, Src: netip.MustParseAddrPort("192.0.2.1:1")}
	refusedConn(t, funnel, "ipn.FunnelConn")
	refusedConn(t, tls.Server(funnel, nil), "ipn.FunnelConn")
}

func TestSocketOfTheHostIsRefused(t *testing.T) {
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

func TestConnectionThatWasNotLookedAtIsRefused(t *testing.T) {
	got, err := ConnFrom(t.Context())
	if err == nil {
		t.Error("got no error; want one")
	}
	if diff := cmp.Diff((*Conn)(nil), got, equateConns); diff != "" {
		t.Errorf("connection (-want +got):\n%s", diff)
	}
}

func TestWithConn(t *testing.T) {
	want := &Conn{Remote: netip.MustParseAddrPort("100.64.0.2:1"), Local: node4}
	got, err := ConnFrom(WithConn(t.Context(), want.Remote, want.Local))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, equateConns); diff != "" {
		t.Errorf("connection (-want +got):\n%s", diff)
	}
}

// WhoIs and the node's own addresses know an IPv4-mapped address as IPv4 only.
func TestMappedAddressesAreUnmapped(t *testing.T) {
	for _, remote := range []string{"100.64.0.2:1", "[::ffff:100.64.0.2]:1", "[::ffff:6440:2]:1"} {
		for _, local := range []string{"100.64.0.1:443", "[::ffff:100.64.0.1]:443"} {
			got, err := tailnetConn(claiming{nil, remote, local})
			if err != nil {
				t.Fatal(err)
			}
			want := &Conn{Remote: netip.AddrPortFrom(peer4, 1), Local: node4}
			if diff := cmp.Diff(want, got, equateConns); diff != "" {
				t.Errorf("from %s to %s: connection (-want +got):\n%s", remote, local, diff)
			}
		}
	}
}

func TestConnectionWithoutUsableAddressIsRefused(t *testing.T) {
	for _, c := range []claiming{
		{nil, "", "100.64.0.1:443"},
		{nil, "100.64.0.2", "100.64.0.1:443"},
		{nil, "100.64.0.2:1", ""},
		{nil, "100.64.0.2:1", "pipe"},
	} {
		got, err := tailnetConn(c)
		if err == nil {
			t.Errorf("from %q to %q: got no error; want one", c.remote, c.local)
		}
		if diff := cmp.Diff((*Conn)(nil), got, equateConns); diff != "" {
			t.Errorf("from %q to %q: connection (-want +got):\n%s", c.remote, c.local, diff)
		}
	}
}

// Ending a connection ends the requests on it, and the connection, of a peer that
// does not read as well.
func TestEndClosesTheConnectionAndItsRequests(t *testing.T) {
	for _, layer := range []struct {
		name string
		of   func(net.Conn) net.Conn
	}{
		{"plain", func(c net.Conn) net.Conn { return c }},
		{"TLS", func(c net.Conn) net.Conn { return tls.Server(c, nil) }},
	} {
		t.Run(layer.name, func(t *testing.T) {
			dialled, accepted := connect(t, peer4, node4)
			ctx := ConnContext(t.Context(), layer.of(accepted))
			if again := ConnContext(ctx, layer.of(accepted)); again != ctx {
				t.Error("a second handler of the server has the connection looked at again")
			}
			conn, err := ConnFrom(ctx)
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

// What embedded must not do: panic on values that it cannot look into.
func TestEmbeddedFindsNothingWhereNothingIsEmbedded(t *testing.T) {
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
		if got := embedded(v, "Conn"); got != nil {
			t.Errorf("%s: got %v; want nothing", name, got)
		}
	}
}

type errConn struct{ net.Conn }

// The layers that Caddy's HTTP server puts around a connection are of types that
// cannot be named here, so a real server has to make them.
func TestConnectionInCaddysOwnLayers(t *testing.T) {
	for _, tt := range []struct {
		name, protocols string
		layer           string // type of the connection that Caddy hands over
	}{
		{"HTTP/1.1 only", `"h1"`, "*caddyhttp.http2Conn"},
		{"HTTP/2 without TLS only", `"h2c"`, "*caddyhttp.http2Conn"},
		{"HTTP/1.1 and HTTP/2", `"h1", "h2"`, "*gonet.TCPConn"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStack(t)
			seen := serve(t, listen(t, s, node4), tt.protocols)
			dialled := dial(t, s, peer4, node4)
			c := <-seen
			if got := fmt.Sprintf("%T", c); got != tt.layer {
				t.Errorf("Caddy handed over a %s; want a %s", got, tt.layer)
			}
			got, err := ConnFrom(ConnContext(t.Context(), c))
			if err != nil {
				t.Fatal(err)
			}
			want := &Conn{Remote: netip.MustParseAddrPort(dialled.LocalAddr().String()), Local: node4}
			if diff := cmp.Diff(want, got, equateConns); diff != "" {
				t.Errorf("connection (-want +got):\n%s", diff)
			}
		})
		t.Run(tt.name+"/socket of the host", func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			seen := serve(t, ln, tt.protocols)
			dialled, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer dialled.Close()
			refusedConn(t, <-seen, "*net.TCPConn")
		})
	}
}

// serve has a Caddy server accept from ln and returns the connections that it
// hands to ConnContext functions.
func serve(t *testing.T, ln net.Listener, protocols string) <-chan net.Conn {
	t.Helper()
	w := &watched{listener: ln, conns: make(chan net.Conn, 1)}
	current.Store(w)
	var config caddy.Config
	err := json.Unmarshal(fmt.Appendf(nil, `{
		"admin": {"disabled": true, "config": {"persist": false}},
		"storage": {"module": "file_system", "root": %q},
		"logging": {"logs": {"default": {"level": "ERROR"}}},
		"apps": {"http": {"servers": {"test": {
			"listen": ["watched/test:1"],
			"protocols": [%s],
			"automatic_https": {"disable": true},
			"routes": [{"handle": [{"handler": "watch"}]}]
		}}}}
	}`, t.TempDir(), protocols), &config)
	if err != nil {
		t.Fatal(err)
	}
	if err := caddy.Run(&config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
	})
	return w.conns
}

// watched is a server under test: what it accepts from, and where to put the
// connections that it accepts.
type watched struct {
	listener net.Listener
	conns    chan net.Conn
}

// current is the server under test; Caddy runs one config at a time.
var current atomic.Pointer[watched]

func init() {
	caddy.RegisterNetwork("watched", func(context.Context, string, string, string, uint, net.ListenConfig) (any, error) {
		return current.Load().listener, nil
	})
	caddy.RegisterModule(new(watch))
}

// watch is an HTTP handler that looks at connections as ours does.
type watch struct{}

func (*watch) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "http.handlers.watch", New: func() caddy.Module { return new(watch) }}
}

func (*watch) Provision(ctx caddy.Context) error {
	conns := current.Load().conns
	ctx.Value(caddyhttp.ServerCtxKey).(*caddyhttp.Server).RegisterConnContext(func(ctx context.Context, c net.Conn) context.Context {
		conns <- c
		return ctx
	})
	return nil
}

func (*watch) ServeHTTP(http.ResponseWriter, *http.Request, caddyhttp.Handler) error { return nil }
