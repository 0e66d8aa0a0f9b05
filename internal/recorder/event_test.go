// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"bufio"
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

func TestSend_RecorderThatAnswersIsAskedFirstAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nw := newNetwork(t, first, third)
		c, node := newClient(t), nw.node()
		send := func() {
			t.Helper()
			if err := c.Send(t.Context(), node, []netip.AddrPort{first, third}, []byte("{}")); err != nil {
				t.Fatal(err)
			}
		}
		nw.recorders[first].SetMode(recordertest.Silent)
		send()
		nw.recorders[first].SetMode(recordertest.V2)
		nw.recorders[third].SetMode(recordertest.Failing)
		send()
		nw.recorders[third].SetMode(recordertest.V2)
		send()
		if n := len(nw.recorders[first].TakeEvents()); n != 2 {
			t.Errorf("the first recorder has %d events; want 2", n)
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
	})
}

// A recorder may close a kept connection while an event is on its way.
func TestSend_RetriesWhenKeptConnectionCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		requests := 0
		node := new(network).node()
		node.DialPeer = func(context.Context, string, string) (net.Conn, error) {
			client, server := net.Pipe()
			go func() {
				defer server.Close()
				for buffered := bufio.NewReader(server); ; {
					r, err := http.ReadRequest(buffered)
					if err != nil {
						return
					}
					_, _ = io.Copy(io.Discard, r.Body)
					if requests++; requests == 2 {
						return
					}
					_, _ = io.WriteString(server, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
				}
			}()
			return client, nil
		}
		c := newClient(t)
		for range 2 {
			if err := c.Send(t.Context(), node, []netip.AddrPort{first}, []byte("{}")); err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // until the connection is idle
		}
		if requests != 3 {
			t.Errorf("the recorder has got %d requests; want 3", requests)
		}
	})
}
