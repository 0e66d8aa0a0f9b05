// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
)

func TestSend_FailingRecorder(t *testing.T) {
	for _, tt := range []struct {
		name string
		addr netip.AddrPort
		mode recordertest.Mode
		want string // in the error
		took time.Duration
	}{
		{"failing", first, recordertest.Failing, "recorder 100.64.0.7:80: it answers 500 Internal Server Error: the recorder fails", 0},
		{"silent", first, recordertest.Silent, "deadline exceeded", timeout},
		{"version 1", first, recordertest.V1, "it takes no events", 0},
		{"refusing connections", second, recordertest.V2, "connection refused", 0},
		{"absent", third, recordertest.V2, "deadline exceeded", timeout},
		{"unknown", netip.AddrPort{}, recordertest.V2, "name no address of a recorder", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nw := newNetwork(t, first)
				nw.recorders[first].SetMode(tt.mode)
				var addrs []netip.AddrPort
				if tt.addr.IsValid() {
					addrs = append(addrs, tt.addr)
				}
				began := time.Now()
				err := newClient(t).Send(t.Context(), nw.node(), addrs, []byte("{}"))
				if took := time.Since(began); took != tt.took {
					t.Errorf("it took %v; want %v", took, tt.took)
				}
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("got error %v; want one that contains %q", err, tt.want)
				}
			})
		})
	}
}

// The body of a recorder's answer may be endless.
func TestSend_QuotesBoundedPartOfAnswer(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, "it is broken"+strings.Repeat(".", 1<<16))
	}))
	t.Cleanup(server.Close)
	node := new(network).node()
	node.DialPeer = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, server.Listener.Addr().String())
	}
	err := newClient(t).Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}"))
	if err == nil || !strings.Contains(err.Error(), "it is broken") || len(err.Error()) > 1<<11 {
		t.Errorf("got an error of %d bytes: %.100v", len(err.Error()), err)
	}
}

// A recorder that does not answer costs the first event its head start, and later
// events nothing.
func TestSend_SilentRecorderDelaysOneEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nw := newNetwork(t, first, second, third)
		nw.recorders[first].SetMode(recordertest.Silent)
		nw.recorders[second].SetMode(recordertest.Failing)
		c, node := newClient(t), nw.node()
		for _, want := range []time.Duration{headStart, 0, 0} {
			began := time.Now()
			if err := c.Send(t.Context(), node, []netip.AddrPort{first, second, third}, []byte("{}")); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(began); took != want {
				t.Errorf("it took %v; want %v", took, want)
			}
		}
		if n := len(nw.recorders[third].TakeEvents()); n != 3 {
			t.Errorf("the recorder that answers has %d events; want 3", n)
		}
	})
}

func TestSend_SilentRecordersCostOneTimeoutAndAreTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nw := newNetwork(t, first)
		nw.recorders[first].SetMode(recordertest.Silent)
		c, node := newClient(t), nw.node()
		for _, want := range []time.Duration{timeout, 0, 0} {
			began := time.Now()
			if err := c.Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}")); err == nil {
				t.Fatal("the event was sent")
			}
			if took := time.Since(began); took != want {
				t.Errorf("it took %v; want %v", took, want)
			}
		}
		nw.recorders[first].SetMode(recordertest.V2)
		time.Sleep(timeout) // of the bubble's clock
		if err := c.Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}")); err != nil {
			t.Errorf("the recorder is not tried again: %v", err)
		}
	})
}

// A request that its client cancels says nothing about the recorder.
func TestSend_CanceledRequestIsNoTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nw := newNetwork(t, first)
		nw.recorders[first].SetMode(recordertest.Silent)
		c, node := newClient(t), nw.node()
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(timeout/2, cancel)
		if err := c.Send(ctx, node, []netip.AddrPort{first}, []byte("{}")); err == nil {
			t.Fatal("the event was sent")
		}
		nw.recorders[first].SetMode(recordertest.V2)
		if err := c.Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}")); err != nil {
			t.Errorf("the recorder is not asked: %v", err)
		}
	})
}

func TestSend_KeepsConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nw := newNetwork(t, first)
		c, node := newClient(t), nw.node()
		for range 20 {
			if err := c.Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}")); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // until the connection is idle
		}
		if n := nw.dials.Load(); n != 1 {
			t.Errorf("dialled %d times; want once", n)
		}
		// A kept connection that the recorder has closed is not a failure.
		nw.recorders[first].Cut()
		if err := c.Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}")); err != nil {
			t.Errorf("after the connection was closed: %v", err)
		}
	})
}
