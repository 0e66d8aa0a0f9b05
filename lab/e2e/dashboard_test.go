// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"bytes"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/common/expfmt"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
)

// expressions returns the queries of a Grafana dashboard.
func expressions(v any) (found []string) {
	switch v := v.(type) {
	case map[string]any:
		if text, ok := v["expr"].(string); ok {
			found = append(found, text)
		}
		for _, value := range v {
			found = append(found, expressions(value)...)
		}
	case []any:
		for _, value := range v {
			found = append(found, expressions(value)...)
		}
	}
	return found
}

// scrape writes Caddy's metrics to path.
func scrape(t *testing.T, path string) {
	t.Helper()
	config := caddy.ActiveContext()
	families, err := config.GetMetricsRegistry().Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	for _, family := range families {
		if _, err := expfmt.MetricFamilyToText(&text, family); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(path, text.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Prometheus's own engine finds a result for every query of the example dashboard in
// the metrics of the lab's Caddy. Tests of the root package check labels and that
// the dashboard has every metric.
func TestDashboard_QueriesHaveResults(t *testing.T) {
	example, err := os.ReadFile(filepath.Join("..", "..", "examples", "grafana-dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard any
	if err := json.Unmarshal(example, &dashboard); err != nil {
		t.Fatal(err)
	}
	variables := strings.NewReplacer("$instance", ".*", "$__rate_interval", "2m", "\n", " ")
	var queries []string
	for _, expression := range expressions(dashboard) {
		queries = append(queries, variables.Replace(expression))
	}
	if len(queries) < 10 {
		t.Fatalf("got only the queries %q", queries)
	}

	var scrapes []string
	for _, name := range []string{"first", "second"} {
		if resp := send(t, "bob", "80", get("/api")); resp.StatusCode != http.StatusOK {
			t.Fatalf("bob gets %s: %s", resp.Status, resp.body)
		}
		if resp := send(t, "bob", "80", get("/api", "Impersonate-User: alice@example.com")); resp.StatusCode != http.StatusForbidden {
			t.Fatalf("bob as alice gets %s: %s", resp.Status, resp.body)
		}
		path := filepath.Join(t.TempDir(), name)
		scrape(t, path)
		scrapes = append(scrapes, path)
	}
	program, err := components.Path("promql")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, scrapes...)
	// A metric that does not exist and an invalid query show that such queries are told apart.
	cmd.Stdin = strings.NewReader(strings.Join(append(queries, "caddy_tailscale_impersonate_none", "sum(("), "\n"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	answers := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(answers) != len(queries)+2 || answers[len(queries)] != "0" || !strings.HasPrefix(answers[len(queries)+1], "error: ") {
		t.Fatalf("to %d queries, one of a missing metric and one invalid one, the answers are %q", len(queries), answers)
	}
	for i, query := range queries {
		if answers[i] == "0" || strings.HasPrefix(answers[i], "error: ") {
			t.Errorf("%s: %s series", query, answers[i])
		}
	}
}
