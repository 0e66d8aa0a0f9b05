// SPDX-License-Identifier: Apache-2.0

package refusal_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/refusal"
)

func TestReasonsAreToldAndCounted(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  *apierrors.StatusError
		want refusal.Reason
	}{
		{"with a reason", refusal.Because(refusal.Guard, refusal.Forbidden("no")), refusal.Guard},
		{"about somebody", refusal.About("laptop", "alice", refusal.Because(refusal.Guard, refusal.Forbidden("no"))), refusal.Guard},
		{"about somebody, the other way round", refusal.Because(refusal.Guard, refusal.About("laptop", "alice", refusal.Forbidden("no"))), refusal.Guard},
		{"that may be tried again", refusal.Because(refusal.NoAnswer, refusal.TryAgain("no")), refusal.NoAnswer},
		{"without a reason", refusal.Forbidden("no"), refusal.Other},
		{"about somebody without a reason", refusal.About("laptop", "alice", refusal.Forbidden("no")), refusal.Other},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := refusal.ReasonOf(tt.err); got != tt.want {
				t.Errorf("got reason %q; want %q", got, tt.want)
			}
			counter := metrics.Refusals.WithLabelValues(string(tt.want))
			before := testutil.ToFloat64(counter)
			rec := httptest.NewRecorder()
			if err := refusal.Write(rec, tt.err); err != nil {
				t.Fatal(err)
			}
			if _, err := refusal.Response(httptest.NewRequest(http.MethodGet, "/", nil), tt.err); err != nil {
				t.Fatal(err)
			}
			if got := testutil.ToFloat64(counter) - before; got != 2 {
				t.Errorf("two refusals were counted as %v", got)
			}
			if d := tt.err.ErrStatus.Details; d != nil && d.RetryAfterSeconds > 0 && rec.Header().Get("Retry-After") != "1" {
				t.Error("the reason has displaced Retry-After")
			}
		})
	}
}

func TestARefusalNamesWhomItIsAbout(t *testing.T) {
	if node, user := refusal.Of(refusal.About("laptop", "alice", refusal.Because(refusal.Guard, refusal.Forbidden("no")))); node != "laptop" || user != "alice" {
		t.Errorf("got node %q and user %q", node, user)
	}
	if node, user := refusal.Of(refusal.Forbidden("no")); node != "" || user != "" {
		t.Errorf("got node %q and user %q; want none", node, user)
	}
}
