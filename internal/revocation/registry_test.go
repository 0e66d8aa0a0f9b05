// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/requestinfo"
)

// gathered returns the open_streams metric, by kind.
func gathered(t *testing.T, streams *Registry) map[string]int {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(streams)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]int)
	for _, m := range families[0].GetMetric() {
		if n := int(m.GetGauge().GetValue()); n != 0 {
			counts[m.GetLabel()[0].GetValue()] = n
		}
	}
	return counts
}

func TestClients_AcrossReloads(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		first, second := registry.NewGeneration(), registry.NewGeneration()
		old := first.NewTracker([]string{":443"}, "a", n.policy())
		first.Run()
		a, b := connect(t, aliceAddr), connect(t, bobAddr)
		requests := []*Request{
			old.track(t.Context(), caller(a, alice, time.Now()), requestinfo.Watch),
			old.track(t.Context(), caller(a, alice, time.Now()), requestinfo.Watch),
			old.track(t.Context(), caller(b, bob, time.Now()), requestinfo.Exec),
			old.track(t.Context(), caller(b, bob, time.Now()), requestinfo.Short),
		}
		tracker := second.NewTracker([]string{":443"}, "a", n.policy())
		second.Run()
		requests = append(requests, tracker.track(t.Context(), caller(a, alice, time.Now()), requestinfo.Log))

		want := []Client{
			{Remote: aliceAddr, Local: nodeAddr, Identity: alice, Open: map[requestinfo.Kind]int{requestinfo.Watch: 2, requestinfo.Log: 1}},
			{Remote: bobAddr, Local: nodeAddr, Identity: bob, Open: map[requestinfo.Kind]int{requestinfo.Exec: 1, requestinfo.Short: 1}},
		}
		if diff := cmp.Diff(want, registry.Clients(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("callers (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(map[string]int{"watch": 2, "log": 1, "exec": 1}, gathered(t, registry)); diff != "" {
			t.Errorf("metric (-want +got):\n%s", diff)
		}
		for _, r := range requests {
			r.Close()
		}
		if callers, counts := registry.Clients(), gathered(t, registry); len(callers) > 0 || len(counts) > 0 {
			t.Errorf("with nothing open, got %v and %v", callers, counts)
		}
	})
}

func TestDrop_EndsOneCallersRequests(t *testing.T) {
	inBubble(t, func(t *testing.T, registry *Registry) {
		n := newNetwork()
		tracker := registry.NewGeneration().NewTracker(nil, nil, n.policy())
		a, a2, b := connect(t, aliceAddr), connect(t, aliceAddr), connect(t, bobAddr)
		for _, c := range []client{a, a2} {
			defer tracker.track(t.Context(), caller(c, alice, time.Now()), requestinfo.Exec).Close()
		}
		defer tracker.track(t.Context(), caller(b, bob, time.Now()), requestinfo.Watch).Close()

		if got := registry.Drop(aliceAddr, netip.MustParseAddr("100.64.9.9"), alice.Node, "other node"); len(got) > 0 {
			t.Errorf("dropped %v, who dialled another address", got)
		}
		// Another tailnet's device, which has the same address there.
		far := connect(t, aliceAddr)
		other := *alice
		other.Node = "other.example.com"
		defer tracker.track(t.Context(), caller(far, &other, time.Now()), requestinfo.Exec).Close()
		if callers := registry.Clients(); len(callers) != 3 {
			t.Errorf("got callers %+v; want three", callers)
		}
		if diff := cmp.Diff(map[requestinfo.Kind]int{requestinfo.Exec: 2}, registry.Drop(aliceAddr, nodeAddr, alice.Node, "an operator said so")); diff != "" {
			t.Errorf("dropped (-want +got):\n%s", diff)
		}
		synctest.Wait()
		a.wantEnded(t, Dropped, "an operator said so")
		a2.wantEnded(t, Dropped)
		b.wantOpen(t)
		far.wantOpen(t)
		if got := registry.Drop(aliceAddr, nodeAddr, alice.Node, "again"); len(got) > 0 {
			t.Errorf("dropped %v twice", got)
		}
		_, ended := n.seen()
		if len(ended) != 1 || ended[0].User != alice.User || ended[0].Requests != 2 || ended[0].Remote != aliceAddr {
			t.Errorf("the tracker was told of %+v; want alice's two requests, once", ended)
		}
	})
}
