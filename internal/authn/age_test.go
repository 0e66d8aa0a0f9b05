// SPDX-License-Identifier: Apache-2.0

package authn

import (
	"context"
	"net/http/httptest"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

func TestIsLast_OnOldConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limited := newServer(t, Options{MaxConnAge: time.Minute}, proxytest.AliceNode())
		unlimited := newServer(t, Options{}, proxytest.AliceNode())
		request := proxytest.NewConn()
		check := func(want bool) {
			t.Helper()
			if got := limited.IsLast(request()); got != want {
				t.Errorf("got %v; want %v", got, want)
			}
			if unlimited.IsLast(request()) {
				t.Error("without a limit, a request is the last one")
			}
		}
		check(false)
		time.Sleep(time.Minute)
		check(false)
		time.Sleep(time.Nanosecond)
		check(true)
		request = proxytest.NewConn() // a connection of its own
		check(false)
		if limited.IsLast(httptest.NewRequestWithContext(context.Background(), "GET", "/", nil)) {
			t.Error("a request that has no connection is the last one")
		}
	})
}
