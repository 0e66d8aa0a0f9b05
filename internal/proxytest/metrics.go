// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
)

// Counts returns the value of every counter of these names, and how often every
// histogram of these names was observed. The names are those after
// caddy_tailscale_impersonate_; the keys are a name and the values of its labels, in
// the order of the labels' names, separated by blanks.
func Counts(t testing.TB, names ...string) map[string]float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	metrics.Register(registry)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := make(map[string]float64)
	for _, name := range names {
		found := false
		for _, family := range families {
			if family.GetName() != metrics.Namespace+"_"+metrics.Subsystem+"_"+name {
				continue
			}
			found = true
			for _, m := range family.GetMetric() {
				key := name
				for _, label := range m.GetLabel() {
					key += " " + label.GetValue()
				}
				key = strings.TrimSpace(key)
				if h := m.GetHistogram(); h != nil {
					counts[key] = float64(h.GetSampleCount())
				} else {
					counts[key] = m.GetCounter().GetValue()
				}
			}
		}
		if !found {
			t.Fatalf("there is no metric %s", name)
		}
	}
	return counts
}

// CountsSince returns a function that returns by how much the counts of these names
// have risen since this call, without those that have not.
func CountsSince(t testing.TB, names ...string) func() map[string]float64 {
	t.Helper()
	before := Counts(t, names...)
	return func() map[string]float64 {
		t.Helper()
		since := Counts(t, names...)
		for key := range since {
			since[key] -= before[key]
		}
		maps.DeleteFunc(since, func(_ string, n float64) bool { return n == 0 })
		return since
	}
}

// WaitForCounts waits until since returns want.
func WaitForCounts(t testing.TB, since func() map[string]float64, want map[string]float64) {
	t.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for !cmp.Equal(since(), want) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond) // between two looks
	}
	if diff := cmp.Diff(want, since()); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}
