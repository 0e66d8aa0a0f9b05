// SPDX-License-Identifier: Apache-2.0

package tailscaleimpersonate

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// queries returns the values of all keys of that name in a JSON document.
func queries(v any, key string) (found []string) {
	objects(v, func(o map[string]any) {
		if text, ok := o[key].(string); ok {
			found = append(found, text)
		}
	})
	return found
}

// The example dashboard asks for metrics that a running Caddy has, and for labels
// that they have, and leaves none of the metrics out. That its queries have answers
// is tested in the lab, with Prometheus's own engine.
func TestTheDashboardShowsWhatThereIs(t *testing.T) {
	up := newUpstream(t)
	s := startSite(t, up, false, "", "tailscale_impersonate\nreverse_proxy $UPSTREAM {\n$KUBERNETES\n}", aliceNode())
	s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: k8s\r\nConnection: close\r\n\r\n")
	s.http1(t, aliceAddr, "GET /api HTTP/1.1\r\nHost: evil\r\nConnection: close\r\n\r\n")
	up.checkSeen(t, aliceAsProxy)
	config := caddy.ActiveContext()
	families, err := config.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	exposed := make(map[string][]string) // the labels of each metric
	for _, family := range families {
		if !strings.HasPrefix(family.GetName(), "caddy_tailscale_impersonate_") {
			continue
		}
		labels := []string{"instance"} // which Prometheus adds
		for _, label := range family.GetMetric()[0].GetLabel() {
			labels = append(labels, label.GetName())
		}
		if name := family.GetName(); family.GetMetric()[0].GetHistogram() != nil {
			exposed[name+"_bucket"] = append(labels, "le")
			exposed[name+"_count"], exposed[name+"_sum"] = labels, labels
		} else {
			exposed[name] = labels
		}
	}

	text, err := os.ReadFile(filepath.Join("examples", "grafana-dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard any
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	var (
		metric   = regexp.MustCompile(`caddy_tailscale_impersonate_\w+`)
		selector = regexp.MustCompile(`(\w+)\s*(?:=~|=|!=|!~)\s*"`)
		grouping = regexp.MustCompile(`by \(([^)]*)\)`)
		unused   = make(map[string]bool)
	)
	for name := range exposed {
		unused[strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"), "_sum")] = true
	}
	exprs := queries(dashboard, "expr")
	if len(exprs) < 10 {
		t.Fatalf("got only the queries %q", exprs)
	}
	for _, expr := range append(exprs, queries(dashboard, "query")...) {
		names := metric.FindAllString(expr, -1)
		for _, name := range names {
			labels, ok := exposed[name]
			if !ok {
				t.Errorf("%s: Caddy exposes no metric %s", expr, name)
				continue
			}
			delete(unused, strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count"))
			var used []string
			for _, m := range selector.FindAllStringSubmatch(expr, -1) {
				used = append(used, m[1])
			}
			for _, m := range grouping.FindAllStringSubmatch(expr, -1) {
				for label := range strings.SplitSeq(m[1], ",") {
					used = append(used, strings.TrimSpace(label))
				}
			}
			for _, label := range used {
				if !slices.Contains(labels, label) {
					t.Errorf("%s: %s has no label %s, only %v", expr, name, label, labels)
				}
			}
		}
	}
	for name := range unused {
		t.Errorf("the dashboard does not show %s", name)
	}
}
