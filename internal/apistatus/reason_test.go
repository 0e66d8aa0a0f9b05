// SPDX-License-Identifier: Apache-2.0

package apistatus

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestReasonOf_IsCounted(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want Reason
	}{
		{"with a reason", Forbidden(Guard, "no"), Guard},
		{"with a caller", About("laptop", "alice", Forbidden(Guard, "no")), Guard},
		{"to be retried", TryAgain(NoAnswer, "no"), NoAnswer},
		{"other", Forbidden(Other, "no"), Other},
		{"other, with a caller", About("laptop", "alice", Forbidden(Other, "no")), Other},
		{"no refusal", errors.New("broken"), Other},
		{"no refusal, with a caller", About("laptop", "alice", errors.New("broken")), Other},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := ReasonOf(tt.err); got != tt.want {
				t.Errorf("got reason %q; want %q", got, tt.want)
			}
			counter := refusals.With(tt.want)
			before := testutil.ToFloat64(counter)
			rec := httptest.NewRecorder()
			if err := Write(rec, httptest.NewRequest(http.MethodGet, "/", nil), tt.err); err != nil {
				t.Fatal(err)
			}
			if _, err := Response(httptest.NewRequest(http.MethodGet, "/", nil), tt.err); err != nil {
				t.Fatal(err)
			}
			if got := testutil.ToFloat64(counter) - before; got != 2 {
				t.Errorf("two refusals were counted as %v", got)
			}
		})
	}
}

// The reason and the delay are both in the details of the Status object.
func TestTryAgain_KeepsReasonAndDelay(t *testing.T) {
	rec := httptest.NewRecorder()
	err := About("laptop", "alice", TryAgain(NoAnswer, "no"))
	if got := ReasonOf(err); got != NoAnswer {
		t.Errorf("got reason %q; want %q", got, NoAnswer)
	}
	if err := Write(rec, httptest.NewRequest(http.MethodGet, "/", nil), err); err != nil {
		t.Fatal(err)
	}
	if got := rec.Header().Get("Retry-After"); got != "1" {
		t.Errorf("got Retry-After %q; want 1", got)
	}
}

func TestAbout_NamesTheCaller(t *testing.T) {
	for _, tt := range []struct {
		err        error
		node, user string
	}{
		{About("laptop", "alice", Forbidden(Guard, "no")), "laptop", "alice"},
		{About("laptop", "", Forbidden(Guard, "no")), "laptop", ""},
		{Forbidden(Other, "no"), "", ""},
		{errors.New("broken"), "", ""},
	} {
		if node, user := Of(tt.err); node != tt.node || user != tt.user {
			t.Errorf("%v: got node %q and user %q; want %q and %q", tt.err, node, user, tt.node, tt.user)
		}
	}
}
