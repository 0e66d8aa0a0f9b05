// SPDX-License-Identifier: Apache-2.0

package apistatus

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestLog_SaysWhoAndWhy(t *testing.T) {
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
		{"refusal with a cause", Because(errors.New("dial unix /run/x.sock"), Forbidden(Guard, "no")), nil, map[string]any{
			"reason": "tailscale_impersonate: no", "code": "guard", "status": int32(403), "error": "dial unix /run/x.sock",
		}},
		{"other error", errors.New("broken"), nil, map[string]any{"reason": "broken", "code": "other", "status": int32(500)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			core, logs := observer.New(zapcore.WarnLevel)
			NewLog(zap.New(core)).Refused(httptest.NewRequest("GET", "http://k8s/api?x=1", nil), tt.err, tt.who...)
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

// A caller that is refused over and over costs a few lines a minute, and how many were not
// logged is logged afterwards. Others are not affected.
func TestLog_IsLimitedPerCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.WarnLevel)
		log := NewLog(zap.New(core))
		refuse := func(remote string, times int) {
			for range times {
				r := httptest.NewRequest("GET", "http://k8s/api", nil)
				r.RemoteAddr = remote
				log.Refused(r, Forbidden(Guard, "no"))
			}
		}
		check := func(when string, want ...string) {
			t.Helper()
			var got []string
			lines := make(map[string]int)
			for _, entry := range logs.TakeAll() {
				fields := entry.ContextMap()
				if entry.Message == "request refused" {
					lines[fields["remote_addr"].(string)]++
					continue
				}
				got = append(got, fmt.Sprintf("%v: %v left out", fields["remote_addr"], fields["left_out"]))
			}
			for _, remote := range []string{"100.64.0.2:1", "100.64.0.2:2", "100.64.0.3:1"} {
				if lines[remote] > 0 {
					got = append(got, fmt.Sprintf("%s: %d", remote, lines[remote]))
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", when, diff)
			}
		}
		refuse("100.64.0.2:1", maxLines-1)
		refuse("100.64.0.2:2", 1000) // another connection of the same caller
		refuse("100.64.0.3:1", maxLines)
		check("at once", fmt.Sprintf("100.64.0.2:1: %d", maxLines-1), "100.64.0.2:2: 1", fmt.Sprintf("100.64.0.3:1: %d", maxLines))
		time.Sleep(period)
		synctest.Wait()
		check("a minute later", "100.64.0.2: 999 left out")
		refuse("100.64.0.2:1", 1)
		check("in the next minute", "100.64.0.2:1: 1")
		refuse("100.64.0.2:1", maxLines)
		log.Flush() // as the config ends
		check("at the end", "100.64.0.2: 1 left out", fmt.Sprintf("100.64.0.2:1: %d", maxLines-1))
		time.Sleep(2 * period)
		synctest.Wait()
		check("after the end")
	})
}

// However many addresses refusals come from, they are counted in a small table, and logged
// in a bounded number of lines.
func TestLog_CountsABoundedNumberOfCallers(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	log := NewLog(zap.New(core))
	const callers = 4 * maxCallers
	for i := range callers {
		r := httptest.NewRequest("GET", "http://k8s/api", nil)
		r.RemoteAddr = fmt.Sprintf("[2001:db8::%x]:1", i+1)
		log.Refused(r, Forbidden(Guard, "no"))
	}
	if n := len(log.refused); n > maxCallers+1 {
		t.Errorf("%d callers are counted; want at most %d", n, maxCallers+1)
	}
	if got, want := logs.TakeAll(), maxCallers+maxLines; len(got) != want {
		t.Errorf("%d lines; want %d", len(got), want)
	}
	log.Flush()
	entries := logs.TakeAll()
	if len(entries) != 1 {
		t.Fatalf("got %v; want one line about the others", entries)
	}
	if got, want := entries[0].ContextMap(), map[string]any{"remote_addr": "others", "left_out": int64(callers - maxCallers - maxLines)}; !cmp.Equal(want, got) {
		t.Errorf("got %v; want %v", got, want)
	}
}

func TestLog_CutsWhatTheClientWrote(t *testing.T) {
	core, logs := observer.New(zapcore.WarnLevel)
	r := httptest.NewRequest("GET", "http://k8s/api", nil)
	long := strings.Repeat("\xff", 1_000_000)
	r.Method, r.Host, r.RequestURI = long, long, long
	NewLog(zap.New(core)).Refused(r, Forbidden(Guard, "no"))
	for name, value := range logs.All()[0].ContextMap() {
		if text, ok := value.(string); ok && len(text) > 300 {
			t.Errorf("%s has %d bytes", name, len(text))
		}
	}
}
