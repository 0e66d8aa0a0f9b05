// SPDX-License-Identifier: Apache-2.0

package tailnet

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
	"tailscale.com/tsnet"
)

// offline returns a node that cannot reach its control server.
func offline(t *testing.T) *tsnet.Server {
	t.Helper()
	t.Setenv("TS_NO_LOGS_NO_SUPPORT", "true")
	node := &tsnet.Server{Dir: t.TempDir(), Hostname: "offline", ControlURL: "http://127.0.0.1:1", UserLogf: func(string, ...any) {}}
	t.Cleanup(func() { _ = node.Close() })
	return node
}

// handle is one config's view of a listener that configs share, as caddy-tailscale's: to
// close it does not wake a call of Accept.
type handle struct {
	net.Listener
	closed atomic.Bool
	close  func() error
}

func (h *handle) Accept() (net.Conn, error) {
	if h.closed.Load() {
		return nil, net.ErrClosed
	}
	return h.Listener.Accept()
}

func (h *handle) Close() error {
	if h.closed.Swap(true) || h.close == nil {
		return nil
	}
	return h.close()
}

func (h *handle) Unwrap() net.Listener { return h.Listener }

// serve accepts connections, and closes the channel when that fails.
func serve(ln net.Listener) (ended <-chan struct{}) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
	// Calls of Accept are served in the order in which they came.
	time.Sleep(20 * time.Millisecond)
	return done
}

func wantEnd(t *testing.T, ended <-chan struct{}) {
	t.Helper()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("a call of Accept still waits; want it to end")
	}
}

func listenOn(t *testing.T, node *tsnet.Server) net.Listener {
	t.Helper()
	ln, err := node.Listen("tcp", ":443")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// Whether the call of Accept that has to end is in front of that of the config in use or
// behind it, whatever wraps the listener, and though the node is not connected.
func TestRetireListeners_EndsAcceptOfClosedHandle(t *testing.T) {
	for name, wrap := range map[string]func(net.Listener) net.Listener{
		"bare":           func(ln net.Listener) net.Listener { return ln },
		"TLS":            func(ln net.Listener) net.Listener { return embeddingListener{tls.NewListener(ln, nil)} },
		"PROXY protocol": func(ln net.Listener) net.Listener { return &proxyproto.Listener{Listener: ln} },
	} {
		for _, first := range []string{"old", "current"} {
			t.Run(fmt.Sprintf("%s, %s first", name, first), func(t *testing.T) {
				shared := listenOn(t, offline(t))
				old, current := wrap(&handle{Listener: shared}), wrap(&handle{Listener: shared})
				var oldEnded, currentEnded <-chan struct{}
				if first == "old" {
					oldEnded, currentEnded = serve(old), serve(current)
				} else {
					currentEnded, oldEnded = serve(current), serve(old)
				}
				RetireListeners(t.Context(), []net.Listener{old})
				wantEnd(t, oldEnded)
				select {
				case <-currentEnded:
					t.Error("the config in use accepts nothing any more")
				default:
				}
			})
		}
	}
}

func TestRetireListeners_EndsAcceptOfEachNode(t *testing.T) {
	var listeners []net.Listener
	var ended []<-chan struct{}
	for range 2 {
		ln := listenOn(t, offline(t))
		h := &handle{Listener: ln, close: ln.Close}
		listeners = append(listeners, h)
		ended = append(ended, serve(h))
	}
	RetireListeners(t.Context(), listeners)
	for _, e := range ended {
		wantEnd(t, e)
	}
}

// A listener that is closed along with its node, and one whose node never started.
func TestRetireListeners_GoneNode(t *testing.T) {
	node := offline(t)
	ln := &handle{Listener: listenOn(t, node), close: node.Close}
	ended := serve(ln)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	RetireListeners(t.Context(), []net.Listener{ln, nodeListener{plain, new(tsnet.Server)}})
	wantEnd(t, ended)
}

// The servers close what is not a tailnet's themselves.
func TestRetireListeners_LeavesPlainSockets(t *testing.T) {
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	RetireListeners(t.Context(), []net.Listener{plain, tls.NewListener(plain, nil), nil})
	conn, err := net.Dial("tcp", plain.Addr().String())
	if err != nil {
		t.Fatalf("a plain socket was closed: %v", err)
	}
	_ = conn.Close()
}

// A node that has seen thousands of connections may hang when it closes.
func TestRetireListeners_DoesNotWaitForever(t *testing.T) {
	node := offline(t)
	release := make(chan struct{})
	hangs := &handle{Listener: listenOn(t, node), close: func() error { <-release; return nil }}
	time.AfterFunc(5*time.Second, func() { close(release) })
	ln := listenOn(t, offline(t))
	other := &handle{Listener: ln, close: ln.Close}
	ended := serve(other)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	RetireListeners(ctx, []net.Listener{hangs, other})
	if d := time.Since(began); d > 4*time.Second {
		t.Errorf("waited %v for a node that hangs; want no longer than the context", d)
	}
	wantEnd(t, ended)
}

// What listener wrappers see of a visitor.
func TestVisitor_LooksLikeConnection(t *testing.T) {
	v := newVisitor()
	for _, addr := range []net.Addr{v.LocalAddr(), v.RemoteAddr()} {
		if _, err := addrPort(addr); err != nil {
			t.Errorf("address %v: %v", addr, err)
		}
	}
	if _, err := v.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("Read: %v; want EOF", err)
	}
	if _, err := accepted(v); err == nil {
		t.Error("a visitor is a tailnet connection; want it refused")
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
}
