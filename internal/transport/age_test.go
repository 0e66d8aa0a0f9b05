// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// ageOf returns the age that Prometheus is told of the token for a cluster, false if
// it is told of none.
func ageOf(t *testing.T, host string) (time.Duration, bool) {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(tokenAges)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		for _, m := range family.GetMetric() {
			if m.GetLabel()[0].GetValue() == host {
				return time.Duration(m.GetGauge().GetValue() * float64(time.Second)), true
			}
		}
	}
	return 0, false
}

// The age is that of the token in use, not of the last look at its file: a token
// that cannot be read any more grows old. Of two transports the older one counts.
func TestTheAgeOfATokenIsThatOfTheOneInUse(t *testing.T) {
	path := writeFile(t, "token", "first")
	written := func(ago time.Duration) {
		t.Helper()
		if err := os.Chtimes(path, time.Time{}, time.Now().Add(-ago)); err != nil {
			t.Fatal(err)
		}
	}
	written(time.Hour)
	s, tr, _ := withTokenFile(t, path)
	tokenAges.add(tr.cluster)
	host := tr.cluster.base.Host
	if age, ok := ageOf(t, host); ok {
		t.Errorf("before any request, the age is %v; want none", age)
	}
	want := func(about time.Duration) {
		t.Helper()
		if age, ok := ageOf(t, host); !ok || age < about || age > about+time.Minute {
			t.Errorf("the age is %v (%v); want %v", age, ok, about)
		}
	}
	checkToken(t, s, tr, "Bearer first")
	want(time.Hour)

	rewrite(t, path, "second")
	written(10 * time.Minute)
	expire(tr)
	checkToken(t, s, tr, "Bearer second")
	want(10 * time.Minute)

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	expire(tr)
	if resp := roundTrip(t, tr, newRequest(s, "/api")); resp.StatusCode != http.StatusOK {
		t.Fatalf("answered %s", resp.Status)
	}
	want(10 * time.Minute)

	older := *tr.cluster
	older.token = &tokenFile{written: time.Now().Add(-2 * time.Hour)}
	tokenAges.add(&older)
	want(2 * time.Hour)
	tokenAges.remove(&older)
	if err := tr.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if age, ok := ageOf(t, host); ok {
		t.Errorf("once nothing uses the token any more, the age is %v; want none", age)
	}
}
