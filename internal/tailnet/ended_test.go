// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/tsnet"
)

func TestConn_Dialled(t *testing.T) {
	if got, want := (&Conn{Local: node4, Port: 443}).Dialled(), netip.AddrPortFrom(node4, 443); got != want {
		t.Errorf("got %v; want %v", got, want)
	}
}

func TestEnd_ConnectionWithoutContext(t *testing.T) {
	new(Conn).End(errors.New("withdrawn")) // does not panic
}

func TestWithConn_EndsWithConnection(t *testing.T) {
	ctx := WithConn(t.Context(), netip.AddrPortFrom(peer4, 1), node4)
	conn := AnyConnFrom(ctx)
	if conn == nil || conn.Remote.Addr() != peer4 {
		t.Fatalf("got connection %+v", conn)
	}
	if age := time.Since(conn.Accepted); age < 0 || age > time.Minute {
		t.Errorf("accepted %v ago; want now", age)
	}
	withdrawn := errors.New("withdrawn")
	conn.End(withdrawn)
	if cause := context.Cause(ctx); !errors.Is(cause, withdrawn) {
		t.Errorf("the context ends with %v; want %v", cause, withdrawn)
	}
	if conn := AnyConnFrom(t.Context()); conn != nil {
		t.Errorf("without one, got connection %+v", conn)
	}
}

// A connection that its peer has reset has no addresses any more.
func TestConnFrom_ResetConnection(t *testing.T) {
	ctx := ConnContext(t.Context(), new(net.TCPConn))
	for name, from := range map[string]func(context.Context) (*Conn, error){"node": ConnFrom, "host": HostConnFrom} {
		if conn, err := from(ctx); conn != nil || err == nil {
			t.Errorf("%s: got %v, %v; want an error", name, conn, err)
		}
	}
}

func TestAddrPort_WithoutAddressIsAnError(t *testing.T) {
	if got, err := addrPort(&net.TCPAddr{Port: 443}); err == nil {
		t.Errorf("got %v; want an error", got)
	}
}

// Both listeners of a node have to close before it is not waited for any longer.
func TestRetireListeners_NamesNodesThatHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		node, other := &tsnet.Server{Hostname: "hanging"}, &tsnet.Server{Hostname: "other"}
		plain, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer plain.Close()
		release := make(chan struct{})
		defer close(release)
		closed := false
		listeners := []net.Listener{
			&handle{Listener: nodeListener{plain, node}, close: func() error { <-release; return nil }},
			&handle{Listener: nodeListener{plain, node}},
			&handle{Listener: nodeListener{plain, other}, close: func() error {
				time.Sleep(50 * time.Millisecond)
				closed = true
				return nil
			}},
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if diff := cmp.Diff([]string{"hanging"}, RetireListeners(ctx, listeners)); diff != "" {
			t.Errorf("nodes that hang (-want +got):\n%s", diff)
		}
		if !closed {
			t.Error("a node that takes its time is not waited for")
		}
	})
}
