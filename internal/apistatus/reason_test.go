// SPDX-License-Identifier: Apache-2.0

package apistatus_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
)

func TestReasonsAreToldAndCounted(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  *apierrors.StatusError
		want apistatus.Reason
	}{
		{"with a reason", apistatus.Forbidden(apistatus.Guard, "no"), apistatus.Guard},
		{"about somebody", apistatus.About("laptop", "alice", apistatus.Forbidden(apistatus.Guard, "no")), apistatus.Guard},
		{"about somebody, the other way round", apistatus.Because(apistatus.Guard, apistatus.About("laptop", "alice", apistatus.Forbidden(apistatus.Other, "no"))), apistatus.Guard},
		{"that may be tried again", apistatus.TryAgain(apistatus.NoAnswer, "no"), apistatus.NoAnswer},
		{"without a reason", apistatus.Forbidden(apistatus.Other, "no"), apistatus.Other},
		{"about somebody without a reason", apistatus.About("laptop", "alice", apistatus.Forbidden(apistatus.Other, "no")), apistatus.Other},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := apistatus.ReasonOf(tt.err); got != tt.want {
				t.Errorf("got reason %q; want %q", got, tt.want)
			}
			counter := metrics.Refusals.WithLabelValues(string(tt.want))
			before := testutil.ToFloat64(counter)
			rec := httptest.NewRecorder()
			if err := apistatus.Write(rec, tt.err); err != nil {
				t.Fatal(err)
			}
			if _, err := apistatus.Response(httptest.NewRequest(http.MethodGet, "/", nil), tt.err); err != nil {
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
	if node, user := apistatus.Of(apistatus.About("laptop", "alice", apistatus.Forbidden(apistatus.Guard, "no"))); node != "laptop" || user != "alice" {
		t.Errorf("got node %q and user %q", node, user)
	}
	if node, user := apistatus.Of(apistatus.Forbidden(apistatus.Other, "no")); node != "" || user != "" {
		t.Errorf("got node %q and user %q; want none", node, user)
	}
}
