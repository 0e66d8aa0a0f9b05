// SPDX-License-Identifier: Apache-2.0

package recorder

import (
	"net/netip"
	"testing"
	"testing/synctest"
)

// Two tailnets may use the same addresses.
func TestClient_NodesShareNoRecorders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newNetwork(t, first), newNetwork(t, first)
		c := newClient(t)
		for _, nw := range []*network{a, b} {
			if err := c.Send(t.Context(), nw.node(), []netip.AddrPort{first}, []byte("{}")); err != nil {
				t.Fatal(err)
			}
			if n := len(nw.recorders[first].TakeEvents()); n != 1 {
				t.Errorf("the recorder of the node's tailnet has %d events; want 1", n)
			}
		}
	})
}

func TestClient_NodesShareNoMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newNetwork(t), newNetwork(t, first)
		c := newClient(t)
		if err := c.Send(t.Context(), a.node(), []netip.AddrPort{first}, []byte("{}")); err == nil {
			t.Error("the event was sent to a recorder of another tailnet")
		}
		if err := c.Send(t.Context(), b.node(), []netip.AddrPort{first}, []byte("{}")); err != nil {
			t.Errorf("a timeout in another tailnet counts: %v", err)
		}
	})
}

// A grant may name any address that the proxy's host can reach.
func TestClient_DialsOnlyTheTailnet(t *testing.T) {
	nw := &network{}
	outside := netip.MustParseAddrPort("192.0.2.1:80")
	if err := newClient(t).Send(t.Context(), nw.node(), []netip.AddrPort{outside}, []byte("{}")); err == nil {
		t.Error("an event was sent")
	}
	if _, err := newClient(t).Upload(t.Context(), nw.node(), &recording{Recorders: []netip.AddrPort{outside}}); err == nil {
		t.Error("an upload began")
	}
	if n := nw.dials.Load(); n > 0 {
		t.Errorf("dialled %d times; want never", n)
	}
}

func TestClient_CloseClosesIdleConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nw := newNetwork(t, first)
		c := newClient(t)
		if err := c.Send(t.Context(), nw.node(), []netip.AddrPort{first}, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		if n := nw.recorders[first].Conns(); n != 1 {
			t.Errorf("%d connections are kept; want 1", n)
		}
		c.Close()
		synctest.Wait()
		if n := nw.recorders[first].Conns(); n > 0 {
			t.Errorf("%d connections are left; want none", n)
		}
	})
}
