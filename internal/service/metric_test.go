// SPDX-License-Identifier: Apache-2.0

package service

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestMetric_CountsByWhetherHosted(t *testing.T) {
	want := func(hosted, not string) {
		t.Helper()
		const name = "caddy_tailscale_impersonate_services"
		if err := testutil.CollectAndCompare(Metric, strings.NewReader(`
# HELP `+name+` How many ports of Tailscale Services sites bind, by whether they are hosted.
# TYPE `+name+` gauge
`+name+`{result="hosted"} `+hosted+`
`+name+`{result="not_hosted"} `+not+`
`)); err != nil {
			t.Error(err)
		}
	}
	want("0", "0")
	closed := make(chan struct{})
	close(closed)
	for port, addrs := range map[uint16][]netip.AddrPort{443: {netip.MustParseAddrPort("100.100.7.7:443")}, 80: nil} {
		h := &hosting{key: key{service: "svc:k8s-api", port: port}, over: closed, done: make(chan struct{}), stop: func() {}}
		h.addrs.Store(&addrs)
		if _, _, err := shared.LoadOrNew(h.key, func() (caddy.Destructor, error) { return h, nil }); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _, _ = shared.Delete(h.key) })
	}
	want("1", "1")
}
