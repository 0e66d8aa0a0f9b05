// SPDX-License-Identifier: Apache-2.0

package revocation

import (
	"net/http/httptest"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
)

func TestKindsOfRequests(t *testing.T) {
	const pod = "/api/v1/namespaces/default/pods/web"
	for _, tt := range []struct {
		target  string
		upgrade bool
		want    Kind
	}{
		{"/api/v1/pods?limit=500", false, Short},
		{"/api/v1/pods?allowWatchBookmarks=true&watch=true", false, Watch},
		{"/api/v1/pods?watch=1", false, Watch},
		{"/api/v1/pods?watch=false", false, Short},
		{"/api/v1/pods?watch=true", true, Watch},
		{pod + "/log?follow=true", false, Log},
		{pod + "/log", false, Short},
		{pod + "/exec?command=sh&stdin=true", true, Exec},
		{pod + "/exec?command=sh", false, Short}, // which the API server refuses
		{pod + "/attach?stdin=true", true, Attach},
		{pod + "/portforward", true, PortForward},
		{pod + "/log?follow=true", true, Log},
		{"/api/v1/namespaces/default/services/web/proxy/socket", true, Upgrade},
		{"/", false, Short},
	} {
		r := httptest.NewRequest("GET", tt.target, nil)
		if tt.upgrade {
			r.Header.Set("Connection", "Upgrade")
		}
		if got, upgrade := KindOf(r); got != tt.want || upgrade != tt.upgrade {
			t.Errorf("%s (upgrade: %v) is %v (upgrade: %v); want %v", tt.target, tt.upgrade, got, upgrade, tt.want)
		}
	}
}

// gathered returns how many requests of each kind Prometheus is told are open.
func gathered(t *testing.T) map[string]int {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(Streams{})
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

// What is open is listed and counted, also after the config has been replaced under
// which it began, and no longer once it has ended.
func TestOpenRequestsAreCountedAcrossConfigs(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		first, second := new(Generation), new(Generation)
		old := first.NewTracker([]string{":443"}, "a", n.policies())
		first.Run()
		a, b := connect(t, aliceAddr), connect(t, bobAddr)
		requests := []*Request{
			old.Track(t.Context(), a.conn, alice, time.Now(), Watch),
			old.Track(t.Context(), a.conn, alice, time.Now(), Watch),
			old.Track(t.Context(), b.conn, bob, time.Now(), Exec),
			old.Track(t.Context(), b.conn, bob, time.Now(), Short),
		}
		tracker := second.NewTracker([]string{":443"}, "a", n.policies())
		second.Run()
		requests = append(requests, tracker.Track(t.Context(), a.conn, alice, time.Now(), Log))

		want := []Caller{
			{Remote: aliceAddr, Local: nodeAddr, Identity: alice, Open: map[Kind]int{Watch: 2, Log: 1}},
			{Remote: bobAddr, Local: nodeAddr, Identity: bob, Open: map[Kind]int{Exec: 1, Short: 1}},
		}
		if diff := cmp.Diff(want, Callers(), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
			t.Errorf("callers (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(map[string]int{"watch": 2, "log": 1, "exec": 1}, gathered(t)); diff != "" {
			t.Errorf("metric (-want +got):\n%s", diff)
		}
		for _, r := range requests {
			r.Close()
		}
		if callers, counts := Callers(), gathered(t); len(callers) > 0 || len(counts) > 0 {
			t.Errorf("with nothing open, got %v and %v", callers, counts)
		}
	})
}

// An operator who drops a caller ends its requests and nobody else's.
func TestDropEndsOneCallersRequests(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		n := newNetwork()
		tracker := new(Generation).NewTracker(nil, nil, n.policies())
		a, a2, b := connect(t, aliceAddr), connect(t, aliceAddr), connect(t, bobAddr)
		for _, c := range []client{a, a2} {
			defer tracker.Track(t.Context(), c.conn, alice, time.Now(), Exec).Close()
		}
		defer tracker.Track(t.Context(), b.conn, bob, time.Now(), Watch).Close()

		if got := Drop(aliceAddr, netip.MustParseAddr("100.64.9.9"), alice.Node, "other node"); len(got) > 0 {
			t.Errorf("dropped %v, who dialled another address", got)
		}
		// Another tailnet's device, which has the same address there.
		far := connect(t, aliceAddr)
		other := *alice
		other.Node = "other.example.com"
		defer tracker.Track(t.Context(), far.conn, &other, time.Now(), Exec).Close()
		if callers := Callers(); len(callers) != 3 {
			t.Errorf("got callers %+v; want three", callers)
		}
		if diff := cmp.Diff(map[Kind]int{Exec: 2}, Drop(aliceAddr, nodeAddr, alice.Node, "an operator said so")); diff != "" {
			t.Errorf("dropped (-want +got):\n%s", diff)
		}
		synctest.Wait()
		a.wantEnded(t, Dropped, "an operator said so")
		a2.wantEnded(t, Dropped)
		b.wantOpen(t)
		far.wantOpen(t)
		if got := Drop(aliceAddr, nodeAddr, alice.Node, "again"); len(got) > 0 {
			t.Errorf("dropped %v twice", got)
		}
		_, ended := n.seen()
		if len(ended) != 1 || ended[0].User != alice.User || ended[0].Requests != 2 || ended[0].Remote != aliceAddr {
			t.Errorf("the tracker was told of %+v; want alice's two requests, once", ended)
		}
	})
}
