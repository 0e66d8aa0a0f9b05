// SPDX-License-Identifier: Apache-2.0

package apistatus

import (
	"errors"
	"net/http/httptest"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestLog(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		who  []zap.Field
		want map[string]any // besides what is logged of each request
	}{
		{"refusal", Forbidden(Guard, "no"), nil, map[string]any{"reason": "tailscale_impersonate: no", "code": "guard", "status": int32(403)}},
		{"refusal about a caller", About("laptop", "alice", Forbidden(Guard, "no")), nil, map[string]any{
			"reason": "tailscale_impersonate: no", "code": "guard", "status": int32(403), "node": "laptop", "user": "alice",
		}},
		{"given caller", About("laptop", "alice", Forbidden(Guard, "no")), []zap.Field{zap.String("user", "bob")}, map[string]any{
			"reason": "tailscale_impersonate: no", "code": "guard", "status": int32(403), "user": "bob",
		}},
		{"other error", errors.New("broken"), nil, map[string]any{"reason": "broken", "code": "other", "status": int32(500)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zapcore.WarnLevel)
			Log(zap.New(core), httptest.NewRequest("GET", "http://k8s/api?x=1", nil), tt.err, tt.who...)
			for name, value := range map[string]any{"remote_addr": "192.0.2.1:1234", "method": "GET", "host": "k8s", "uri": "http://k8s/api?x=1", "request_id": ""} {
				tt.want[name] = value
			}
			entries := logs.FilterMessage("request refused").All()
			if len(entries) != 1 {
				t.Fatalf("got %d log entries; want 1", len(entries))
			}
			if diff := cmp.Diff(tt.want, entries[0].ContextMap()); diff != "" {
				t.Errorf("fields (-want +got):\n%s", diff)
			}
		})
	}
}
