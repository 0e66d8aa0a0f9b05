// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// A device that leaves the tailnet, or whose key expires, is disconnected from it,
// so it may never learn that its streams were ended. The proxy's log and the API
// server's audit log show it.
func TestRevocation_LeavingDeviceEndsStreams(t *testing.T) {
	for _, tt := range []struct {
		name  string
		leave func(context.Context, string) error
		says  string
	}{
		{"removed", theLab.Headscale.DeleteNode, "knows no peer with the address"},
		{"expired", theLab.Headscale.ExpireNode, "has expired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			login := tt.name + "@example.com"
			grantTo(t, login, "tailnet-readers")
			device, err := theLab.Join(t.Context(), lab.CallerSpec{Name: tt.name, Login: login})
			if err != nil {
				t.Fatal(err)
			}
			underLoad(t, func(l *load) {
				audit, log := tail(t, theLab.Cluster.AuditLog()), tail(t, theLab.Log("caddy"))
				watch := startKubectl(t, device.Kubeconfig, nil, "get", "pods", "--watch", "--output-watch-events", "--no-headers")
				watch.want(t, "ADDED")

				if err := tt.leave(t.Context(), tt.name); err != nil {
					t.Fatal(err)
				}
				within(t, revokedWithin, "the proxy ends the watch", func() error {
					for _, line := range log.lines(t) {
						if strings.Contains(line, "open requests ended") && strings.Contains(line, login) {
							if !strings.Contains(line, tt.says) {
								t.Errorf("the log says %s; want %q", line, tt.says)
							}
							return nil
						}
					}
					return errors.New("no such line in the log")
				})
				within(t, 10*time.Second, "the API server sees the watch end", func() error {
					for _, line := range audit.lines(t) {
						if strings.Contains(line, `"stage":"ResponseComplete"`) && strings.Contains(line, "watch=true") && strings.Contains(line, login) {
							return nil
						}
					}
					return fmt.Errorf("no watch of %s has ended", login)
				})
				l.wantOnlyOK(t, "bob", "carol")
			})
			// Otherwise it would join again, as another node with the same key.
			leave(t, device)
		})
	}
}
